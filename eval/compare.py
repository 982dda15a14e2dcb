"""Runs side by side: ``python -m eval.compare QRELS BASELINE_RUN RUN...``.

Every run is compared with the first, query by query. The text marks the differences that a two-sided paired permutation
test finds significant after Holm's correction over all comparisons of the table. Queries are those of the qrels, as in
eval.metrics.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from convsearch.cli import command_parser, run


def build_parser() -> argparse.ArgumentParser:
    parser = command_parser("eval.compare", "Compares runs with the first of them, query by query.")
    add = parser.add_argument
    add("qrels", help="qrels, as eval.metrics reads them")
    add("runs", nargs="+", help="two runs or more; the first is the baseline")
    add("--names", nargs="+", help="a name for each run (default: the file names)")
    add("--measures", nargs="+", default=["MRR NDCG@3 R@10 R@100"], help="as in eval.metrics")
    add("--rel-threshold", "--rel_threshold", type=int, default=1, help="least relevant grade, for all but nDCG")
    seeds = "one system's runs with different seeds: a row with their mean; adds mean, sd and best of n over the seeds"
    add("--seeds", nargs="+", action="append", default=[], metavar=("NAME", "RUN"), help=seeds)
    add("--conversations", metavar="FILE", help="JSON lines of qid, turn_id: adds means by turn, topic switch, history")
    add("--rewrites", metavar="FILE", help="JSON lines with qid and rewrite: adds means by rewrite length")
    add("--by", nargs="+", default=[], metavar="FIELD", help="adds means by these fields of the conversations")
    add("--per-query", metavar="FILE", help="also write the values, tab-separated: queries x (runs and measures)")
    add("--draws", type=int, default=10_000, help="bootstrap samples, and sign flips of the permutation test")
    add("--confidence", type=float, default=0.95, help="of the intervals")
    add("--seed", type=int, default=1, help="seed of both")
    form = parser.add_mutually_exclusive_group().add_argument
    forms = {
        "json": "everything as one JSON object, fractions at full precision",
        "csv": "one line per run and measure",
    }
    forms |= {"latex": "a LaTeX table (booktabs)", "html": "one self-contained HTML page"}
    for name, what in forms.items():
        form(f"--{name}", dest="form", action="store_const", const=name, help=f"print {what}")
    return parser


def named_runs(args: argparse.Namespace) -> tuple[dict[str, str], dict[str, list[str]]]:
    """Name -> run, and name -> runs of a system with seeds.

    Raises:
        ValueError: names and runs do not match.
    """
    names = args.names or list(args.runs)
    if not args.names and len({Path(path).name for path in args.runs}) == len(args.runs):
        names = [Path(path).name for path in args.runs]
    every = [*names, *(name for name, *_ in args.seeds)]
    if len(names) != len(args.runs) or len(set(every)) != len(every):
        raise ValueError(f"{len(args.runs)} runs need as many different names, got {every}: say --names A B ...")
    seeds = {name: paths for name, *paths in args.seeds}
    short = next((name for name, paths in seeds.items() if len(paths) < 2), None)
    if short is not None:
        raise ValueError(f"--seeds {short} needs at least 2 runs after the name: say --seeds {short} RUN RUN ...")
    return dict(zip(names, args.runs, strict=True)), seeds


def main() -> None:
    args = build_parser().parse_args()
    if args.by and not args.conversations:
        raise ValueError(f"--by {' '.join(args.by)} needs the conversations with the field: add --conversations FILE")
    from eval import compare_output
    from eval.breakdowns import labels_of, means_by
    from eval.comparison import compare, measure_runs
    from eval.measures import write_per_query

    found = measure_runs(args.qrels, *named_runs(args), " ".join(args.measures), args.rel_threshold)
    qids, values = found.qids, found.values
    result: dict[str, Any] = {"queries": len(qids), **compare(values, args.draws, args.seed, args.confidence)}
    if found.seeds:
        result["over_seeds"] = found.seeds
    if args.conversations or args.rewrites:
        labels = labels_of(qids, args.conversations, args.rewrites, args.by)
        result["breakdowns"] = {name: means_by(qids, groups, values) for name, groups in labels.items()}
    if args.per_query:
        cells = ((f"{name} {measure}", x) for name, scores in values.items() for measure, x in scores.items())
        write_per_query(args.per_query, qids, dict(cells))
    write = json.dumps if args.form == "json" else getattr(compare_output, f"as_{args.form or 'text'}")
    print(write(result).removesuffix("\n"))


if __name__ == "__main__":
    run(main)
