"""BM25 over rewrites: ``python -m eval.bm25 --index_dir_path INDEX --query_file rewrites.jsonl --gold_qrel_file_path dev.trec --output_file_name run.trec``.

Searches the queries of one or several files, writes a TREC run and its measures for each, and counts the rewrites that fell back to the raw question.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path

from convsearch.cli import run
from convsearch.files import atomic_write
from eval.metrics import evaluate_files, notes, table
from eval.queries import QUERY_TYPES, read_queries

Search = Callable[[Sequence[str], int], list[list[tuple[str, float]]]]
BATCH = 256  # queries a call, so that the progress bar moves


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags of the reference's get_metrics_using_bm25.py, and ours."""
    parser = argparse.ArgumentParser(prog="python -m eval.bm25", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--index_dir_path", help="index folder of retriever_server.index bm25")
    add("--server", help="http://host:port of a running retriever_server, in place of --index_dir_path")
    add("--query_file", "--test_file_path", nargs="+", required=True, help="rewrites (or conversations), one JSON object a line")
    add("--query_type", "--test_type", default="rewrite", choices=tuple(QUERY_TYPES), help="which text is searched for (default rewrite)")
    add("--gold_qrel_file_path", "--trec_gold_qrel_file_path", help="TREC qrels; needed unless --not_perform_evaluation")
    add("--not_perform_evaluation", action="store_true", help="write the run alone")
    add("--top_n", "--top_k", type=int, default=100, help="passages a query (default 100)")
    add("--bm25_k1", type=float, default=None, help="checked against the index, which is built for one k1")
    add("--bm25_b", type=float, default=None, help="checked against the index, which is built for one b")
    add("--rel_threshold", type=int, default=1, help="least relevant grade, for all but NDCG (default 1)")
    add("--max_seq_length", type=int, default=None, help="cut queries to so many words (the reference cuts at 512; default: no cut)")
    add("--retrieval_output_path", "--qrel_output_dir", default=".", help="folder for the runs (default: here)")
    add("--output_file_name", "--output_trec_file", nargs="+", required=True, help="file name of the run of each query file")
    add("--split_num_chunk", type=int, default=1, help="accepted as the reference has it")
    args = parser.parse_args(argv)
    if (args.index_dir_path is None) == (args.server is None):
        parser.error("give one of --index_dir_path and --server")
    if len(args.query_file) != len(args.output_file_name):
        parser.error(f"{len(args.query_file)} query files and {len(args.output_file_name)} output file names: give one name a file")
    if args.gold_qrel_file_path is None and not args.not_perform_evaluation:
        parser.error("give --gold_qrel_file_path, or --not_perform_evaluation")
    if args.top_n < 1:
        parser.error(f"--top_n is {args.top_n}; it must be at least 1")
    return args


def open_search(args: argparse.Namespace) -> Search:
    """A search function over the index folder or the server.

    Raises:
        ValueError: the folder is no index, or was built with another k1 or b than the flags ask for.
    """
    if args.server:
        from convsearch.retriever import RetrieverClient

        client = RetrieverClient(args.server)
        return lambda queries, k: [[(hit.docid, hit.score) for hit in hits] for hits in client.search(queries, k)]
    from retriever_server.bm25 import Bm25Index

    index = Bm25Index.load(args.index_dir_path)
    for name, asked, built in (("k1", args.bm25_k1, index.k1), ("b", args.bm25_b, index.b)):
        if asked is not None and asked != built:
            raise ValueError(
                f"--bm25_{name} {asked}, but {args.index_dir_path} was built with {name}={built}: build an index with --{name} {asked}"
            )
    return index.search


def search_file(search: Search, path: str, output: Path, args: argparse.Namespace) -> int:
    """Writes the run of one query file; returns how many of its rewrites fell back to the raw question."""
    from tqdm import tqdm

    from eval.runs import write_run

    queries, fallbacks = read_queries(path, args.query_type)
    texts = [" ".join(text.split()[: args.max_seq_length]) for text in queries.values()]
    hits: list[list[tuple[str, float]]] = []
    for start in tqdm(range(0, len(texts), BATCH), desc=f"searching {Path(path).name}", unit="batch", leave=False):
        hits += search(texts[start : start + BATCH], args.top_n)
    write_run(output, zip(queries, hits, strict=True), "bm25")
    return fallbacks


def main() -> None:
    args = parse_args()
    search = open_search(args)
    for path, name in zip(args.query_file, args.output_file_name, strict=True):
        output = Path(args.retrieval_output_path) / name
        fallbacks = search_file(search, path, output, args)
        print(f"{path} -> {output}" + (f"; {fallbacks} rewrites fell back to the raw question" if fallbacks else ""))
        if not args.not_perform_evaluation:
            evaluation = evaluate_files(output, args.gold_qrel_file_path, rel_threshold=args.rel_threshold)
            print(f"{table(evaluation.means())}\n({notes(evaluation)})")
            with atomic_write(output.with_suffix(".metrics.json")) as file:
                json.dump(evaluation.means() | {"fallbacks": fallbacks}, file, indent=1)


if __name__ == "__main__":
    run(main)
