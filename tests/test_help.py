"""Every command line answers ``--help`` in about a second, because it imports what is heavy after the arguments are
parsed."""

import resource
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("convsearch", "retriever_server", "eval", "data_preprocess")
LIMIT_S = 1.0  # of processor time, which other processes on the machine do not stretch as they do the clock
HEAVY = {
    "torch",
    "transformers",
    "accelerate",
    "scipy",
    "pandas",
    "bm25s",
    "numba",
    "fastapi",
    "uvicorn",
    "matplotlib",
    "pyarrow",
}


def commands() -> list[str]:
    """Every module of the packages that can be run."""
    files = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
    runnable = [
        path
        for path in files
        if '__name__ == "__main__"' in path.read_text(encoding="utf-8") or path.name == "__main__.py"
    ]
    return [".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__main__") for path in runnable]


def test_no_command_is_missing() -> None:
    stages = {f"convsearch.{name}" for name in ("sft", "grpo", "infer", "distill")}
    servers = {"retriever_server", "retriever_server.index"}
    measures = {"eval.bm25", "eval.metrics"}
    conversions = {f"data_preprocess.{name}" for name in ("topiocqa", "qrecc", "mtrag", "demo", "download")}
    assert stages | servers | measures | conversions <= set(commands())


def processor_s() -> float:
    """Seconds that ended child processes have computed, in user and system mode."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


@pytest.mark.slow
@pytest.mark.parametrize("module", commands())
def test_help(module: str) -> None:
    best_s = float("inf")
    for _ in range(3):
        before_s = processor_s()
        command = [sys.executable, "-X", "importtime", "-m", module, "--help"]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)
        best_s = min(best_s, processor_s() - before_s)
        if best_s < LIMIT_S:
            break
    assert done.returncode == 0, done.stderr[-500:]
    assert f"usage: python -m {module.removesuffix('.server')} " in done.stdout
    loaded = {
        line.rpartition("|")[2].strip().partition(".")[0]
        for line in done.stderr.splitlines()
        if line.startswith("import time:")
    }
    assert {"sys", "convsearch"} & loaded, "the list of imports was not read"
    assert loaded & HEAVY == set()
    assert best_s < LIMIT_S, f"--help of {module} took {best_s:.1f} s"
