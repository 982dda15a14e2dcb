"""Runs side by side: ``python -m eval.compare QRELS BASELINE_RUN RUN...``.

Every run is compared with the first, query by query. The text marks what a two-sided paired permutation test finds
significant after Holm's correction over all comparisons of the table. Queries are those of the qrels, as in eval.metrics.
"""

import argparse
import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from convsearch.cli import run as run_main

if TYPE_CHECKING:
    from eval.columns import Columns
    from eval.measures import Measure
    from eval.significance import Floats

DEFAULT_MEASURES = "MRR NDCG@3 R@10 R@100"
Record = dict[str, Any]


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m eval.compare", description="Compares runs with the first of them, query by query."
    )
    parser.add_argument("qrels", help="qrels, as eval.metrics reads them")
    parser.add_argument("runs", nargs="+", help="two runs or more; the first is the baseline")
    parser.add_argument("--names", nargs="+", help="a name for each run (default: the file names)")
    parser.add_argument(
        "--measures", nargs="+", default=[DEFAULT_MEASURES], help=f"as in eval.metrics (default: {DEFAULT_MEASURES})"
    )
    parser.add_argument(
        "--rel-threshold", "--rel_threshold", type=int, default=1, help="least relevant grade, for all but nDCG (1)"
    )
    parser.add_argument(
        "--seeds",
        nargs="+",
        action="append",
        default=[],
        metavar=("NAME", "RUN"),
        help="one system's runs with different seeds: enters the table as its mean over them; adds mean and sd over the seeds and best of n",
    )
    parser.add_argument(
        "--conversations",
        metavar="FILE",
        help="JSON lines with qid and turn_id: adds means by turn, topic switch and history length",
    )
    parser.add_argument(
        "--rewrites", metavar="FILE", help="JSON lines with qid and rewrite: adds means by the rewrite's length"
    )
    parser.add_argument(
        "--by",
        nargs="+",
        default=[],
        metavar="FIELD",
        help="fields of the conversations, as `domain`: adds means by each",
    )
    parser.add_argument(
        "--per-query", metavar="FILE", help="also write every query's values, tab-separated, a column a run and measure"
    )
    parser.add_argument(
        "--draws", type=int, default=10_000, help="bootstrap samples, and sign flips of the permutation test (10,000)"
    )
    parser.add_argument("--confidence", type=float, default=0.95, help="of the intervals (0.95)")
    parser.add_argument("--seed", type=int, default=1, help="seed of both (1)")
    form = parser.add_mutually_exclusive_group()
    form.add_argument(
        "--json", action="store_true", help="print everything as one JSON object, fractions at full precision"
    )
    form.add_argument("--csv", action="store_true", help="print one line a run and measure")
    form.add_argument("--latex", action="store_true", help="print a LaTeX table (booktabs)")
    form.add_argument("--html", action="store_true", help="print one self-contained HTML page")
    return parser


def compare(
    values: Mapping[str, Mapping[str, "Floats"]], draws: int = 10_000, seed: int = 1, confidence: float = 0.95
) -> dict[str, list[Record]]:
    """Means with intervals of every run, and the tests of every run against the first.

    Args:
        values: run name -> measure -> [queries], the same measures and queries in each; the first run is the baseline.

    Returns:
        ``{"means": [{run, measure, mean, low, high}], "comparisons": [{run, baseline, measure, difference, low, high, t_p, t_p_holm,
        permutation_p, permutation_p_holm, effect_size, wins, ties, losses}]}``; intervals are percentile bootstrap.

    Raises:
        ValueError: there are fewer than two runs or two queries, or an option is out of range.
    """
    import numpy as np

    from eval.significance import bootstrap_intervals, holm, paired_tests

    if len(values) < 2:
        raise ValueError(f"a comparison needs at least 2 runs, got {len(values)}")
    if draws < 100 or not 0 < confidence < 1:
        raise ValueError(f"--draws must be at least 100 and --confidence between 0 and 1, got {draws} and {confidence}")
    baseline, *others = values
    measures = list(values[baseline])
    cells = [(name, measure) for name in values for measure in measures]
    scores = np.stack([values[name][measure] for name, measure in cells], axis=1)
    low, high = bootstrap_intervals(scores, draws, seed, confidence)
    means = [
        {
            "run": name,
            "measure": measure,
            "mean": float(scores[:, i].mean()),
            "low": float(low[i]),
            "high": float(high[i]),
        }
        for i, (name, measure) in enumerate(cells)
    ]
    pairs = [(name, measure) for name in others for measure in measures]
    differences = np.stack([values[name][measure] - values[baseline][measure] for name, measure in pairs], axis=1)
    low, high = bootstrap_intervals(differences, draws, seed, confidence)
    tests = paired_tests(differences, draws, seed)
    columns = {
        "difference": tests.difference, "low": low, "high": high, "t_p": tests.t_p, "t_p_holm": holm(tests.t_p),
        "permutation_p": tests.permutation_p, "permutation_p_holm": holm(tests.permutation_p), "effect_size": tests.effect_size,
        "wins": (differences > 0).sum(axis=0), "ties": (differences == 0).sum(axis=0), "losses": (differences < 0).sum(axis=0),
    }  # fmt: skip
    comparisons = [
        {
            "run": name,
            "baseline": baseline,
            "measure": measure,
            **{key: _number(column[i].item()) for key, column in columns.items()},
        }
        for i, (name, measure) in enumerate(pairs)
    ]
    return {"means": means, "comparisons": comparisons}


