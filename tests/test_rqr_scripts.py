"""scripts/rqr.sh: the dry run checks every command and starts none, and each size has its own experiment."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def rqr(*arguments: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    known = {"PATH": os.environ["PATH"], "PYTHON": sys.executable, "PYTHONPATH": str(ROOT)} | environment
    command = ["bash", "scripts/rqr.sh", *arguments]
    return subprocess.run(command, cwd=ROOT, env=known, capture_output=True, text=True, timeout=120)


def modules(*arguments: str, **environment: str) -> list[str]:
    """The module and arguments of each command of the plan."""
    done = rqr(*arguments, "--dry-run", PLAN="commands", **environment)
    assert done.returncode == 0, done.stderr
    return [line.partition(" -m ")[2] for line in done.stdout.splitlines()]


@pytest.mark.parametrize("size", ["1.5b", "7b"])
def test_published_sizes_train_and_search_bright(size: str) -> None:
    commands = modules(size, GPUS="1")
    assert [command.split()[0] for command in commands[:3]] == [
        "data_preprocess.stackexchange",
        "retriever_server.index",
        "convsearch.grpo",
    ]
    assert f"experiment=rqr_qwen2.5-{size}" in commands[2]
    infer = [command for command in commands if command.startswith("convsearch.infer")]
    assert len(infer) == 12
    assert all("--task rqr --dtype fp32" in command for command in infer)
    assert commands[-2].startswith("eval.bright --task all")
    assert commands[-1].startswith("convsearch.plots")


@pytest.mark.slow
@pytest.mark.parametrize("size", ["1.5b", "7b", "smollm2"])
def test_dry_run_checks_the_commands_and_starts_none(size: str) -> None:
    before = sorted((ROOT / "outputs").glob("rqr*"))
    done = rqr(size, "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "stages are valid; nothing was started" in done.stdout
    assert sorted((ROOT / "outputs").glob("rqr*")) == before


def test_reward_and_task_of_the_small_size() -> None:
    [grpo] = modules("smollm2", "grpo")
    assert grpo.startswith("convsearch.grpo experiment=rqr_smollm2 ")
    [grpo] = modules("smollm2", "grpo", REWARD="mixed")
    assert "reward=mixed" in grpo
    assert "reward_model.reward.form=text" in grpo
    assert "default_local_dir=outputs/rqr_smollm2_mixed/grpo" in grpo
    [grpo] = modules("smollm2", "grpo", TASK="demo", SEED="2")
    assert "experiment=demo_mixed" in grpo
    assert "default_local_dir=outputs/demo_mixed_seed2/grpo" in grpo


def test_unknown_size_is_refused() -> None:
    done = rqr("3b")
    assert done.returncode == 2
    assert "configs/experiment/rqr_qwen2.5-3b.yaml does not exist" in done.stderr
