"""How runs end before their last step, and the files that remain; test_collapse.py tests the guard's arithmetic.

1. A collapse is saved, named with its figures, and ends with status 3; with the limit raised the run goes on as if
nothing had happened.
2. SIGTERM is noted once; a second one ends the process.
3. The newest k checkpoints stay, and the best one by the validation; ``latest`` and ``best`` name them.
"""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import helpers_trainers as helpers
import pytest
import torch

from convsearch import grpo, sft
from convsearch.config import load_sft_config
from convsearch.runs import checkpoint
from convsearch.runs.checkpoint import CheckpointScore
from convsearch.runs.stopping import Stopping, Terminated, sweep
from convsearch.runs.tracking import read_metrics

SAME = ("step", "loss", "kl", "reward", "grad_norm", "response_tokens")


@pytest.mark.slow
def test_a_collapsed_run_is_saved_and_can_resume(
    form_llama: Path, toy_parquet: Path, toy_server: str, tmp_path: Path
) -> None:
    options = {"total_training_steps": 5, "trainer__save_freq": -1, "guard__window": 2}
    whole = helpers.grpo_overrides(form_llama, toy_parquet, tmp_path / "whole", toy_server, **options)
    assert helpers.call(grpo.main, whole)[0] == 0
    broken = helpers.grpo_overrides(form_llama, toy_parquet, tmp_path / "run", toy_server, **options)
    status, output = helpers.call(grpo.main, [*broken, "guard.min_reward=2.5"])
    assert status == 3, output
    assert "stopped: reward is " in output
    assert "over steps 0 - 1, below guard.min_reward=2.5. Saved as " in output
    assert [step for step, _ in checkpoint.checkpoints(tmp_path / "run")] == [2]
    assert not (tmp_path / "run" / "model").exists()
    status, output = helpers.call(grpo.main, [*broken, "guard.min_reward=2.5"])  # as stubborn as before
    assert status == 3
    assert "over steps 1 - 2" in output
    status, output = helpers.call(grpo.main, broken)
    assert status == 0, output
    left, right = (
        [{name: line[name] for name in SAME} for line in read_metrics(tmp_path / name)] for name in ("run", "whole")
    )
    assert left == right


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pairs = [
        (f"q{number}", helpers.question(*pair), helpers.answer(*pair)) for number, pair in enumerate(helpers.GOLDS)
    ]
    return helpers.write_parquet(tmp_path_factory.mktemp("rows") / "train.parquet", helpers.sft_rows(pairs))


def test_nan_weights_end_the_run(tiny_llama: Path, rows: Path, tmp_path: Path) -> None:
    arguments = helpers.sft_overrides(
        tiny_llama,
        rows,
        tmp_path,
        total_training_steps=9,
        optim__lr=1e30,
        trainer__max_skipped_steps=3,
        trainer__save_freq=99,
    )
    status, output = helpers.call(sft.main, arguments)
    assert status == 3, output
    assert "not finite in 3 steps in a row, up to step 3 (trainer.max_skipped_steps=3)" in output
    skipped = [line["skipped"] for line in read_metrics(tmp_path)]
    assert skipped[-3:] == [1.0] * 3
    assert len(skipped) < 9
    assert [step for step, _ in checkpoint.checkpoints(tmp_path)] == [len(skipped)]


def test_a_repeated_sigterm_counts_once() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with Terminated() as terminated:
        assert not terminated.on_any_rank()
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)  # the second of a launcher that passes on what this process got, too
        assert terminated.on_any_rank()
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.slow
def test_a_second_sigterm_ends_the_process() -> None:
    code = """
import os, signal, time
from convsearch.runs.stopping import Terminated
Terminated.SAME_S = 0.1
with Terminated() as terminated:
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.2)
    print("noted", terminated.received, flush=True)
    os.kill(os.getpid(), signal.SIGTERM)
    print("never here")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=helpers.environment())
    assert done.returncode == -signal.SIGTERM, done.stderr
    assert done.stdout == "noted True\n"


def stopping(run_dir: Path, saved: list[tuple[int, float | None, bool]], steps: range, **trainer: Any) -> Stopping:
    cfg = load_sft_config(
        [
            "cluster=cpu",
            "data.train_files=a",
            "model.partial_pretrain=m",
            *(f"trainer.{k}={v}" for k, v in trainer.items()),
        ]
    )
    return Stopping(run_dir, cfg.trainer, steps, 3, lambda *arguments: saved.append(arguments))


def test_checkpoints_are_saved_when_due_and_when_better(tmp_path: Path) -> None:
    saved: list[tuple[int, float | None, bool]] = []
    with stopping(tmp_path, saved, range(8), best_metric="val_loss", best_mode="min") as line:
        for step, loss in enumerate([None, 3.0, 2.0, None, 2.5, 2.5, 1.0, 4.0]):
            line.after_step(step, {} if loss is None else {"val_loss": loss})
    assert saved == [(2, 3.0, False), (3, 2.0, False), (6, 2.5, False), (7, 1.0, False), (8, 4.0, True)]


class Tiny:
    """A policy of one weight, for what the checkpoints do around it."""

    def __init__(self, value: float) -> None:
        self.value, self.causal_lm = value, Describes()

    def weights(self) -> dict[str, torch.Tensor]:
        return {"weight": torch.tensor([self.value])}

    def optimizer_state(self) -> dict[str, torch.Tensor]:
        return {}


class Describes:
    """Stands for a model's configuration and for a tokenizer."""

    generation_config = None

    @property
    def config(self) -> "Describes":
        return self

    def save_pretrained(self, folder: Path) -> None:
        (folder / "config.json").write_text("{}")


@pytest.mark.parametrize(("mode", "kept"), [("max", [2, 5, 6]), ("min", [3, 5, 6]), (None, [5, 6])])
def test_the_best_and_the_newest_checkpoints_are_kept(mode: Any, kept: list[int], tmp_path: Path) -> None:
    values = [1.0, 3.0, 0.5, 2.0, None, 1.5]
    for step, value in enumerate(values, start=1):
        score = CheckpointScore("val_reward", mode, value) if mode and value is not None else None
        checkpoint.save(tmp_path, step, Tiny(step), Describes(), keep=2, score=score)
        assert (tmp_path / "latest").read_text() == f"global_step_{step}\n"
    assert [step for step, _ in checkpoint.checkpoints(tmp_path)] == kept
    if mode:
        assert (tmp_path / "best").read_text() == f"global_step_{kept[0]}\n"
        best = CheckpointScore("val_reward", mode, values[kept[0] - 1])  # type: ignore[arg-type]
        assert checkpoint.best(tmp_path, "val_reward", mode) == (tmp_path / f"global_step_{kept[0]}", best)
        assert checkpoint.best(tmp_path, "val_mrr", mode) is None
    assert (tmp_path / "best").exists() == bool(mode)
    assert not list(tmp_path.glob(".tmp*"))


def test_half_written_files_are_removed(tmp_path: Path) -> None:
    for name in (
        "rollouts/000003.parquet.tmp-77",
        "rollouts/000002.parquet",
        "config.json.tmp-77",
        ".tmp-global_step_4/model.safetensors",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    sweep(tmp_path)
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()] == [
        "rollouts/000002.parquet"
    ]
