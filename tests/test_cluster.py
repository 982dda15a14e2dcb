"""The multi-process trainer without Ray (tests/test_cluster_ray.py starts the processes).

1. A micro-batch that is split over processes loses nothing: log-probs, gradients and reports add up to those of the
   whole.
2. Samples of unexpected weights end the run.
3. Finished samples are scored while others are generated.
4. One step ahead, samples are exactly one step old; any other request waits.
5. A lost worker leads to a restart, a limited number of times; other errors are raised.
"""

import sys
import threading
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import helpers_trainers as helpers
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from convsearch.cluster.launch import needs_workers, open_cluster, with_restarts
from convsearch.cluster.ray_policy import shares
from convsearch.cluster.workers import WorkerLost
from convsearch.config import load_grpo_config
from convsearch.model.batch import Branch, MicroBatch, Tree, collate, pack
from convsearch.model.loading import load_model
from convsearch.policy.policy import LocalPolicy
from convsearch.rewards import scoring
from convsearch.rewards.shapes import Feedback
from convsearch.sampling.base import Finished, Tensors, WeightSource, collect
from convsearch.sampling.overlap import OneStepAhead, Request
from convsearch.sampling.vllm import VllmSampler, sample_seed
from convsearch.trainers import grpo_step
from convsearch.types import Completion, Example, Rewrite


@st.composite
def micro_batches(draw: st.DrawFn) -> MicroBatch:
    sizes = draw(
        st.lists(
            st.tuples(st.integers(1, 6), st.lists(st.integers(1, 5), min_size=1, max_size=3)), min_size=1, max_size=7
        )
    )
    tokens = iter(range(10, 1000))
    trees = []
    for prompt, branches in sizes:
        made = tuple(
            Branch(
                tuple(next(tokens) for _ in range(size)), float(size), 0.1 * size, tuple(float(-i) for i in range(size))
            )
            for size in branches
        )
        trees.append(Tree(tuple(next(tokens) for _ in range(prompt)), made))
    return collate(trees)


@given(micro_batches(), st.integers(1, 5))
def test_every_row_goes_to_one_rank(micro: MicroBatch, ranks: int) -> None:
    parts = shares(micro, ranks)
    places_R = torch.cat([places for _, places in parts])
    assert sorted(places_R.tolist()) == list(range(len(micro.row_R)))
    busy = [(part, places) for part, places in parts if len(places)]
    for part, places in busy:
        assert torch.equal(part.target_ids_R, micro.target_ids_R[places])
        assert torch.equal(part.weights_R, micro.weights_R[places])
        # the token that a response token is predicted from is the same one, in the same position of the same branch
        for name in ("token_ids_BT", "position_ids_BT", "branch_BT"):
            mine, whole = getattr(part, name), getattr(micro, name)
            assert torch.equal(mine[part.row_R, part.source_R], whole[micro.row_R[places], micro.source_R[places]])
        assert part.token_ids_BT.shape[1] == int((part.branch_BT >= 0).sum(1).max())  # no column of padding alone
        assert int(part.sequence_R.max()) + 1 == len(set(micro.sequence_R[places].tolist()))
    loads = [int((part.branch_BT >= 0).sum()) for part, _ in busy]
    assert max(loads) - min(loads) <= int((micro.branch_BT >= 0).sum(1).max())
    for part, places in parts:
        if not len(places):
            assert len(part.token_ids_BT) == 1
            assert float(part.weights_R.abs().sum()) == 0


def toy_loss(micro: MicroBatch, logprobs_R: Tensor, entropy_R: Tensor) -> tuple[Tensor, dict[str, float]]:
    total = (
        micro.weights_R * (0.1 * logprobs_R.square() - micro.advantages_R * logprobs_R.exp() - 0.3 * entropy_R)
    ).sum()
    return total, {"loss": float(total.detach())}


