"""A run whose weights or gradients are not finite ends in a sentence, never in a model."""

import math
import shutil
from pathlib import Path

import helpers_trainers as helpers
import pytest
import torch
from safetensors.torch import load_file, save_file

from convsearch import checksums, grpo, infer, sft
from convsearch.runs import checkpoint
from convsearch.runs.collapse import CollapseGuard
from convsearch.runs.tracking import read_metrics

COMPACT = ["--prompt_style", "compact", "--device", "cpu", "--max_tokens", 20]


@pytest.fixture(scope="module")
def nan_model(form_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = shutil.copytree(form_llama, tmp_path_factory.mktemp("nan") / "model")
    (folder / checksums.NAME).unlink()
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.down_proj.weight"].fill_(math.nan)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pairs = [(f"q{n}", helpers.question(*pair), helpers.answer(*pair)) for n, pair in enumerate(helpers.GOLDS)]
    return helpers.write_parquet(tmp_path_factory.mktemp("rows") / "train.parquet", helpers.sft_rows(pairs))


def test_a_nan_model_is_refused_by_every_command(
    nan_model: Path, rows: Path, toy_parquet: Path, toy_server: str, tmp_path: Path
) -> None:
    dev = helpers.write_jsonl(tmp_path / "dev.json", helpers.conversation_rows(list(helpers.GOLDS)))
    command = ["--model_name_or_path", nan_model, "--input_path", dev, "--output_path", tmp_path / "out.jsonl"]
    error = helpers.one_sentence(*helpers.call(infer.main, [*command, *COMPACT]))
    assert "the model's logits are not finite" in error
    assert helpers.read_jsonl(tmp_path / "out.jsonl") == []
    arguments = helpers.grpo_overrides(nan_model, toy_parquet, tmp_path / "grpo", toy_server)
    assert "the model's logits are not finite" in helpers.one_sentence(*helpers.call(grpo.main, arguments))
    status, output = helpers.call(sft.main, helpers.sft_overrides(nan_model, rows, tmp_path / "sft"))
    assert status == 3, output
    assert "the weights are not finite after step 0, which is not saved; there is no checkpoint yet" in output
    for name in ("grpo", "sft"):
        assert not (tmp_path / name / "model").exists()
        assert checkpoint.checkpoints(tmp_path / name) == []


def test_an_absurd_learning_rate_is_no_success(
    tiny_llama: Path, form_llama: Path, rows: Path, toy_parquet: Path, toy_server: str, tmp_path: Path
) -> None:
    """Few steps: too few for ``trainer.max_skipped_steps``."""
    arguments = helpers.sft_overrides(tiny_llama, rows, tmp_path / "sft", optim__lr=1e30, total_training_steps=3)
    status, output = helpers.call(sft.main, arguments)
    assert status == 3, output
    assert "stopped: the gradient was not finite in 2 steps in a row, up to step 2" in output
    assert "to export it all the same run the same command again" in output
    assert [line["skipped"] for line in read_metrics(tmp_path / "sft")] == [0.0, 1.0, 1.0]
    assert not (tmp_path / "sft" / "model").exists()
    options = {"actor_rollout_ref__actor__optim__lr": 1e30, "total_training_steps": 3}
    arguments = helpers.grpo_overrides(form_llama, toy_parquet, tmp_path / "grpo", toy_server, **options)
    status, output = helpers.call(grpo.main, arguments)
    assert status in (2, 3), output
    assert "not finite" in output
    assert not (tmp_path / "grpo" / "model").exists()


def test_weights_that_overflow_are_not_saved(tiny_llama: Path, rows: Path, tmp_path: Path) -> None:
    arguments = helpers.sft_overrides(tiny_llama, rows, tmp_path, optim__lr=1e39, trainer__save_freq=1)
    status, output = helpers.call(sft.main, arguments)
    assert status == 3, output
    assert "the weights are not finite after step " in output
    assert checkpoint.checkpoints(tmp_path) == []


def test_the_guard_judges_the_first_and_the_last_step() -> None:
    bad, good = {"skipped": 1.0}, {"skipped": 0.0}
    guard = CollapseGuard(None, max_skipped=10)
    assert [guard.check(step, bad) is None for step in range(3)] == [True, True, False]
    guard = CollapseGuard(None, max_skipped=10)
    assert guard.check(0, good) is None
    assert [guard.check(step, bad) is None for step in range(1, 11)] == [True] * 9 + [False]
    guard = CollapseGuard(None, max_skipped=10, history=[{"step": 0, "skipped": 0.0}, {"step": 1, "skipped": 1.0}])
    assert guard.check(2, bad) is None
    assert "in 3 steps in a row, up to step 3" in (guard.check(3, bad, last=True) or "")
    assert CollapseGuard(None, max_skipped=10).check(0, good, last=True) is None


def test_a_sound_step_says_so(tiny_llama: Path, rows: Path, tmp_path: Path) -> None:
    assert helpers.call(sft.main, helpers.sft_overrides(tiny_llama, rows, tmp_path))[0] == 0
    assert {line["broken"] for line in read_metrics(tmp_path)} == {0.0}
    assert torch.isfinite(load_file(tmp_path / "model" / "model.safetensors")["model.norm.weight"]).all()
