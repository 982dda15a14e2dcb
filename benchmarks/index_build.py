"""Building a BM25 index: this engine against Lucene (Anserini's IndexCollection), on the same files and as many processes as it has threads.

``python -m benchmarks.index_build --passages 1000000``. The two take turns; Lucene stores the text, as we do, and its merge to one segment counts.
The last line is ``ratio=… bytes_a_posting=… peak_mib=… peers=lucene``: Lucene's median time over ours, and the memory of our largest process, with the
files that it has mapped.
"""

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.collection import generate
from convsearch.cli import run
from convsearch.files import line_blocks

ROOT = Path(__file__).resolve().parents[1]
OURS = "import sys; from retriever_server.bm25.build import build; build(sys.argv[2:], sys.argv[1], 0.9, 0.4, progress=False, processes={})"
LUCENE = "import sys; from retriever_server.lucene import build; build(sys.argv[2:], sys.argv[1], threads={})"


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="python -m benchmarks.index_build",
        description=__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    top.add_argument("--passages", type=int, default=100_000, help="collection size")
    top.add_argument("--rounds", type=int, default=3, help="builds of each")
    top.add_argument(
        "--threads", type=int, default=len(os.sched_getaffinity(0)), help="our processes, Lucene's threads, and files"
    )
    top.add_argument(
        "--source",
        type=Path,
        help="collection.jsonl whose sentences make the passages; the embedded summaries by default",
    )
    top.add_argument(
        "--work",
        type=Path,
        default=Path("data/benchmarks"),
        help="where the collection is kept and indexes come and go",
    )
    return top


def parts(collection: Path, count: int) -> list[Path]:
    """The collection in ``count`` files of about the same size."""
    files = [collection.with_name(f"part{number}of{count}.jsonl") for number in range(count)]
    if not all(file.exists() for file in files):
        size = collection.stat().st_size // count + 1
        for file, (_, block) in zip(files, line_blocks(collection, size), strict=True):
            file.write_bytes(block)
    return files


def seconds(code: str, output: Path, files: list[Path]) -> float:
    """Of a build in a process of its own, its start included."""
    shutil.rmtree(output, ignore_errors=True)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / ".venv" / "lucene")])}
    start = time.monotonic()
    subprocess.run([sys.executable, "-c", code, str(output), *map(str, files)], env=environment, check=True)
    return time.monotonic() - start


def main() -> None:
    args = parser().parse_args()
    folder = args.work / f"{args.passages}_100_{args.source.stem if args.source else 'summaries'}"
    if not (folder / "queries.jsonl").exists():
        generate(folder, args.passages, 100, args.source, seed=1)
    files, ours, theirs = parts(folder / "collection.jsonl", args.threads), [], []
    peak_mib = 0.0
    for _ in range(args.rounds):
        ours.append(seconds(OURS.format(args.threads), folder / "ours", files))
        peak_mib = (
            peak_mib or resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
        )  # before Lucene has been a child
        theirs.append(seconds(LUCENE.format(args.threads), folder / "theirs", files))
        print(f"ours {ours[-1]:.1f} s, Lucene {theirs[-1]:.1f} s", flush=True)
    postings = json.loads((folder / "ours" / "manifest.json").read_text())["num_postings"]
    size = sum((folder / "ours" / f"postings_{name}.npy").stat().st_size for name in ("docs", "codes"))
    print(
        f"{args.passages} passages, {postings} postings; ours {du(folder / 'ours'):.0f} MiB on disk, Lucene's {du(folder / 'theirs'):.0f} MiB"
    )
    ratio = statistics.median(theirs) / statistics.median(ours)
    print(f"ratio={ratio:.2f} bytes_a_posting={size / postings:.2f} peak_mib={peak_mib:.0f} peers=lucene")


def du(folder: Path) -> float:
    return sum(path.stat().st_size for path in folder.iterdir()) / 2**20


if __name__ == "__main__":
    run(main)