@pytest.mark.parametrize("ranks", [2, 4])
def test_shares_add_up_to_the_whole(ranks: int, tiny_llama: Path) -> None:
    trees = [
        Tree((5, 6, 7), (Branch((8, 9, 10), 0.5, 0.1),)),
        Tree((3,) * 9, (Branch((4, 2), 1.0, 0.2), Branch((7,) * 5, -1.0, 0.05))),
    ]
    trees.append(Tree((11, 12), (Branch((13,), -0.5, 0.3),)))
    micro = collate(trees)

    def gradients(parts: Sequence[MicroBatch]) -> tuple[dict[str, Tensor], float, list[Tensor]]:
        policy = LocalPolicy(load_model(str(tiny_llama)), torch.device("cpu"), temperature=0.7)
        logprobs = [policy.logprobs(part) for part in parts]
        loss = sum(policy.forward_backward(part, toy_loss)["loss"] for part in parts)
        return {name: p.grad for name, p in policy.named_parameters().items() if p.grad is not None}, loss, logprobs

    parts = shares(micro, ranks)
    whole, loss, (logprobs_R,) = gradients([micro])
    split_up, loss_of_parts, logprobs = gradients([part for part, _ in parts])
    assert loss_of_parts == pytest.approx(loss, rel=1e-5)
    for (_, places_R), mine_R in zip(parts, logprobs, strict=True):
        torch.testing.assert_close(mine_R[: len(places_R)], logprobs_R[places_R], atol=1e-5, rtol=0)
    for name, gradient in whole.items():
        torch.testing.assert_close(split_up[name], gradient, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_packing_fills_all_ranks(ranks: int) -> None:
    trees = [Tree((1,) * size, (Branch((2, 3)),)) for size in (3, 4, 4, 5, 9, 9, 30)]
    for limit in (8, 14, 40):
        micros = list(pack(trees, limit, world_size=ranks))
        assert sum(len(micro.token_ids_BT) for micro in micros) == len(trees)
        for part, _ in (share for micro in micros for share in shares(micro, ranks)):
            assert part.num_tokens <= limit or len(part.token_ids_BT) == 1


def example(number: int) -> Example:
    return Example(f"q{number}", (), "q", ("d",))


def completion(text: str = "x", version: int = 0) -> Completion:
    return Completion((1,), (-0.5,), text, "stop", version)


class Judge:
    """Ranks every query 1, and notes what it was asked."""

    def __init__(self) -> None:
        self.asked: list[str | None] = []
        self.heard = threading.Event()

    def feedback(
        self, examples_N: Sequence[Example], texts_N: Sequence[str | None], signals: Collection[str]
    ) -> list[Feedback]:
        self.asked += texts_N
        self.heard.set()
        if "boom" in texts_N:
            raise WorkerLost("the judge")
        return [Feedback(1)] * len(texts_N)


def rewrite(text: str) -> str:
    return f"<think>t</think>\n<rewrite>{text}</rewrite>"


def cfg(tmp_path: Path, **changed: Any) -> Any:
    return load_grpo_config(
        helpers.grpo_overrides(tmp_path, tmp_path / "train.parquet", tmp_path, "http://127.0.0.1:1", **changed)
    )


def test_finished_samples_are_scored_while_others_are_generated(tmp_path: Path) -> None:
    judge, reward = Judge(), cfg(tmp_path).reward_model.reward

    def batches() -> Iterator[Finished]:
        yield {2: [completion(rewrite("c0")), completion(rewrite("c1"))]}
        assert judge.heard.wait(10), "the first batch was not scored before the second one came"
        yield {p: [completion(rewrite(f"{name}{g}")) for g in range(2)] for p, name in enumerate("ab")}

    examples = [example(p) for p in range(3)]
    groups = scoring.score_stream(reward, judge, examples, batches())
    made = [rollout for group in groups for rollout in group.rollouts]
    assert [rollout.score.rewrite.text for rollout in made] == ["a0", "a1", "b0", "b1", "c0", "c1"]
    assert [rollout.completion.text for rollout in made] == [
        rewrite(text) for text in ("a0", "a1", "b0", "b1", "c0", "c1")
    ]
    assert [rollout.example for rollout in made] == [examples[p] for p in (0, 0, 1, 1, 2, 2)]
    assert sorted(filter(None, judge.asked)) == ["a0", "a1", "b0", "b1", "c0", "c1"]
    with pytest.raises(WorkerLost, match="the judge"):
        scoring.score_stream(reward, judge, examples[:1], iter([{0: [completion(rewrite("boom"))]}]))
    with pytest.raises(AssertionError, match="every prompt once"):
        scoring.score_stream(reward, judge, examples[:2], iter([{0: [completion(rewrite("a"))]}]))


@pytest.mark.parametrize(
    ("allowed", "version", "fine"), [(0, 5, 1), (0, 4, 0), (0, 6, 0), (1, 4, 1), (1, 5, 1), (1, 3, 0), (1, 6, 0)]
)
def test_samples_of_other_weights_end_the_run(allowed: int, version: int, fine: int) -> None:
    score = scoring.Score(Rewrite("x", None), Feedback(1), 2.0)
    made = [scoring.Rollout(example(0), completion(version=each), score) for each in (5, version)]
    groups = [scoring.Group(tuple(made))]
    if fine:
        grpo_step.check_versions(groups, 5, allowed)
    else:
        with pytest.raises(RuntimeError, match="a sampler has missed an update"):
            grpo_step.check_versions(groups, 5, allowed)


class Engine:
    """A sampler whose samples carry its version; notes the order of events, and samples only when it is let."""

    def __init__(self) -> None:
        self.version, self.events, self.go = 0, [], threading.Event()
        self.go.set()

    def stream(self, prompts: Sequence[tuple[int, ...]], n: int, seed: int) -> Iterator[Finished]:
        assert self.go.wait(10)
        self.events.append(("draw", seed, self.version))
        for p in reversed(range(len(prompts))):
            yield {p: [completion(f"{seed}.{p}.{g}", self.version) for g in range(n)]}

    def generate(self, prompts: Sequence[tuple[int, ...]], n: int, seed: int) -> list[list[Completion]]:
        return collect(self.stream(prompts, n, seed), len(prompts))

    def load_weights(self, source: WeightSource, version: int) -> None:
        self.events.append(("load", version))
        self.version = version


def test_one_step_ahead() -> None:
    def request(step: int) -> Request | None:
        return (((step,), (step, step)), 2, step) if step < 7 else None

    engine, source = Engine(), Tensors({})
    ahead = OneStepAhead(engine, request, first_step=3)
    ahead.load_weights(source, 3)
    for step in range(3, 7):
        prompts, n, seed = request(step) or ((), 0, 0)
        engine.go.set()
        samples = [sample for group in ahead.generate(prompts, n, seed) for sample in group]
        assert [sample.text for sample in samples] == [f"{step}.{p}.{g}" for p in range(2) for g in range(2)]
        assert {sample.weights_version for sample in samples} == {max(3, step - 1)}
        engine.go.clear()
        if step == 4:  # a validation: it waits for what is under way, and that is still there afterwards
            threading.Timer(0.05, engine.go.set).start()
            ((validated,),) = ahead.generate([(9,)], 1, 99)
            assert validated.text == "99.0.0"
        threading.Timer(0.02, engine.go.set).start()  # the weights wait for the samples that are under way
        ahead.load_weights(source, step + 1)
    ahead.close()
    assert engine.events == [
        ("load", 3),
        ("draw", 3, 3),
        ("draw", 4, 3),
        ("load", 4),
        ("draw", 5, 4),
        ("draw", 99, 4),
        ("load", 5),
        ("draw", 6, 5),
        ("load", 6),
        ("load", 7),
    ]


def test_a_failure_ahead_is_raised_by_the_step_that_asks() -> None:
    class Broken(Engine):
        def stream(self, prompts: Sequence[tuple[int, ...]], n: int, seed: int) -> Iterator[Finished]:
            if seed == 1:
                raise WorkerLost("the sampler")
            return super().stream(prompts, n, seed)

    ahead = OneStepAhead(Broken(), lambda step: (((1,),), 1, step), first_step=0)
    ahead.generate([(1,)], 1, 0)
    ahead.load_weights(Tensors({}), 1)
    with pytest.raises(WorkerLost, match="the sampler"):
        ahead.generate([(1,)], 1, 1)


def test_a_lost_worker_means_a_restart(capsys: pytest.CaptureFixture[str]) -> None:
    calls: list[int] = []

    def work(failures: int, error: Exception) -> None:
        calls.append(1)
        if len(calls) <= failures:
            raise error

    with_restarts(2, lambda: work(2, WorkerLost("rank 1")))
    assert len(calls) == 3
    assert capsys.readouterr().out.count("cluster: rank 1: starting the workers again from the newest checkpoint") == 2
    calls.clear()
    with pytest.raises(WorkerLost, match=r"rank 1 .*run the same command again"):
        with_restarts(2, lambda: work(9, WorkerLost("rank 1")))
    assert len(calls) == 3
    calls.clear()
    with pytest.raises(ValueError, match="a mistake"):
        with_restarts(2, lambda: work(9, ValueError("a mistake")))
    assert len(calls) == 1


def test_seeds_differ_and_fit() -> None:
    seeds = {sample_seed(seed, key, number) for seed in (0, 1, 2**40) for key in range(5) for number in range(5)}
    assert len(seeds) == 75
    assert max(seeds) < 2**63
    assert sample_seed(3, 4, 5) == sample_seed(3, 4, 5)


def test_who_needs_workers(tmp_path: Path) -> None:
    assert not needs_workers(cfg(tmp_path))
    assert needs_workers(cfg(tmp_path, trainer__n_gpus_per_node=2))
    assert needs_workers(cfg(tmp_path, actor_rollout_ref__rollout__name="vllm"))
    assert not needs_workers(
        cfg(tmp_path, actor_rollout_ref__rollout__name="vllm", actor_rollout_ref__rollout__replay_from=tmp_path)
    )
    assert needs_workers(cfg(tmp_path, trainer__n_gpus_per_node=2, actor_rollout_ref__rollout__replay_from=tmp_path))


def test_missing_packages_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.setitem(sys.modules, "vllm", None)
    with (
        pytest.raises(ValueError, match="pip install ray"),
        open_cluster(cfg(tmp_path, actor_rollout_ref__rollout__name="vllm"), tmp_path, None),
    ):
        pass
    config: Any = replace  # never looked at
    with pytest.raises(ValueError, match=r"vLLM is not installed: pip install -e \.\[gpu\]"):
        VllmSampler("m", None, config, (), model_len=8, device="cpu")


def test_samplers_need_whole_tensor_parallel_groups(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"rollout\.n_gpus_per_node=3 is not divisible by rollout\.tensor_model_parallel_size=2"
    ):
        cfg(
            tmp_path,
            actor_rollout_ref__rollout__n_gpus_per_node=3,
            actor_rollout_ref__rollout__tensor_model_parallel_size=2,
        )
    with pytest.raises(
        ValueError, match=r"trainer\.n_gpus_per_node=1 is not divisible by rollout\.tensor_model_parallel_size=2"
    ):
        cfg(tmp_path, actor_rollout_ref__rollout__tensor_model_parallel_size=2)
