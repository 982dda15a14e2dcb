"""``python -m retriever_server.index bm25|dense --collection FILE [FILE ...] --output DIR``: builds an index folder (import-blocks: from vectors)."""

import argparse
import os
import time
from pathlib import Path
from typing import Any

from convsearch.cli import run


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="python -m retriever_server.index", description="Builds an index folder from a collection."
    )
    kinds = top.add_subparsers(dest="kind", required=True)
    bm25 = kinds.add_parser(
        "bm25", help="BM25 over English terms, as Lucene scores", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    bm25.add_argument(
        "--collection",
        type=Path,
        nargs="+",
        required=True,
        help='JSON lines of {"id", "contents"}, gzipped (.gz) or not',
    )
    bm25.add_argument(
        "--output", type=Path, required=True, help="the index folder; used as it is where it holds this index already"
    )
    bm25.add_argument(
        "--k1", type=float, default=0.9, help="term frequency saturation (0.9 for TopiOCQA, 0.82 for QReCC)"
    )
    bm25.add_argument("--b", type=float, default=0.4, help="length normalisation (0.4 for TopiOCQA, 0.68 for QReCC)")
    bm25.add_argument(
        "--processes", type=int, help="that analyse the text; one a core by default (the index does not depend on it)"
    )
    bm25.add_argument(
        "--overwrite", action="store_true", help="replace an index of another collection or other parameters"
    )
    bm25.add_argument("--quiet", action="store_true", help="no progress bars")
    add_dense(kinds)
    return top


def add_dense(kinds: Any) -> None:
    """The two subcommands that make dense indexes."""
    form = argparse.ArgumentDefaultsHelpFormatter
    dense = kinds.add_parser(
        "dense", help="vectors of an encoder; goes on where it was killed, runs under torchrun", formatter_class=form
    )
    dense.add_argument(
        "--collection",
        type=Path,
        nargs="+",
        required=True,
        help='JSON lines of {"id", "contents"}, gzipped (.gz) or not',
    )
    dense.add_argument(
        "--model_name_or_path",
        required=True,
        help="ANCE checkpoint or sentence-transformers model: a folder, or a name on the hub",
    )
    dense.add_argument(
        "--output", type=Path, required=True, help="the index folder; used as it is where it holds this index already"
    )
    dense.add_argument("--dtype", default="float32", choices=["float32", "float16"], help="of the vectors on disk")
    dense.add_argument("--block", type=int, default=50_000, help="passages a block, which is what a kill may lose")
    dense.add_argument("--max_length", type=int, default=384, help="tokens of a passage")
    dense.add_argument("--batch_size", type=int, default=64, help="passages a forward pass")
    dense.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    dense.add_argument(
        "--overwrite", action="store_true", help="replace an index of another collection, encoder or settings"
    )
    dense.add_argument("--quiet", action="store_true", help="no progress bars")
    blocks = kinds.add_parser(
        "import-blocks", help="the reference's pickled vectors; runs nothing that they may carry", formatter_class=form
    )
    blocks.add_argument(
        "--embeddings",
        type=Path,
        required=True,
        help="folder of passage__emb_p__data_obj_*.pb or doc_emb_cat.pkl, or one file",
    )
    blocks.add_argument(
        "--corpus_docid_path", type=Path, help="docids of one file's rows (pickle, .npy, or .txt with one a line)"
    )
    blocks.add_argument(
        "--collection",
        type=Path,
        nargs="+",
        default=[],
        help="the passages' texts, found by docid; without it there are none",
    )
    blocks.add_argument("--output", type=Path, required=True, help="the index folder")
    blocks.add_argument("--dtype", default="float32", choices=["float32", "float16"], help="of the vectors on disk")
    blocks.add_argument("--overwrite", action="store_true", help="replace an index folder")


def make_dense(args: argparse.Namespace) -> None:
    """Does what ``dense`` or ``import-blocks`` asks for, and prints what is there."""
    from retriever_server.dense import build as dense_build

    start, built = time.monotonic(), True
    if args.kind == "dense":
        settings = dense_build.Settings(
            args.dtype,
            args.block,
            args.max_length,
            args.batch_size,
            args.device,
            args.overwrite,
            progress=not args.quiet,
        )
        built = dense_build.build(args.collection, args.output, args.model_name_or_path, settings)
        if int(os.environ.get("RANK", "0")):
            return
    else:
        from retriever_server.dense.import_blocks import convert

        convert(args.embeddings, args.corpus_docid_path, args.collection, args.output, args.dtype, args.overwrite)
    found = dense_build.Manifest.read(args.output)
    what = (
        f"built in {time.monotonic() - start:.1f} s"
        if built
        else "is up to date (same collection, encoder and settings): reused"
    )
    print(f"{args.output}: {what}; {found.index_id}, {found.num_passages} passages x {found.dim} {found.dtype}")


def main() -> None:
    args = parser().parse_args()
    if args.kind != "bm25":
        make_dense(args)
        return
    from retriever_server.bm25.build import Manifest, build

    start = time.monotonic()
    built = build(args.collection, args.output, args.k1, args.b, args.overwrite, not args.quiet, args.processes)
    found = Manifest.read(args.output)
    what = (
        f"built in {time.monotonic() - start:.1f} s" if built else "is up to date (same collection, k1 and b): reused"
    )
    print(
        f"{args.output}: {what}; {found.index_id}, {found.num_passages} passages, {found.num_terms} terms, {found.num_postings} postings, "
        f"k1 {found.k1}, b {found.b}"
    )


if __name__ == "__main__":
    run(main)
