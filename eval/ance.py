"""ANCE over rewrites, with the flags of the reference's get_metrics_using_ance.py: ``python -m eval.ance --test_file_path rewrites.jsonl ...``.

The passages' vectors are an index folder of ours (``retriever_server.index dense``, or ``import-blocks`` for the reference's pickles); the queries are
encoded here. ``--server URL`` searches through a server that has the index instead.
"""

import argparse
from pathlib import Path

from convsearch.cli import run
from eval.queries import QUERY_TYPES
from eval.search import Job, Search, search_and_score, through_server


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The reference's flags, and ``--server``."""
    parser = argparse.ArgumentParser(
        prog="python -m eval.ance", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--server", help="http://host:port of a running retriever_server with a dense index")
    add("--test_file_path", nargs="+", required=True, help="rewrites (or conversations), one JSON object a line")
    add(
        "--test_type",
        default="rewrite",
        choices=tuple(QUERY_TYPES),
        help="which text is searched for (default rewrite)",
    )
    add("--trec_gold_qrel_file_path", required=True, help="TREC qrels")
    add("--qrel_output_dir", default=".", help="folder for the runs (default: here)")
    add("--output_trec_file", nargs="+", required=True, help="file name of the run of each test file")
    add("--top_k", type=int, default=100, help="passages a query (default 100)")
    add("--rel_threshold", type=int, default=1, help="least relevant grade, for all but NDCG (default 1)")
    add(
        "--pretrained_encoder_path",
        help="the query encoder (default: the passages' own); with --server, the server's is used",
    )
    add(
        "--passage_embeddings_dir_path",
        help="the index folder of the passages' vectors; with --server, the server's are used",
    )
    add(
        "--n_gpu",
        type=int,
        default=1,
        help="CUDA devices that share the vectors, where there are any; 0: the CPU (default 1)",
    )
    add("--use_gpu", default="True", help="False: the CPU (default True, where there is a CUDA device)")
    add("--per_gpu_test_batch_size", type=int, default=32, help="queries a forward pass (default 32)")
    add("--max_concat_length", type=int, default=512, help="tokens of a query (default 512)")
    ignored = parser.add_argument_group("accepted as the reference has them, without effect")
    for name, value in (("seed", 42), ("max_query_length", 64), ("max_doc_length", 384), ("max_response_length", 64)):
        ignored.add_argument(f"--{name}", type=int, default=value)
    ignored.add_argument("--is_train")
    return parser.parse_args(argv)


def open_search(args: argparse.Namespace) -> Search:
    """A search function over the server or the index folder.

    Raises:
        ValueError: there is no such folder, it is no dense index, or the encoder does not belong to it.
    """
    if args.server is not None:
        return through_server(args.server)
    folder = args.passage_embeddings_dir_path
    if folder is None:
        raise ValueError(
            "dense search needs --passage_embeddings_dir_path (an index folder), or --server URL of a server that has the index"
        )
    if not (Path(folder) / "manifest.json").is_file():
        raise ValueError(
            f"dense search: {folder} is no index folder; build one with `python -m retriever_server.index dense`, or, from the reference's pickled "
            f"vectors, with `python -m retriever_server.index import-blocks --embeddings {folder} --output DIR`"
        )
    from retriever_server.dense.index import DenseIndex

    on_gpu = args.n_gpu > 0 and str(args.use_gpu).lower() not in ("false", "0", "no", "")
    index = DenseIndex.load(
        folder,
        args.pretrained_encoder_path,
        device="auto" if on_gpu else "cpu",
        n_gpu=args.n_gpu,
        max_length=args.max_concat_length,
        batch_size=args.per_gpu_test_batch_size,
    )
    return index.search


def main() -> None:
    args = parse_args()
    job = Job(
        query_files=args.test_file_path,
        run_names=args.output_trec_file,
        output_dir=Path(args.qrel_output_dir),
        query_type=args.test_type,
        top_k=args.top_k,
        qrels=args.trec_gold_qrel_file_path,
        rel_threshold=args.rel_threshold,
        tag="ance",
    )
    search_and_score(open_search(args), job)


if __name__ == "__main__":
    run(main)
