"""The whole job on the real model and the real text: every stage of the quickstart in its smoke form, and once more, reusing what is done."""

import json
import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROWS = ["raw question", "previous turn + question", "all history", "base model, zero-shot", "after SFT", "after GRPO"]


@pytest.mark.slow
def test_the_quickstart_runs_through_every_stage_and_reuses_them_all(tmp_path: Path) -> None:
    env = {**os.environ, "QUICK": "1", "OUT": str(tmp_path / "out"), "OMP_NUM_THREADS": "2"}

    def job() -> str:
        done = subprocess.run(
            ["bash", "scripts/job_cpu.sh", "demo_smollm2"],
            cwd=ROOT,
            env=env,
            capture_output=True,
            text=True,
            timeout=900,
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        return done.stdout

    first = job()
    named = Path(first.strip().splitlines()[-1])
    assert named == tmp_path / "out" / "results.json"
    results = json.loads(named.read_text())
    assert list(results) == ROWS
    assert all(
        0 <= row[measure] <= 1 and row["queries"] == 16
        for row in results.values()
        for measure in ("MRR", "NDCG@3", "R@10")
    )
    assert (tmp_path / "out" / "curves.png").stat().st_size > 10_000
    assert (tmp_path / "out" / "curves.png").read_bytes().startswith(b"\x89PNG")
    steps = [
        json.loads(line)["step"] for line in (tmp_path / "out" / "grpo" / "metrics.jsonl").read_text().splitlines()
    ]
    assert steps == [-1, 0, 1]
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.safetensors")}
    assert before

    second = job()
    assert second.count("are there already and are kept") == 4  # three files of rewrites and the distillation's samples
    assert second.count("steps are done already") == 2
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.safetensors")} == before
    assert json.loads(named.read_text()) == results


def test_an_unknown_experiment_is_one_sentence() -> None:
    done = subprocess.run(["bash", "scripts/job_cpu.sh", "nonsense"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "error: nonsense is not one of demo_smollm2, mtrag_smollm2, topiocqa_proxy_smollm2\n"
