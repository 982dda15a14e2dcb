"""Building a BM25 index: this engine against Lucene (Anserini's IndexCollection), on the same files.

``python -m benchmarks.index_build --passages 1000000``. We use as many processes as Lucene has threads. The two take
turns; Lucene stores the text, as we do, and its merge to one segment counts. The last line is
``ratio=… bytes_a_posting=… peak_mib=… peers=lucene``: Lucene's median time over ours, and the memory of our largest
process, with its mapped files.
"""

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

from benchmarks import add_source, add_threads, add_work, timed
from benchmarks.collection import kept_collection
from convsearch.cli import command_parser, run
from convsearch.files import line_blocks

ROOT = Path(__file__).resolve().parents[1]
BUILD = "import sys; from retriever_server.{} import build; build(sys.argv[2:], sys.argv[1], {})"


def build_parser() -> argparse.ArgumentParser:
    parser = command_parser("benchmarks.index_build", __doc__)
    parser.add_argument("--passages", type=int, default=100_000, help="collection size")
    parser.add_argument("--rounds", type=int, default=3, help="builds of each")
    add_threads(parser, "our processes, Lucene's threads, and files")
    add_source(parser)
    add_work(parser)
    return parser


def parts(collection: Path, count: int) -> list[Path]:
    """The collection in ``count`` files of about the same size."""
    files = [collection.with_name(f"part{number}of{count}.jsonl") for number in range(count)]
    if not all(file.exists() for file in files):
        size = collection.stat().st_size // count + 1
        for file, (_, block) in zip(files, line_blocks(collection, size), strict=True):
            file.write_bytes(block)
    return files


def seconds(code: str, output: Path, files: list[Path]) -> float:
    """Seconds of a build in a process of its own, with its start."""
    shutil.rmtree(output, ignore_errors=True)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / ".venv" / "lucene")])}
    command = [sys.executable, "-c", code, str(output), *map(str, files)]
    return timed(lambda: subprocess.run(command, env=environment, check=True))[1]


def main() -> None:
    args = build_parser().parse_args()
    folder = kept_collection(args.work, args.passages, 100, args.source)
    files, ours, theirs = parts(folder / "collection.jsonl", args.threads), [], []
    ours_code = BUILD.format("bm25.build", f"0.9, 0.4, progress=False, processes={args.threads}")
    lucene_code, peak_mib = BUILD.format("lucene", f"threads={args.threads}"), 0.0
    for _ in range(args.rounds):
        ours.append(seconds(ours_code, folder / "ours", files))
        # read before Lucene has been a child
        peak_mib = peak_mib or resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
        theirs.append(seconds(lucene_code, folder / "theirs", files))
        print(f"ours {ours[-1]:.1f} s, Lucene {theirs[-1]:.1f} s", flush=True)
    postings = json.loads((folder / "ours" / "manifest.json").read_text())["num_postings"]
    size = sum((folder / "ours" / f"postings_{name}.npy").stat().st_size for name in ("docs", "codes"))
    on_disk = f"ours {du(folder / 'ours'):.0f} MiB on disk, Lucene's {du(folder / 'theirs'):.0f} MiB"
    print(f"{args.passages} passages, {postings} postings; {on_disk}")
    ratio = statistics.median(theirs) / statistics.median(ours)
    print(f"ratio={ratio:.2f} bytes_a_posting={size / postings:.2f} peak_mib={peak_mib:.0f} peers=lucene")


def du(folder: Path) -> float:
    return sum(path.stat().st_size for path in folder.iterdir()) / 2**20


if __name__ == "__main__":
    run(main)