def _number(value: float) -> float | None:
    """JSON has no infinity: the effect size of differences that never vary is None."""
    return value if math.isfinite(value) else None


def over_seeds(name: str, runs: Sequence[Mapping[str, "Floats"]]) -> list[Record]:
    """One system with several seeds: ``[{run, seeds, measure, mean, sd, best_of}]``.

    ``mean`` and ``sd`` (n - 1 below the line) are over the runs' means; ``best_of`` is the mean of each query's best run, which needs
    someone who knows the best one: a bound, not a system.
    """
    import numpy as np

    scores = {measure: np.stack([run[measure] for run in runs]) for measure in runs[0]}  # [seeds, queries]
    return [
        {
            "run": name, "seeds": len(runs), "measure": measure, "mean": float(values.mean()),
            "sd": float(values.mean(axis=1).std(ddof=1)), "best_of": float(values.max(axis=0).mean()),
        }
        for measure, values in scores.items()
    ]  # fmt: skip


def load(args: argparse.Namespace) -> tuple[tuple[str, ...], dict[str, Mapping[str, "Floats"]], list[Record]]:
    """The qids, the values of every run by its name (of a system with seeds: their mean), and what the seeds' runs say.

    Raises:
        ValueError: names and runs do not match, or a file is wrong.
    """
    import numpy as np

    from eval.measures import parse_measures
    from eval.runs import read_qrels

    names = args.names or list(args.runs)
    if not args.names and len({Path(path).name for path in args.runs}) == len(args.runs):
        names = [Path(path).name for path in args.runs]
    every = [*names, *(name for name, *_ in args.seeds)]
    if len(names) != len(args.runs) or len(set(every)) != len(every):
        raise ValueError(f"{len(args.runs)} runs need as many different names, got {every}: say --names A B ...")
    short = next((name for name, *paths in args.seeds if len(paths) < 2), None)
    if short is not None:
        raise ValueError(f"--seeds {short} needs at least 2 runs behind the name: say --seeds {short} RUN RUN ...")
    measures, qrels = parse_measures(" ".join(args.measures)), read_qrels(args.qrels)
    values: dict[str, Mapping[str, Floats]] = {}
    qids: tuple[str, ...] = ()
    for name, path in zip(names, args.runs, strict=True):
        qids, values[name] = _measured(path, qrels, measures, args.rel_threshold)
    seeds: list[Record] = []
    for name, *paths in args.seeds:
        runs = [_measured(path, qrels, measures, args.rel_threshold)[1] for path in paths]
        seeds += over_seeds(name, runs)
        values[name] = {measure: np.mean([run[measure] for run in runs], axis=0) for measure in runs[0]}
    return qids, values, seeds


def _measured(
    path: str, qrels: "Columns", measures: "Sequence[Measure]", rel_threshold: int
) -> tuple[tuple[str, ...], Mapping[str, "Floats"]]:
    from eval.metrics import evaluate
    from eval.runs import read_run

    try:
        evaluation = evaluate(read_run(path), qrels, measures, rel_threshold)
    except ValueError as error:
        raise ValueError(str(error) if str(path) in str(error) else f"{path}: {error}") from error
    if evaluation.missing:
        print(
            f"{path}: {evaluation.missing} of the {len(evaluation.qids)} queries are missing, each counts 0",
            file=sys.stderr,
        )
    return evaluation.qids, evaluation.values


def write_per_query(path: str | Path, qids: Sequence[str], values: Mapping[str, Mapping[str, "Floats"]]) -> None:
    """One line a query, tab-separated under a header: qid, then a column for each run and measure, fractions at full precision."""
    from convsearch.files import atomic_write

    columns = {
        f"{name} {measure}": scores.tolist()
        for name, measured in values.items()
        for measure, scores in measured.items()
    }
    with atomic_write(path) as file:
        file.write("\t".join(["qid", *columns]) + "\n")
        for qid, *row in zip(qids, *columns.values(), strict=True):
            file.write("\t".join([qid, *map(repr, row)]) + "\n")


def main() -> None:
    args = arguments().parse_args()
    if args.by and not args.conversations:
        raise ValueError(
            f"--by {' '.join(args.by)} needs the conversations that have the field: add --conversations FILE"
        )
    qids, values, seeds = load(args)
    result: Record = {"queries": len(qids), **compare(values, args.draws, args.seed, args.confidence)}
    if seeds:
        result["over_seeds"] = seeds
    if args.conversations or args.rewrites:
        from eval.breakdowns import labels_of, means_by

        labels = labels_of(qids, args.conversations, args.rewrites, args.by)
        result["breakdowns"] = {name: means_by(qids, groups, values) for name, groups in labels.items()}
    if args.per_query:
        write_per_query(args.per_query, qids, values)
    from eval import compare_output

    if args.json:
        print(json.dumps(result))
    elif args.csv:
        print(compare_output.as_csv(result), end="")
    elif args.latex:
        print(compare_output.as_latex(result))
    elif args.html:
        print(compare_output.as_html(result), end="")
    else:
        print(compare_output.as_text(result))


if __name__ == "__main__":
    run_main(main)
