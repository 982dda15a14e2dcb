"""scripts/rqr_gpu.sh: its dry run shows every command, starts none, and takes nothing that it does not know."""

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def bash(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name not in ("STACKEXCHANGE", "BRIGHT")}
    return subprocess.run(
        ["bash", "scripts/rqr_gpu.sh", *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.slow
@pytest.mark.skipif(not (ROOT / ".venv" / "bin" / "python").exists(), reason="the scripts run .venv/bin/python")
@pytest.mark.parametrize("size", ["1.5b", "7b"])
def test_a_dry_run_shows_the_commands_and_starts_none(size: str) -> None:
    done = bash(size, "--dry-run")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert f"actor_rollout_ref.model.path=Qwen/Qwen2.5-{size.upper()}-Instruct" in lines
    commands = [line.partition(" -m ")[2] for line in lines if line.startswith("== ")]
    assert [command.split()[0] for command in commands[:4]] == [
        "data_preprocess.stackexchange",
        "retriever_server.index",
        "convsearch.grpo",
        "convsearch.plots",
    ]
    assert sum(command.startswith("convsearch.infer --task rqr") for command in commands) == 12
    assert commands[-1].startswith("eval.bright --task all")
    assert not (ROOT / "outputs" / f"rqr_qwen2.5-{size}").exists()


def test_unknown_words_and_missing_data_are_refused() -> None:
    unknown, missing = bash("3b"), bash("7b")
    assert (unknown.returncode, unknown.stderr) == (2, "error: 3b is neither 1.5b, 7b nor --dry-run\n")
    assert missing.returncode != 0
    assert "set STACKEXCHANGE to the folder" in missing.stderr
