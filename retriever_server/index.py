"""``python -m retriever_server.index bm25|dense|import-blocks ... --output DIR``: builds an index folder.

``verify --output DIR`` reads a folder again and compares every byte with the checksums of its build.
"""

import argparse
import os
import time
from pathlib import Path
from typing import Any

from convsearch.cli import HelpFormatter, command_parser, run


def build_parser() -> argparse.ArgumentParser:
    top = command_parser("retriever_server.index", "Builds an index folder from a collection.")
    kinds = top.add_subparsers(dest="kind", required=True)
    for kind, about, add_flags in (
        ("bm25", "BM25 over English terms, scored as in Lucene", _add_bm25),
        ("dense", "vectors of an encoder; resumes after a kill, runs under torchrun", _add_dense),
        ("import-blocks", "the reference's pickled vectors, read without running their code", _add_import_blocks),
    ):
        parser = kinds.add_parser(kind, help=about, formatter_class=HelpFormatter)
        output = "the index folder; kept if it already holds this index"
        parser.add_argument("--output", type=Path, required=True, help=output)
        parser.add_argument("--overwrite", action="store_true", help="replace an index folder that differs")
        add_flags(parser)
    about = "compare all files of an index folder with their checksums; opening it compares the smaller ones"
    parser = kinds.add_parser("verify", help=about)
    parser.add_argument("--output", type=Path, required=True, help="the index folder")
    return top


def _add_collection(parser: argparse.ArgumentParser, **options: Any) -> None:
    about = 'JSON lines of {"id", "contents"}, gzipped (.gz) or not'
    parser.add_argument("--collection", type=Path, nargs="+", metavar="FILE", **{"help": about, **options})


def _add_bm25(parser: argparse.ArgumentParser) -> None:
    _add_collection(parser, required=True)
    add = parser.add_argument
    add("--k1", type=float, default=0.9, help="term frequency saturation (0.9 for TopiOCQA, 0.82 for QReCC)")
    add("--b", type=float, default=0.4, help="length normalisation (0.4 for TopiOCQA, 0.68 for QReCC)")
    add(
        "--processes",
        type=int,
        help="that analyse the text, one per core if not given; the index does not depend on it",
    )
    add("--quiet", action="store_true", help="no progress bars")


def _add_dense(parser: argparse.ArgumentParser) -> None:
    _add_collection(parser, required=True)
    add = parser.add_argument
    model = "ANCE checkpoint or sentence-transformers model: a folder, or a name on the hub"
    add("--model_name_or_path", required=True, help=model)
    add("--dtype", default="float32", choices=["float32", "float16"], help="of the vectors on disk")
    add("--block", type=int, default=50_000, help="passages per block, which is what a kill may lose")
    add("--max_length", type=int, default=384, help="tokens of a passage")
    add("--batch_size", type=int, default=64, help="passages per forward pass")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    add("--quiet", action="store_true", help="no progress bars")


def _add_import_blocks(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    blocks = "folder of passage__emb_p__data_obj_*.pb or doc_emb_cat.pkl, or one file"
    add("--embeddings", type=Path, required=True, help=blocks)
    docids = "docids of one file's rows (pickle, .npy, or .txt with one per line)"
    add("--corpus_docid_path", type=Path, help=docids)
    _add_collection(parser, default=[], help="the passages' texts, found by docid; none if it is not given")
    add("--dtype", default="float32", choices=["float32", "float16"], help="of the vectors on disk")


def main() -> None:
    args, start, built = build_parser().parse_args(), time.monotonic(), True
    if args.kind == "verify":
        from convsearch import checksums
        from retriever_server.storage import AGAIN, read_manifest

        read_manifest(args.output)
        checksums.check(args.output, AGAIN)
        print(f"{args.output}: every byte is as it was written ({time.monotonic() - start:.1f} s)")
        return
    if args.kind == "bm25":
        from retriever_server.bm25.build import build as build_bm25
        from retriever_server.bm25.manifest import Manifest as Bm25Manifest

        overwrite, progress = args.overwrite, not args.quiet
        built = build_bm25(args.collection, args.output, args.k1, args.b, overwrite, progress, args.processes)
        bm25 = Bm25Manifest.read(args.output)
        counts = f"{bm25.num_passages} passages, {bm25.num_terms} terms, {bm25.num_postings} postings"
        same, about = "k1 and b", f"{bm25.index_id}, {counts}, k1 {bm25.k1}, b {bm25.b}"
    else:
        from retriever_server.dense.manifest import Manifest

        if args.kind == "dense":
            from retriever_server.dense.build import Settings, build

            sizes = args.block, args.max_length, args.batch_size
            settings = Settings(args.dtype, *sizes, args.device, args.overwrite, progress=not args.quiet)
            built = build(args.collection, args.output, args.model_name_or_path, settings)
            if int(os.environ.get("RANK", "0")):
                return
        else:
            from retriever_server.dense.import_blocks import convert

            convert(args.embeddings, args.corpus_docid_path, args.collection, args.output, args.dtype, args.overwrite)
        found = Manifest.read(args.output)
        same = "encoder and settings"
        about = f"{found.index_id}, {found.num_passages} passages x {found.dim} {found.dtype}"
    took = f"built in {time.monotonic() - start:.1f} s"
    print(f"{args.output}: {took if built else f'is up to date (same collection, {same}): reused'}; {about}")


if __name__ == "__main__":
    run(main)
