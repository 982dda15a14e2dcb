"""Shows that two commits give the same results: the small quickstart of both, side by side, compared file by file.

    .venv/bin/python tests/same_results.py COMMIT [OTHER]    clones both (OTHER: HEAD), runs, compares; about 15 minutes
    .venv/bin/python tests/same_results.py --folders A B     compares two finished runs of scripts/quickstart.sh

Compared: distillation (samples with ranks, yield, SFT rows), metrics of each step but its times, all rollouts,
rewrites, runs, the table and the trained weights. It ends with status 1 if anything differs. For a change that must not
change results.
"""

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

ROOT = Path(__file__).resolve().parents[1]
RUN = Path("outputs/demo_smollm2_quick")
LINES = (
    "distill/samples.jsonl",
    "zero_shot.jsonl",
    "sft.jsonl",
    "grpo.jsonl",
    "sft/metrics.jsonl",
    "grpo/metrics.jsonl",
)
BYTES = ("test.json", "test.trec", "sft/model/model.safetensors", "grpo/model/model.safetensors")
TIMED = ("_s", "tokens_per_s", "mfu")  # the ends of names of figures that no two runs share


def untimed(value: Any) -> Any:
    """The value without the figures that depend on the clock."""
    if isinstance(value, dict):
        return {name: untimed(each) for name, each in value.items() if not name.endswith(TIMED)}
    return [untimed(each) for each in value] if isinstance(value, list) else value


def contents(run: Path) -> Iterator[tuple[str, Any]]:
    """(name, what is compared) of each file of a run."""
    for name in LINES:
        yield name, [untimed(json.loads(line)) for line in (run / name).read_text(encoding="utf-8").splitlines()]
    for name in ("distill/yield.json", "results.json"):
        yield name, untimed(json.loads((run / name).read_text(encoding="utf-8")))
    for path in sorted([run / "distill" / "sft.parquet", *(run / "grpo" / "rollouts").glob("*.parquet")]):
        yield path.relative_to(run).as_posix(), pq.read_table(path).to_pylist()
    for path in sorted(run.glob("*.trec")):
        yield path.name, path.read_text(encoding="utf-8")
    for name in BYTES:
        yield name, hashlib.sha256((run / name).read_bytes()).hexdigest()


def compare(before: Path, after: Path) -> int:
    """Prints a line per file; returns how many differ."""
    left, right = dict(contents(before)), dict(contents(after))
    different = 0
    for name in sorted(left.keys() | right.keys()):
        same = left.get(name) == right.get(name)
        different += not same
        number = f"{len(left[name]):,} rows" if isinstance(left.get(name), list) else ""
        print(f"{'same' if same else 'DIFFERENT':<10} {name} {number}")
    print(f"{len(left.keys() | right.keys())} files compared, {different} different")
    return different


def run_both(commits: list[str], folder: Path) -> list[Path]:
    """A clone of each commit, with an environment of its own, in which the small quickstart runs; both at once."""
    jobs = []
    for number, commit in enumerate(commits):
        clone = folder / str(number)
        subprocess.run(["git", "clone", "--quiet", ROOT, clone], check=True)
        subprocess.run(["git", "checkout", "--quiet", "--detach", commit], check=True, cwd=clone)
        command = "QUICK=1 OMP_NUM_THREADS=1 bash scripts/quickstart.sh > run.log 2>&1"
        jobs.append((clone, subprocess.Popen(["bash", "-c", command], cwd=clone)))
    for clone, job in jobs:
        if job.wait():
            raise SystemExit(f"the quickstart failed, see {clone / 'run.log'}")
    return [clone / RUN for clone, _ in jobs]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commits", nargs="*", help="one or two commits")
    parser.add_argument("--folders", nargs=2, type=Path, metavar=("A", "B"), help="two finished runs")
    args = parser.parse_args()
    if args.folders:
        sys.exit(compare(*args.folders) > 0)
    if len(args.commits) not in (1, 2):
        parser.error("name one or two commits, or --folders A B")
    resolved = [
        subprocess.run(["git", "rev-parse", name], check=True, capture_output=True, text=True, cwd=ROOT).stdout.strip()
        for name in [*args.commits, "HEAD"][:2]
    ]
    with tempfile.TemporaryDirectory() as folder:
        sys.exit(compare(*run_both(resolved, Path(folder))) > 0)


if __name__ == "__main__":
    main()
