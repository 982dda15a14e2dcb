"""The multi-process trainer: Ray actors, FSDP2 over gloo, samplers in processes of their own.

1. Given the same rollouts, two ranks have the losses of one, and four the gradients, with ragged batches and with ranks
   that have no row.
2. With vLLM samplers: log-probs agree before and after each update, the first step's invariants hold, and one process
   goes on where two ranks stopped.
3. A process that is killed is a clear error or a restart from the last checkpoint, and the losses are those of an
   unbroken run.
4. One step ahead, samples are one step old, and truncated importance sampling sees it.
5. On GPUs (marked): weights go over by vLLM's transfer, the sampler sleeps and wakes, and the log-probs agree.
"""

import random
from pathlib import Path
from typing import Any

import helpers_cluster as cluster
import helpers_trainers as helpers
import pytest

from convsearch.config import load_grpo_config
from convsearch.runs import rollouts
from convsearch.runs.tracking import read_metrics
from convsearch.trainers.grpo import train

pytestmark = [pytest.mark.slow, pytest.mark.skipif(cluster.why_absent() is not None, reason=str(cluster.why_absent()))]
REPLAY = "actor_rollout_ref__rollout__replay_from"


def trained(model: Path, parquet: Path, run_dir: Path, url: str, **changed: Any) -> list[dict[str, Any]]:
    """In this process."""
    train(load_grpo_config(helpers.grpo_overrides(model, parquet, run_dir, url, **changed)))
    return read_metrics(run_dir)


def on_ray(model: Path, parquet: Path, run_dir: Path, url: str, **changed: Any) -> list[dict[str, Any]]:
    arguments = helpers.grpo_overrides(
        model, parquet, run_dir, url, **({"cluster": "cpu2", "trainer__save_freq": -1} | changed)
    )
    status, output = cluster.end(cluster.start(arguments))
    assert status == 0, output
    return read_metrics(run_dir)


def test_ranks_have_the_losses_and_gradients_of_one(
    form_llama: Path, toy_parquet: Path, toy_server: str, tmp_path: Path
) -> None:
    steps = {
        "total_training_steps": 5,
        "trainer__save_freq": -1,
        "ppo_mini_batch_size": 2,
        "ppo_micro_batch_size_per_gpu": 2,
    }
    one = trained(form_llama, toy_parquet, tmp_path / "one", toy_server, **steps)
    lengths = {
        len(rollout.completion.token_ids) for step in range(5) for rollout in rollouts.load(tmp_path / "one", step)
    }
    assert len(lengths) > 5
    for ranks in (2, 4):  # two trees an update: of four ranks two have nothing to do
        changed = steps | {REPLAY: tmp_path / "one", "trainer__n_gpus_per_node": ranks}
        several = on_ray(form_llama, toy_parquet, tmp_path / str(ranks), "", **changed)
        assert len(several) == 5
        for left, right in zip(one, several, strict=True):
            for name in ("loss", "policy_loss", "kl", "entropy", "grad_norm"):
                assert right[name] == pytest.approx(left[name], rel=1e-4, abs=1e-7), (ranks, left["step"], name)


@pytest.mark.vllm
def test_a_run_with_vllm(toy_parquet: Path, toy_server: str, tmp_path: Path) -> None:
    helpers.teach_form(cluster.vllm_model(tmp_path / "model", spread=0.02), tmp_path / "form")
    run_dir, steps = (
        tmp_path / "run",
        {"total_training_steps": 3, "data__val_files": toy_parquet, "trainer__test_freq": 2},
    )
    metrics = on_ray(tmp_path / "form", toy_parquet, run_dir, toy_server, **steps)
    assert metrics[0]["kl"] == pytest.approx(0, abs=1e-9)
    assert metrics[0]["clip_rate"] == 0
    assert metrics[2]["kl"] > 1e-7
    assert all(line["sampler_gap"] < 1e-3 for line in metrics)
    assert all(line["skipped"] == 0 for line in metrics)
    assert {"val_reward", "val_mrr"} <= metrics[1].keys()
    for step in range(3):
        samples = rollouts.load(run_dir, step)
        assert {rollout.completion.weights_version for rollout in samples} == {step}
        for start in range(0, len(samples), 4):
            assert sum(rollout.advantage for rollout in samples[start : start + 4]) == pytest.approx(0, abs=1e-9)
            assert len({rollout.completion.token_ids for rollout in samples[start : start + 4]}) > 1
    # what two ranks have learned goes on in one process, given the same samples
    whole = trained(tmp_path / "form", toy_parquet, tmp_path / "one", "", total_training_steps=3, **{REPLAY: run_dir})
    for left, right in zip(whole, metrics, strict=True):
        assert right["loss"] == pytest.approx(left["loss"], rel=1e-4, abs=1e-7)
        assert right["grad_norm"] == pytest.approx(left["grad_norm"], rel=1e-4)


