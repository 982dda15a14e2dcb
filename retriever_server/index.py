"""``python -m retriever_server.index bm25 --collection FILE [FILE ...] --output DIR``: builds an index folder."""

import argparse
import time
from pathlib import Path

from convsearch.cli import run


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="python -m retriever_server.index", description="Builds an index folder from a collection.")
    kinds = top.add_subparsers(dest="kind", required=True)
    bm25 = kinds.add_parser("bm25", help="BM25 over English terms (bm25s)", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    bm25.add_argument("--collection", type=Path, nargs="+", required=True, help='JSON lines of {"id", "contents"}, gzipped (.gz) or not')
    bm25.add_argument("--output", type=Path, required=True, help="the index folder; used as it is where it holds this index already")
    bm25.add_argument("--k1", type=float, default=0.9, help="term frequency saturation (0.9 for TopiOCQA, 0.82 for QReCC)")
    bm25.add_argument("--b", type=float, default=0.4, help="length normalisation (0.4 for TopiOCQA, 0.68 for QReCC)")
    bm25.add_argument("--overwrite", action="store_true", help="replace an index of another collection or other parameters")
    bm25.add_argument("--quiet", action="store_true", help="no progress bars")
    return top


def main() -> None:
    args = parser().parse_args()
    from retriever_server.bm25_build import Manifest, build

    start = time.monotonic()
    built = build(args.collection, args.output, args.k1, args.b, args.overwrite, progress=not args.quiet)
    found = Manifest.read(args.output)
    what = f"built in {time.monotonic() - start:.1f} s" if built else "is up to date (same collection, k1 and b): reused"
    print(
        f"{args.output}: {what}; {found.index_id}, {found.num_passages} passages, {found.num_terms} terms, {found.num_postings} postings, "
        f"k1 {found.k1}, b {found.b}"
    )


if __name__ == "__main__":
    run(main)
