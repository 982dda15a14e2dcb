"""Runs compared with the first of them: means with intervals, paired tests, and several seeds of one system."""

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from eval.columns import Columns
from eval.measures import Floats, Measure, evaluate, parse_measures
from eval.runs import read_qrels, read_run
from eval.significance import bootstrap_intervals, holm, paired_tests

Record = dict[str, Any]
Values = Mapping[str, Mapping[str, Floats]]  # run name -> measure -> [queries]


def compare(values: Values, draws: int = 10_000, seed: int = 1, confidence: float = 0.95) -> dict[str, list[Record]]:
    """Means with intervals of every run, and the tests of every run against the first.

    Args:
        values: the same measures and queries for each run; the first run is the baseline.

    Returns:
        ``{"means": [{run, measure, mean, low, high}], "comparisons": [{run, baseline, measure, difference, low, high,
        t_p, t_p_holm, permutation_p, permutation_p_holm, effect_size, wins, ties, losses}]}``; intervals are percentile
        bootstrap intervals.

    Raises:
        ValueError: there are fewer than two runs or two queries, or an option is out of range.
    """
    if len(values) < 2:
        raise ValueError(f"a comparison needs at least 2 runs, got {len(values)}")
    if draws < 100 or not 0 < confidence < 1:
        raise ValueError(f"--draws must be at least 100 and --confidence between 0 and 1, got {draws} and {confidence}")
    baseline, *others = values
    measures = list(values[baseline])
    cells = [(name, measure) for name in values for measure in measures]
    scores = np.stack([values[name][measure] for name, measure in cells], axis=1)
    low, high = bootstrap_intervals(scores, draws, seed, confidence)
    columns = {"mean": [scores[:, i].mean() for i in range(len(cells))], "low": low, "high": high}
    means = [{"run": name, "measure": measure, **_row(columns, i)} for i, (name, measure) in enumerate(cells)]
    pairs = [(name, measure) for name in others for measure in measures]
    differences = np.stack([values[name][measure] - values[baseline][measure] for name, measure in pairs], axis=1)
    low, high = bootstrap_intervals(differences, draws, seed, confidence)
    tests = paired_tests(differences, draws, seed)
    wins, losses = (differences > 0).sum(axis=0), (differences < 0).sum(axis=0)
    columns = {
        "difference": tests.difference, "low": low, "high": high, "t_p": tests.t_p, "t_p_holm": holm(tests.t_p),
        "permutation_p": tests.permutation_p, "permutation_p_holm": holm(tests.permutation_p),
        "effect_size": tests.effect_size, "wins": wins, "ties": len(differences) - wins - losses, "losses": losses,
    }  # fmt: skip
    comparisons = [
        {"run": name, "baseline": baseline, "measure": measure, **_row(columns, i)}
        for i, (name, measure) in enumerate(pairs)
    ]
    return {"means": means, "comparisons": comparisons}


def _row(columns: Mapping[str, Any], i: int) -> dict[str, float | None]:
    """Row ``i`` as JSON numbers. JSON has no infinity: the effect size of differences that never vary is None."""
    row = {key: column[i].item() for key, column in columns.items()}
    return {key: value if math.isfinite(value) else None for key, value in row.items()}


def over_seeds(name: str, runs: Sequence[Mapping[str, Floats]]) -> list[Record]:
    """One system with several seeds: ``[{run, seeds, measure, mean, sd, best_of}]``.

    ``mean`` and ``sd`` (divided by n - 1) are over the runs' means; ``best_of`` is the mean of each query's best run.
    To choose that run one must know the golds: it is an upper bound, not a system.
    """
    scores = {measure: np.stack([run[measure] for run in runs]) for measure in runs[0]}  # [seeds, queries]
    return [
        {
            "run": name, "seeds": len(runs), "measure": measure, "mean": float(values.mean()),
            "sd": float(values.mean(axis=1).std(ddof=1)), "best_of": float(values.max(axis=0).mean()),
        }
        for measure, values in scores.items()
    ]  # fmt: skip


@dataclass(frozen=True, slots=True)
class Measured:
    """Runs by name, query by query; a system with seeds counts as one run, the mean over them."""

    qids: tuple[str, ...]
    values: Values
    seeds: list[Record]  # see over_seeds


def measure_runs(
    qrels_path: str, runs: Mapping[str, str], seeds: Mapping[str, Sequence[str]], measures: str, rel_threshold: int
) -> Measured:
    """Measures the runs (name -> path) and the systems with several seeds (name -> paths).

    Raises:
        ValueError: a file is wrong.
    """
    parsed, qrels = parse_measures(measures), read_qrels(qrels_path)
    values: dict[str, Mapping[str, Floats]] = {}
    qids: tuple[str, ...] = ()
    for name, path in runs.items():
        qids, values[name] = _measured(path, qrels, parsed, rel_threshold)
    found: list[Record] = []
    for name, paths in seeds.items():
        seed_values = [_measured(path, qrels, parsed, rel_threshold)[1] for path in paths]
        found += over_seeds(name, seed_values)
        values[name] = {measure: np.mean([run[measure] for run in seed_values], axis=0) for measure in seed_values[0]}
    return Measured(qids, values, found)


def _measured(
    path: str, qrels: Columns, measures: Sequence[Measure], rel_threshold: int
) -> tuple[tuple[str, ...], Mapping[str, Floats]]:
    try:
        evaluation = evaluate(read_run(path), qrels, measures, rel_threshold)
    except ValueError as error:
        raise ValueError(str(error) if str(path) in str(error) else f"{path}: {error}") from error
    if evaluation.missing:
        missing = f"{evaluation.missing} of the {len(evaluation.qids)} queries are missing"
        print(f"{path}: {missing}, each counts 0", file=sys.stderr)
    return evaluation.qids, evaluation.values
