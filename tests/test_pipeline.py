"""The runner on the demo, with the real model: all stages, on the path of the paper's experiments, but with one CPU.

As for the paper, two processes share distill, SFT and inference, and a server that the runner starts gives the ranks.
SIGTERM ends the run during GRPO; the same command then keeps what is done, resumes and ends with the table.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from eval.systems import SYSTEMS

ROOT = Path(__file__).resolve().parents[1]
ROWS = ("raw", "previous", "sft", "grpo", "grpo_fused", "written")


def start(out: Path) -> "subprocess.Popen[str]":
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    variables = {"QUICK": "1", "OUT": str(out), "GPUS": "2", "PORT": port, "PYTHON": sys.executable}
    variables["GRPO"] = "data.val_max_samples=2 trainer.val_before_train=true"
    command = ["bash", "scripts/run.sh", "demo_smollm2", "--device", "cpu", "retriever=bm25"]
    pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    env = os.environ | variables | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, cwd=ROOT, env=env, **pipe)  # type: ignore[call-overload,no-any-return]


def finish(process: "subprocess.Popen[str]", status: int = 0) -> str:
    output, _ = process.communicate(timeout=900)
    assert process.returncode == status, output[-4000:]
    return output


def steps(out: Path) -> list[int]:
    path = out / "grpo" / "metrics.jsonl"
    return [json.loads(line)["step"] for line in path.read_text().splitlines()] if path.exists() else []


@pytest.mark.slow
def test_runner_stops_and_resumes_with_every_stage(tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = start(out)
    deadline = time.monotonic() + 900
    while steps(out) != [-1]:  # the validation before the first step
        assert time.monotonic() < deadline
        assert process.poll() is None, finish(process)
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    stopped = finish(process, status=143)
    assert "== infer" not in stopped
    assert steps(out) == [-1, 0]
    before = {path: path.stat().st_mtime_ns for path in (out / "sft").rglob("*.safetensors")}
    assert before
    shares = [(out / "distill.parts" / f"{part}.json").read_text() for part in ("00", "01")]
    assert "".join(shares) == (ROOT / "data/demo/train.json").read_text()

    finished = finish(start(out))
    assert finished.count("are there already and are kept") == 2  # the samples of two processes
    assert finished.count("steps are done already") == 1  # SFT
    assert {path: path.stat().st_mtime_ns for path in before} == before
    results = json.loads((out / "results.json").read_text())
    assert finished.strip().splitlines()[-1] == str(out / "results.json")
    [rule] = [name for name in results if name.startswith("best constant rule (")]
    assert [name for name in results if name != rule] == [SYSTEMS[stem] for stem in ROWS]
    for row in results.values():
        assert row["queries"] == 16
        assert all(0 <= row[measure] <= 1 for measure in ("MRR", "NDCG@3", "R@10"))
    assert (out / "curves.png").stat().st_size > 10_000
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert steps(out) == [-1, 0, 1]
    rewrites = [json.loads(line)["qid"] for line in (out / "grpo.jsonl").read_text().splitlines()]
    assert rewrites == [json.loads(line)["qid"] for line in (out / "test.json").read_text().splitlines()]
