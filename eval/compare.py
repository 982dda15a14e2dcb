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
    from eval.significance import Floats

DEFAULT_MEASURES = "MRR NDCG@3 R@10 R@100"
Record = dict[str, Any]


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m eval.compare", description="Compares runs with the first of them, query by query.")
    parser.add_argument("qrels", help="qrels, as eval.metrics reads them")
    parser.add_argument("runs", nargs="+", help="two runs or more; the first is the baseline")
    parser.add_argument("--names", nargs="+", help="a name for each run (default: the file names)")
    parser.add_argument("--measures", nargs="+", default=[DEFAULT_MEASURES], help=f"as in eval.metrics (default: {DEFAULT_MEASURES})")
    parser.add_argument("--rel-threshold", "--rel_threshold", type=int, default=1, help="least relevant grade, for all but nDCG (1)")
    parser.add_argument("--conversations", metavar="FILE", help="JSON lines with qid and turn_id: adds the means turn by turn")
    parser.add_argument("--draws", type=int, default=10_000, help="bootstrap samples, and sign flips of the permutation test (10,000)")
    parser.add_argument("--confidence", type=float, default=0.95, help="of the intervals (0.95)")
    parser.add_argument("--seed", type=int, default=1, help="seed of both (1)")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print everything as one JSON object, fractions at full precision")
    form.add_argument("--csv", action="store_true", help="print one line a run and measure")
    form.add_argument("--latex", action="store_true", help="print a LaTeX table (booktabs)")
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
        {"run": name, "measure": measure, "mean": float(scores[:, i].mean()), "low": float(low[i]), "high": float(high[i])}
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
        {"run": name, "baseline": baseline, "measure": measure, **{key: _number(column[i].item()) for key, column in columns.items()}}
        for i, (name, measure) in enumerate(pairs)
    ]
    return {"means": means, "comparisons": comparisons}


def _number(value: float) -> float | None:
    """JSON has no infinity: the effect size of differences that never vary is None."""
    return value if math.isfinite(value) else None


def by_turn(qids: Sequence[str], values: Mapping[str, Mapping[str, "Floats"]], conversations: str | Path) -> list[Record]:
    """Means turn by turn: ``[{turn, queries, run, measure, mean}]``; queries that the file lacks stand under turn None.

    Raises:
        ValueError: a line has no qid or no whole turn_id, or the file has none of the queries.
    """
    import numpy as np

    from convsearch.files import read_jsonl

    turns: dict[str, int] = {}
    for number, record in read_jsonl(conversations):
        qid, turn = record.get("qid"), record.get("turn_id")
        if not isinstance(qid, str) or isinstance(turn, bool) or not isinstance(turn, int):
            raise ValueError(f"{conversations}:{number}: needs 'qid' (a string) and 'turn_id' (a whole number), got {qid!r} and {turn!r}")
        turns[qid] = turn
    if not any(qid in turns for qid in qids):
        raise ValueError(f"{conversations} has none of the {len(qids)} queries of the qrels: give the conversations that they come from")
    groups: dict[int | None, list[int]] = {}
    for index, qid in enumerate(qids):
        groups.setdefault(turns.get(qid), []).append(index)
    return [
        {"turn": turn, "queries": len(rows), "run": name, "measure": measure, "mean": float(np.mean(scores[rows]))}
        for turn, rows in sorted(groups.items(), key=lambda group: (group[0] is None, group[0] or 0))
        for name, measured in values.items()
        for measure, scores in measured.items()
    ]


def load(args: argparse.Namespace) -> tuple[tuple[str, ...], dict[str, Mapping[str, "Floats"]]]:
    """The qids, and the values of every run by its name.

    Raises:
        ValueError: names and runs do not match, or a file is wrong.
    """
    from eval.measures import parse_measures
    from eval.metrics import evaluate
    from eval.runs import read_qrels, read_run

    names = args.names or list(args.runs)
    if not args.names and len({Path(path).name for path in args.runs}) == len(args.runs):
        names = [Path(path).name for path in args.runs]
    if len(names) != len(args.runs) or len(set(names)) != len(names):
        raise ValueError(f"{len(args.runs)} runs need as many different names, got {names}: say --names A B ...")
    measures, qrels = parse_measures(" ".join(args.measures)), read_qrels(args.qrels)
    values: dict[str, Mapping[str, Floats]] = {}
    qids: tuple[str, ...] = ()
    for name, path in zip(names, args.runs, strict=True):
        try:
            evaluation = evaluate(read_run(path), qrels, measures, args.rel_threshold)
        except ValueError as error:
            raise ValueError(str(error) if str(path) in str(error) else f"{path}: {error}") from error
        if evaluation.missing:
            print(f"{path}: {evaluation.missing} of the {len(evaluation.qids)} queries are missing, each counts 0", file=sys.stderr)
        values[name], qids = evaluation.values, evaluation.qids
    return qids, values


def main() -> None:
    args = arguments().parse_args()
    qids, values = load(args)
    result: Record = {"queries": len(qids), **compare(values, args.draws, args.seed, args.confidence)}
    if args.conversations:
        result["by_turn"] = by_turn(qids, values, args.conversations)
    from eval import compare_output

    if args.json:
        print(json.dumps(result))
    elif args.csv:
        print(compare_output.as_csv(result), end="")
    elif args.latex:
        print(compare_output.as_latex(result))
    else:
        print(compare_output.as_text(result))


if __name__ == "__main__":
    run_main(main)
