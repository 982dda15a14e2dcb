"""Several systems in one table: ``python -m eval.summary --qrels QRELS --output results.json "raw question=raw.trec" ...``.

Prints MRR, NDCG@3 and R@10 with a bootstrap interval of the MRR over the questions, and writes the same numbers in full precision.
"""

import argparse
import json
from typing import Any

from convsearch.cli import run

MEASURES = ("MRR", "NDCG@3", "R@10")


def interval(values: Any, seed: int = 1, draws: int = 2000) -> tuple[float, float]:
    """95% percentile bootstrap interval of the mean of ``values`` [queries]."""
    import numpy as np

    rng = np.random.default_rng(seed)
    means = rng.choice(np.asarray(values), size=(draws, len(values))).mean(axis=1)
    low, high = np.quantile(means, (0.025, 0.975))
    return float(low), float(high)


def table(results: dict[str, dict[str, Any]]) -> str:
    """Fixed-width text, percentages."""
    width = max(map(len, results)) + 2
    lines = [f"{'':<{width}}{'MRR':>7}{'95% interval':>16}{'NDCG@3':>9}{'R@10':>8}"]
    for name, row in results.items():
        low, high = (100 * bound for bound in row["MRR_interval"])
        lines.append(
            f"{name:<{width}}{100 * row['MRR']:>7.1f}{f'{low:.1f} - {high:.1f}':>16}{100 * row['NDCG@3']:>9.1f}{100 * row['R@10']:>8.1f}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m eval.summary", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", metavar="NAME=RUN", help="a name for the table and its TREC run")
    parser.add_argument("--qrels", required=True, help="TREC qrels of the questions")
    parser.add_argument("--output", required=True, help="JSON file to write")
    args = parser.parse_args()
    from convsearch.files import atomic_write
    from eval.metrics import evaluate_files

    results: dict[str, dict[str, Any]] = {}
    for item in args.runs:
        name, _, path = item.partition("=")
        if not path:
            raise ValueError(f'{item!r}: expected NAME=RUN, as in "raw question=raw.trec"')
        evaluation = evaluate_files(path, args.qrels, " ".join(MEASURES))
        results[name] = {
            **evaluation.means(),
            "MRR_interval": interval(evaluation.values["MRR"]),
            "queries": len(evaluation.qids),
        }
    print(table(results))
    with atomic_write(args.output) as file:
        json.dump(results, file, indent=1)
    print(args.output)


if __name__ == "__main__":
    run(main)