def test_a_killed_process(form_llama: Path, toy_parquet: Path, toy_server: str, tmp_path: Path) -> None:
    """One run, broken off by one kill and disturbed by another (tests/helpers_cluster.py does it at random, to every
    kind of process)."""
    changed: dict[str, Any] = {
        "cluster": "cpu2",
        "actor_rollout_ref__rollout__name": "hf",
        "total_training_steps": 12,
        "trainer__save_freq": 3,
    }
    on_ray(form_llama, toy_parquet, tmp_path / "unbroken", toy_server, **changed)
    run_dir, draw = tmp_path / "run", random.Random(5)

    def started(max_restarts: int) -> Any:
        arguments = helpers.grpo_overrides(
            form_llama, toy_parquet, run_dir, toy_server, trainer__max_restarts=max_restarts, **changed
        )
        return cluster.start(arguments)

    first = started(0)
    cluster.wait_until(lambda: cluster.steps_logged(run_dir) > 3, first)
    assert cluster.kill(first.pid, "rank", draw)
    error = helpers.one_sentence(*cluster.end(first))
    assert "run the same command again to go on" in error
    assert 3 < cluster.steps_logged(run_dir) < 12
    second = started(1)
    cluster.wait_until(lambda: cluster.steps_logged(run_dir) > 7, second)
    assert cluster.kill(second.pid, "sampler", draw)
    status, output = cluster.end(second)
    assert status == 0, output
    assert "starting the workers again from the newest checkpoint (1 of 1)" in output
    assert cluster.largest_difference(cluster.curves(tmp_path / "unbroken"), cluster.curves(run_dir)) < 1e-4


def test_one_step_ahead(form_llama: Path, toy_parquet: Path, toy_server: str, tmp_path: Path) -> None:
    changed = {
        "actor_rollout_ref__rollout__name": "hf",
        "actor_rollout_ref__rollout__overlap": True,
        "trainer__n_gpus_per_node": 1,
    }
    correction = {"algorithm__rollout_correction__rollout_is": "token", "total_training_steps": 4}
    metrics = on_ray(form_llama, toy_parquet, tmp_path, toy_server, **changed, **correction)
    versions = [{rollout.completion.weights_version for rollout in rollouts.load(tmp_path, step)} for step in range(4)]
    assert versions == [{0}, {0}, {1}, {2}]
    assert metrics[0]["sampler_gap"] < 1e-4
    assert metrics[0]["importance_weight"] == pytest.approx(1, abs=1e-4)
    assert all(line["sampler_gap"] > 1e-3 for line in metrics[1:])
    assert all(abs(line["importance_weight"] - 1) > 1e-4 for line in metrics[1:])


@pytest.mark.gpu
@pytest.mark.vllm
@pytest.mark.parametrize("layout", ["colocated", "disaggregated"])
def test_weights_reach_the_samplers_of_gpus(layout: str, toy_parquet: Path, toy_server: str, tmp_path: Path) -> None:
    """vLLM's own transfer: CUDA IPC with sleep and wake on one GPU, NCCL between two."""
    import torch

    needed = 1 if layout == "colocated" else 2
    if torch.cuda.device_count() < needed:
        pytest.skip(f"needs {needed} CUDA devices")
    helpers.teach_form(cluster.vllm_model(tmp_path / "model", spread=0.02), tmp_path / "form")
    exact = {
        "actor_rollout_ref__model__dtype": "fp32",
        "actor_rollout_ref__rollout__dtype": "fp32",
        "trainer__n_gpus_per_node": 1,
    }
    own = {"cluster": "gpu8", "actor_rollout_ref__rollout__gpu_memory_utilization": 0.3}
    if layout == "disaggregated":
        own = {
            "cluster": "disaggregated",
            "actor_rollout_ref__rollout__n_gpus_per_node": 1,
            "actor_rollout_ref__rollout__overlap": False,
        }
    steps = {"total_training_steps": 4, "data__val_files": toy_parquet, "trainer__test_freq": 2}
    metrics = on_ray(tmp_path / "form", toy_parquet, tmp_path / "run", toy_server, **own, **exact, **steps)
    assert metrics[0]["kl"] == pytest.approx(0, abs=1e-6)
    assert metrics[3]["kl"] > 1e-6
    assert all(line["sampler_gap"] < 5e-3 for line in metrics)
    assert [
        {rollout.completion.weights_version for rollout in rollouts.load(tmp_path / "run", step)} for step in range(4)
    ] == [
        {0},
        {1},
        {2},
        {3},
    ]
