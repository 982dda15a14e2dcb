"""Several systems in one table: ``python -m eval.summary --qrels QRELS --output results.json "raw=raw.trec" ...``.

Prints MRR, NDCG@3 and R@10 with a bootstrap interval of the MRR over the questions, and writes the same numbers in full
precision.
"""

import argparse
import json
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
    rows = [["", "MRR", "95% interval", "NDCG@3", "R@10"]]
    for name, row in results.items():
        bounds = " - ".join(percent(bound, 1) for bound in row["MRR_interval"])
        rows.append([name, percent(row["MRR"], 1), bounds, percent(row["NDCG@3"], 1), percent(row["R@10"], 1)])
    return aligned(rows, least=(max(map(len, results)) + 2, 7, 16, 9, 8), gap="")


def build_parser() -> argparse.ArgumentParser:
    parser = command_parser("eval.summary", __doc__)
    parser.add_argument("runs", nargs="+", metavar="NAME=RUN", help="a name for the table and its TREC run")
    parser.add_argument("--qrels", required=True, help="TREC qrels of the questions")
    parser.add_argument("--output", required=True, help="JSON file to write")
    return parser


def main() -> None:
    args = build_parser().parse_args()
    from eval.measures import evaluate_files

    results: dict[str, dict[str, Any]] = {}
    for item in args.runs:
        name, _, path = item.partition("=")
        if not path:
            raise ValueError(f'{item!r}: expected NAME=RUN, as in "raw question=raw.trec"')
        evaluation = evaluate_files(path, args.qrels, " ".join(MEASURES))
        bounds = interval(evaluation.values["MRR"])
        results[name] = {**evaluation.means(), "MRR_interval": bounds, "queries": len(evaluation.qids)}
    print(table(results))
    with atomic_write(args.output) as file:
        json.dump(results, file, indent=1)
    print(args.output)


if __name__ == "__main__":
    run(main)
