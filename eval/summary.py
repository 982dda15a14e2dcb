"""Several systems in one table: ``python -m eval.summary --qrels QRELS --output results.json "raw=raw.trec" ...``.

Prints MRR, NDCG@3 and R@10 with a bootstrap interval of the MRR over the questions, and writes the same numbers in full
precision. Kept words: the mean share of a question's content words that its rewrite keeps.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

from convsearch.cli import command_parser, run
from convsearch.files import atomic_write
from eval.tables import aligned, percent

MEASURES = ("MRR", "NDCG@3", "R@10")


def interval(values: Any, seed: int = 1, draws: int = 2000) -> tuple[float, float]:
    """95% percentile bootstrap interval of the mean of ``values`` [queries]."""
    rng = np.random.default_rng(seed)
    means = rng.choice(np.asarray(values), size=(draws, len(values))).mean(axis=1)
    low, high = np.quantile(means, (0.025, 0.975))
    return float(low), float(high)


def table(results: dict[str, dict[str, Any]]) -> str:
    """Fixed-width text, percentages."""
    rows = [["", "MRR", "95% interval", "NDCG@3", "R@10", "kept words"]]
    for name, row in results.items():
        bounds = " - ".join(percent(bound, 1) for bound in row["MRR_interval"])
        kept = percent(row["kept_words"], 1) if "kept_words" in row else "-"
        rows.append([name, percent(row["MRR"], 1), bounds, percent(row["NDCG@3"], 1), percent(row["R@10"], 1), kept])
    return aligned(rows, least=(max(map(len, results)) + 2, 7, 16, 9, 8, 12), gap="")


def build_parser() -> argparse.ArgumentParser:
    parser = command_parser("eval.summary", __doc__)
    what = "a TREC run, its name in the table (default: by file name), and its rewrites for the column kept words"
    parser.add_argument("runs", nargs="+", metavar="[NAME=]RUN[@REWRITES]", help=what)
    parser.add_argument("--qrels", required=True, help="TREC qrels of the questions")
    rules = "validation qrels, and runs of constant rules on them: the best repeats its row as 'best constant rule'"
    parser.add_argument("--rules", nargs="+", metavar=("QRELS", "RUN"), help=rules)
    parser.add_argument("--output", required=True, help="JSON file to write")
    return parser


def named(item: str) -> tuple[str, str, str]:
    """``[NAME=]RUN[@REWRITES]`` -> (name or "", run, rewrites or "")."""
    source, _, rewrites = item.partition("@")
    name, equals, path = source.partition("=")
    return (name, path, rewrites) if equals else ("", source, rewrites)


def main() -> None:
    args = build_parser().parse_args()
    from eval.measures import evaluate_files
    from eval.systems import SYSTEMS, best_rule, kept_words, rule_row

    best = best_rule(args.rules[0], args.rules[1:]) if args.rules else None
    runs = [named(item) for item in args.runs]
    if best is not None and best not in (Path(path).stem for _, path, _ in runs):
        raise ValueError(f"--rules: {best} is the best rule, but no RUN has this file name: add the run of the test")
    results: dict[str, dict[str, Any]] = {}
    for name, path, rewrites in runs:
        stem = Path(path).stem
        name = name or SYSTEMS.get(stem, stem)
        evaluation = evaluate_files(path, args.qrels, " ".join(MEASURES))
        bounds = interval(evaluation.values["MRR"])
        results[name] = {**evaluation.means(), "MRR_interval": bounds, "queries": len(evaluation.qids)}
        if rewrites:
            results[name]["kept_words"] = kept_words(rewrites, evaluation.qids)
        if stem == best:
            results[rule_row(name)] = results[name]
    print(table(results))
    with atomic_write(args.output) as file:
        json.dump(results, file, indent=1)
    print(args.output)


if __name__ == "__main__":
    run(main)
