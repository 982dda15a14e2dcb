"""Measures of a TREC run against qrels: ``python -m eval.metrics --run RUN --qrels QRELS``.

The mean is over the queries of the qrels. A query that the run lacks counts 0, and so does one without a relevant
passage (``--skip-unanswerable`` leaves the latter out). nDCG weighs grades as they are; all others count grades >=
``--rel-threshold``.
"""

import argparse
import json
import sys

from convsearch.cli import command_parser, run
from eval import DEFAULT_MEASURES
from eval.tables import measure_table


def build_parser() -> argparse.ArgumentParser:
    parser = command_parser("eval.metrics", "Measures of a TREC run. Percent in the table, fractions in --json.")
    add = parser.add_argument
    add("--run", required=True, help="run: 6 or 7 columns, or JSON {qid: {docid: score}}; gzipped or not")
    add("--qrels", required=True, help="qrels: qid 0 docid grade, or JSON {qid: {docid: grade}}; gzipped or not")
    add("--rel-threshold", "--rel_threshold", type=int, default=1, help="least relevant grade, for all but nDCG")
    names = "MRR[@k] NDCG[@k] MAP[@k] R@k P@k Success@k, or ir_measures' names"
    add("--measures", nargs="+", default=[DEFAULT_MEASURES], help=names)
    add("--skip-unanswerable", action="store_true", help="leave queries without a relevant passage out of the mean")
    add("--json", action="store_true", help="print one object {measure: value}, fractions at full precision")
    add("--per-query", metavar="FILE", help="also write every query's values, tab-separated")
    return parser


def main() -> None:
    args = build_parser().parse_args()
    from eval.measures import evaluate_files, notes, write_per_query

    names = " ".join(args.measures)
    evaluation = evaluate_files(args.run, args.qrels, names, args.rel_threshold, args.skip_unanswerable)
    if args.per_query:
        write_per_query(args.per_query, evaluation.qids, evaluation.values)
    print(notes(evaluation), file=sys.stderr)
    print(json.dumps(evaluation.means()) if args.json else measure_table(evaluation.means()))


if __name__ == "__main__":
    run(main)
