"""2.5 million run lines within 2 GiB, in good form and in bad, and the benchmark's last line."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
QUERIES, DEPTH = 25_000, 100


def peak_bytes(*command: str) -> tuple[int, str]:
    """Peak resident memory of a process that must end well, and its output."""
    with subprocess.Popen([sys.executable, *command], cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        output = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    return usage.ru_maxrss * 1024, output


@pytest.mark.slow
@pytest.mark.parametrize("form", ["good", "tabs, unsorted, tied"])
def test_memory(form: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    order = rng.permutation(QUERIES * DEPTH) if form != "good" else np.arange(QUERIES * DEPTH)
    with (tmp_path / "run").open("w") as run:
        for row in order.tolist():
            query, rank = divmod(row, DEPTH)
            if form == "good":
                run.write(
                    f"topiocqa-dev_{query}_1 Q0 wikipedia-{query * 7 + rank * 13:010} {rank + 1} {100 - rank}.5 bm25\n"
                )
            else:
                run.write(
                    f"topiocqa-dev_{query}_1\tQ0\twikipedia-{query * 7 + rank * 13:010}\t{rank + 1}\t"
                    f"{(100 - rank) // 4}\tbm25\r\n"
                )
    with (tmp_path / "qrels").open("w") as qrels:
        for query in range(QUERIES):
            qrels.write(f"topiocqa-dev_{query}_1 0 wikipedia-{query * 7 + (query % 120) * 13:010} 1\n")
    peak, output = peak_bytes(
        "-m", "eval.metrics", "--run", str(tmp_path / "run"), "--qrels", str(tmp_path / "qrels"), "--json"
    )
    assert '"R@100": 0.83' in output
    assert peak < 2 << 30, f"{peak / 2**30:.2f} GiB"


@pytest.mark.slow
def test_benchmark_prints_its_ratio() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.metrics", "--queries", "2000", "--repeats", "2"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    match = re.fullmatch(r"ratio=(\d+\.\d) equal=True", done.stdout.splitlines()[-1])
    assert match is not None
    assert float(match[1]) > 2
