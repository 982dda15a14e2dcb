"""ANCE over rewrites, with the flags of the reference's get_metrics_using_ance.py: ``python -m eval.ance --test_file_path rewrites.jsonl ...``.

Dense indexes are not in this version: ``--server URL`` searches through a server that has one; without it the command checks its flags and says so.
"""

import argparse
from pathlib import Path

from convsearch.cli import run
from eval.queries import QUERY_TYPES
from eval.search import Job, search_and_score, through_server


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The reference's flags, and ``--server``."""
    parser = argparse.ArgumentParser(prog="python -m eval.ance", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--server", help="http://host:port of a running retriever_server with a dense index")
    add("--test_file_path", nargs="+", required=True, help="rewrites (or conversations), one JSON object a line")
    add("--test_type", default="rewrite", choices=tuple(QUERY_TYPES), help="which text is searched for (default rewrite)")
    add("--trec_gold_qrel_file_path", required=True, help="TREC qrels")
    add("--qrel_output_dir", default=".", help="folder for the runs (default: here)")
    add("--output_trec_file", nargs="+", required=True, help="file name of the run of each test file")
    add("--top_k", type=int, default=100, help="passages a query (default 100)")
    add("--rel_threshold", type=int, default=1, help="least relevant grade, for all but NDCG (default 1)")
    add("--pretrained_encoder_path", help="the query encoder; with --server, the server's own is used")
    add("--passage_embeddings_dir_path", help="the encoded passages; with --server, the server's own are used")
    ignored = parser.add_argument_group("accepted as the reference has them, without effect")
    for name, value in (("n_gpu", 1), ("seed", 42), ("per_gpu_test_batch_size", 32), ("max_doc_length", 384), ("max_response_length", 64)):
        ignored.add_argument(f"--{name}", type=int, default=value)
    for name, value in (("max_query_length", 64), ("max_concat_length", 512)):
        ignored.add_argument(f"--{name}", type=int, default=value)
    for flag in ("use_gpu", "is_train"):
        ignored.add_argument(f"--{flag}")
    return parser.parse_args(argv)


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
    if args.server is None:
        raise ValueError(
            "dense search over --passage_embeddings_dir_path is not in this version: give --server URL of a retrieval server that has the index"
        )
    search_and_score(through_server(args.server), job)


if __name__ == "__main__":
    run(main)
