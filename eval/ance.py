"""ANCE over rewrites: ``python -m eval.ance --test_file_path rewrites.jsonl ...``.

The flags are those of the reference's get_metrics_using_ance.py. The passages' vectors are one of our index folders
(``retriever_server.index dense``, or ``import-blocks`` for the reference's pickles); the queries are encoded here.
``--server URL`` searches through a server that has the index instead.
"""

import argparse
from pathlib import Path

from convsearch.cli import command_parser, run
from eval.queries import FUSIONS, QUERY_TYPES


def build_parser() -> argparse.ArgumentParser:
    """The reference's flags, and ``--server``."""
    parser = command_parser("eval.ance", __doc__)
    add = parser.add_argument
    add("--server", help="http://host:port of a running retriever_server with a dense index")
    add("--test_file_path", nargs="+", required=True, help="rewrites or conversations, one JSON object per line")
    add("--test_type", default="rewrite", choices=[*QUERY_TYPES], help="which text is the query")
    fusion = "rrf: search all rewrites of infer --n, fuse by reciprocal rank"
    add("--fuse", default="none", choices=FUSIONS, help=fusion)
    add("--trec_gold_qrel_file_path", required=True, help="TREC qrels")
    add("--qrel_output_dir", default=".", help="folder for the runs")
    add("--output_trec_file", nargs="+", required=True, help="file name of the run of each test file")
    add("--top_k", type=int, default=100, help="passages per query")
    add("--rel_threshold", type=int, default=1, help="least relevant grade, for all but NDCG")
    add("--pretrained_encoder_path", help="query encoder (default: the passages' own; not used with --server)")
    add("--passage_embeddings_dir_path", help="index folder of the passages' vectors; not used with --server")
    add("--n_gpu", type=int, default=1, help="CUDA devices that share the vectors, if any; 0: the CPU")
    add("--use_gpu", default="True", help="True: a CUDA device if there is one; False: the CPU")
    add("--per_gpu_test_batch_size", type=int, default=32, help="queries per forward pass")
    add("--max_concat_length", type=int, default=512, help="tokens of a query")
    ignored = parser.add_argument_group("accepted for the reference's command lines, without effect")
    for name, value in (("seed", 42), ("max_query_length", 64), ("max_doc_length", 384), ("max_response_length", 64)):
        ignored.add_argument(f"--{name}", type=int, default=value)
    ignored.add_argument("--is_train")
    return parser


def index_folder(folder: str | None) -> str:
    """The folder, if there is an index in it.

    Raises:
        ValueError: none was given, or it is no index folder; says how to make one.
    """
    if folder is None:
        raise ValueError("dense search needs --passage_embeddings_dir_path (an index folder), or --server URL")
    if not (Path(folder) / "manifest.json").is_file():
        raise ValueError(
            f"dense search: {folder} is no index folder; build one with `python -m retriever_server.index dense`, "
            "or from the reference's pickles with "
            f"`python -m retriever_server.index import-blocks --embeddings {folder} --output DIR`"
        )
    return folder


def main() -> None:
    args = build_parser().parse_args()
    from eval.search import Job, search_and_score, through_server

    files = args.test_file_path, args.output_trec_file, Path(args.qrel_output_dir)
    what = args.test_type, args.top_k, args.trec_gold_qrel_file_path, args.rel_threshold
    job = Job(*files, *what, tag="ance", fuse=args.fuse)
    if args.server is not None:
        return search_and_score(through_server(args.server), job)
    folder = index_folder(args.passage_embeddings_dir_path)
    from retriever_server.dense.index import DenseIndex

    on_gpu = args.n_gpu > 0 and str(args.use_gpu).lower() not in ("false", "0", "no", "")
    sizes = {"max_length": args.max_concat_length, "batch_size": args.per_gpu_test_batch_size, "n_gpu": args.n_gpu}
    index = DenseIndex.load(folder, args.pretrained_encoder_path, device="auto" if on_gpu else "cpu", **sizes)
    return search_and_score(index.search, job)


if __name__ == "__main__":
    run(main)
