"""BRIGHT: ``python -m eval.bright --task theoremqa_questions --documents DOCS --topics TOPICS --qrels QRELS``.

Searches for the original queries, or for the reasoned ones of ``--queries`` (alone or joined to the original), takes
out the documents that a query excludes, and prints nDCG@10 below the published rows. For several tasks, or ``all``, the
paths contain {task} (earth_science) or {name} (earth-science).
"""

import argparse
import json
import sys
from pathlib import Path

from convsearch.cli import command_parser, run
from eval.bright_table import TASKS, table

MEASURES = "nDCG@10 R@10 R@100 MRR"


def build_parser() -> argparse.ArgumentParser:
    parser = command_parser("eval.bright", __doc__)
    add = parser.add_argument
    add("--task", nargs="+", required=True, choices=[*TASKS, "all"], metavar="TASK", help="one, several, or all 12")
    documents = "parquet, JSON lines or JSON list of {id, contents or content}; or TheoremQA's own JSON"
    add("--documents", required=True, help=documents)
    add("--topics", required=True, help="parquet or JSON lines of {id, query, excluded_ids}, gzipped or not")
    add("--qrels", required=True, help="TREC qrels")
    add("--queries", help="reasoned queries: {query: reasoned} as released, or lines of convsearch.infer --task rqr")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--replace", action="store_true", help="search for the reasoned query alone (default)")
    how.add_argument("--join", action="store_true", help="search for the original query followed by the reasoned one")
    weights = "Lucene's, or BM25 weights on the query's terms too, as in the published figures"
    add("--bm25", default="lucene", choices=("lucene", "query-weighted"), help=weights)
    add("--k1", type=float, default=0.9, help="BM25's term saturation")
    add("--b", type=float, default=0.4, help="BM25's length normalisation")
    add("--encoder", help="a dense encoder instead of BM25: an ANCE or sentence-transformers folder, or a hub name")
    add("--query_prefix", default="", help="put before each query, for a dense encoder that needs an instruction")
    add("--max_length", type=int, default=512, help="tokens of a query or document for the encoder")
    add("--excluded", help="excluded ids, instead of the topics': JSON {qid: [ids]}, or records of {id, excluded_ids}")
    add("--top_k", type=int, default=1000, help="documents per query, without the excluded ones")
    add("--measures", default=MEASURES, help="measures of eval.metrics")
    add("--work", help="folder that keeps the indexes for the next run (default: none is kept)")
    add("--output_trec_file", help="also write the run; with several tasks the path contains {task}")
    form = "print one object {measure: fraction}; for several tasks the means, and each task's under 'tasks'"
    add("--json", action="store_true", help=form)
    return parser


def main() -> None:
    args = build_parser().parse_args()
    tasks = list(TASKS) if "all" in args.task else list(dict.fromkeys(args.task))
    for name in ("documents", "topics", "qrels", "output_trec_file"):
        pattern = getattr(args, name)
        if len(tasks) > 1 and pattern and "{task}" not in pattern and "{name}" not in pattern:
            remedy = "put {task} or {name} in place of the task's name"
            raise ValueError(f"--{name} {pattern} is one file for {len(tasks)} tasks: {remedy}")
    from eval.bright_search import evaluate_task

    outcomes = {}
    for task in tasks:
        outcomes[task] = evaluate_task(args, task)
        print(f"{task}: {outcomes[task].notes}", file=sys.stderr)
    if args.json:
        by_task = {task: dict(outcome.means) for task, outcome in outcomes.items()}
        means = {name: sum(found[name] for found in by_task.values()) / len(tasks) for name in by_task[tasks[0]]}
        print(json.dumps(means if len(tasks) == 1 else means | {"tasks": by_task}))
        return
    system = Path(args.encoder).name if args.encoder else f"BM25 {args.bm25}"
    print(table(outcomes, system + (", joined" if args.join else ", reasoned" if args.queries else ", raw")))


if __name__ == "__main__":
    run(main)
