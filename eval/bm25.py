"""BM25 over rewrites: ``python -m eval.bm25 --index_dir_path INDEX --query_file rewrites.jsonl ...``.

Searches the queries of one or several files, writes a TREC run and its measures for each, and counts the rewrites that
fell back to the raw question. The flags are those of the reference's get_metrics_using_bm25.py, and ours.
"""

import argparse
from pathlib import Path

from convsearch.cli import command_parser, run
from eval.queries import FUSIONS, QUERY_TYPES


def build_parser() -> argparse.ArgumentParser:
    parser = command_parser("eval.bm25", __doc__)
    add = parser.add_argument
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--index_dir_path", help="index folder of retriever_server.index bm25")
    where.add_argument("--server", help="http://host:port of a running retriever_server, instead of --index_dir_path")
    add("--query_file", "--test_file_path", nargs="+", required=True, help="JSON lines of rewrites or conversations")
    add("--query_type", "--test_type", default="rewrite", choices=[*QUERY_TYPES], help="the query")
    fusion = "rrf: search all rewrites of infer --n, fuse by reciprocal rank"
    add("--fuse", default="none", choices=FUSIONS, help=fusion)
    add("--gold_qrel_file_path", "--trec_gold_qrel_file_path", help="TREC qrels, or else --not_perform_evaluation")
    add("--not_perform_evaluation", action="store_true", help="write the run alone")
    add("--top_n", "--top_k", type=int, default=100, help="passages per query")
    add("--bm25_k1", type=float, help="checked against the index, which is built for one k1")
    add("--bm25_b", type=float, help="checked against the index, which is built for one b")
    add("--rel_threshold", type=int, default=1, help="least relevant grade, for all but NDCG")
    add("--max_seq_length", type=int, help="first words of a query that count (the reference: 512; default: all)")
    add("--retrieval_output_path", "--qrel_output_dir", default=".", help="folder for the runs")
    add("--output_file_name", "--output_trec_file", nargs="+", required=True, help="name of each query file's run")
    add("--split_num_chunk", type=int, default=1, help="accepted for the reference's command lines, without effect")
    return parser


def main() -> None:
    parser = build_parser()
    args = parser.parse_args()
    if args.gold_qrel_file_path is None and not args.not_perform_evaluation:
        parser.error("give --gold_qrel_file_path, or --not_perform_evaluation")
    from eval.search import Job, search_and_score, through_server

    files = args.query_file, args.output_file_name, Path(args.retrieval_output_path)
    qrels = None if args.not_perform_evaluation else args.gold_qrel_file_path
    job = Job(*files, args.query_type, args.top_n, qrels, args.rel_threshold, args.max_seq_length, fuse=args.fuse)
    if args.server:
        return search_and_score(through_server(args.server), job)
    from retriever_server.bm25.index import Bm25Index

    index = Bm25Index.load(args.index_dir_path)
    for name, asked, built in (("k1", args.bm25_k1, index.k1), ("b", args.bm25_b, index.b)):
        if asked is not None and asked != built:
            problem = f"but {args.index_dir_path} was built with {name}={built}: build an index with --{name} {asked}"
            raise ValueError(f"--bm25_{name} {asked}, {problem}")
    return search_and_score(index.search, job)


if __name__ == "__main__":
    run(main)
