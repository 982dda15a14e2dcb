"""Measures of a TREC run against qrels: ``python -m eval.metrics --run RUN --qrels QRELS``.

The mean is over the queries of the qrels; one that the run lacks counts 0, and so does one without a relevant passage
(``--skip-unanswerable`` leaves the latter out). nDCG weighs grades as they are; all others count grades >= ``--rel-threshold``.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from convsearch.cli import run as run_main
from convsearch.files import atomic_write

if TYPE_CHECKING:
    from eval.columns import Columns
    from eval.measures import Floats, Measure

DEFAULT_MEASURES = "MRR NDCG@3 R@5 R@10 R@20 R@100"


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The measures of one run, query by query, in the order of ``qids``. All values lie in 0..1."""

    qids: tuple[str, ...]  # the queries that count
    values: Mapping[str, "Floats"]  # measure name -> [queries]
    missing: int  # queries of the qrels that the run lacks
    unanswerable: int  # queries of the qrels that have no relevant passage
    unjudged: int  # queries of the run that the qrels lack; they do not count

    def means(self) -> dict[str, float]:
        return {name: float(values.mean()) for name, values in self.values.items()}


def evaluate(
    run: "Columns",
    qrels: "Columns",
    measures: "Sequence[Measure]",
    rel_threshold: int = 1,
    skip_unanswerable: bool = False,
) -> Evaluation:
    """Computes the measures of every query.

    Raises:
        ValueError: the run has none of the qrels' queries, no query has a relevant passage, or the threshold is below 1.
    """
    import numpy as np
    import pyarrow.compute as pc

    from eval.measures import compute, judge

    if rel_threshold < 1:
        raise ValueError(f"the relevance threshold must be at least 1, got {rel_threshold}")
    qids = qrels.qids.to_pylist()
    shared = pc.sum(pc.is_in(run.qids, value_set=qrels.qids)).as_py() or 0
    if len(run.qids) and not shared:
        raise ValueError(
            f"the run has none of the {len(qids)} queries of the qrels (run: {_some(run.qids)}; qrels: {_some(qrels.qids)})"
        )
    answerable = np.bincount(qrels.query_of_row[qrels.values >= rel_threshold], minlength=len(qids)) > 0
    if not answerable.any():
        raise ValueError(
            f"no query of the qrels has a passage of grade {rel_threshold} or more: lower the relevance threshold"
        )
    kept = np.flatnonzero(answerable) if skip_unanswerable else np.arange(len(qids))
    judged = judge(run, qrels)
    return Evaluation(
        qids=tuple(qids[index] for index in kept),
        values={measure.name: compute(measure, judged, rel_threshold)[kept] for measure in measures},
        missing=len(qids) - shared,
        unanswerable=len(qids) - int(answerable.sum()),
        unjudged=len(run.qids) - shared,
    )


def _some(qids: Any) -> str:
    return ", ".join(map(repr, qids[:2].to_pylist())) + (", ..." if len(qids) > 2 else "")


def evaluate_files(
    run: str | Path,
    qrels: str | Path,
    measures: str = DEFAULT_MEASURES,
    rel_threshold: int = 1,
    skip_unanswerable: bool = False,
) -> Evaluation:
    """Reads both files and computes the named measures. ``evaluate_files("run.trec", "dev.trec").means()["MRR"]``

    Raises:
        ValueError: a file or a measure is wrong; one sentence that names file and line.
    """
    from eval.measures import parse_measures
    from eval.runs import read_qrels, read_unchecked_run

    parsed = parse_measures(measures)
    with ThreadPoolExecutor(1) as pool:
        judgements = pool.submit(read_qrels, qrels)
        columns, refuse_duplicates = read_unchecked_run(run)
        checked = pool.submit(refuse_duplicates)
        evaluation = evaluate(columns, judgements.result(), parsed, rel_threshold, skip_unanswerable)
        checked.result()
    return evaluation


def write_per_query(path: str | Path, evaluation: Evaluation) -> None:
    """One line a query, tab-separated under a header: qid and the measures at full precision."""
    columns = [values.tolist() for values in evaluation.values.values()]
    with atomic_write(path) as file:
        file.write("\t".join(["qid", *evaluation.values]) + "\n")
        for qid, *row in zip(evaluation.qids, *columns, strict=True):
            file.write("\t".join([qid, *map(repr, row)]) + "\n")


def table(means: Mapping[str, float]) -> str:
    """One measure a line, in percent."""
    width = max(map(len, means))
    return "\n".join(f"{name:<{width}}  {100 * value:6.2f}" for name, value in means.items())


def notes(evaluation: Evaluation) -> str:
    """What a reader of the means has to know about the queries behind them."""
    found = [f"{len(evaluation.qids)} queries"]
    if evaluation.missing:
        found.append(f"{evaluation.missing} of the qrels' queries missing from the run (each counts 0)")
    if evaluation.unanswerable:
        found.append(f"{evaluation.unanswerable} without a relevant passage (see --skip-unanswerable)")
    if evaluation.unjudged:
        found.append(f"{evaluation.unjudged} of the run's queries not in the qrels (left out)")
    return ", ".join(found)


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m eval.metrics", description="Measures of a TREC run. Percent in the table, fractions in --json."
    )
    parser.add_argument(
        "--run", required=True, help="run: 6 or 7 columns, or JSON {qid: {docid: score}}; gzipped or not"
    )
    parser.add_argument(
        "--qrels", required=True, help="qrels: qid 0 docid grade, or JSON {qid: {docid: grade}}; gzipped or not"
    )
    parser.add_argument(
        "--rel-threshold", "--rel_threshold", type=int, default=1, help="least relevant grade, for all but nDCG (1)"
    )
    parser.add_argument(
        "--measures",
        nargs="+",
        default=[DEFAULT_MEASURES],
        help=f"MRR[@k] NDCG[@k] MAP[@k] R@k P@k Success@k, also under ir_measures' names (default: {DEFAULT_MEASURES})",
    )
    parser.add_argument(
        "--skip-unanswerable", action="store_true", help="leave queries without a relevant passage out of the mean"
    )
    parser.add_argument(
        "--json", action="store_true", help="print one object {measure: value}, fractions at full precision"
    )
    parser.add_argument("--per-query", metavar="FILE", help="also write every query's values, tab-separated")
    return parser


def main() -> None:
    args = arguments().parse_args()
    evaluation = evaluate_files(
        args.run, args.qrels, " ".join(args.measures), args.rel_threshold, args.skip_unanswerable
    )
    if args.per_query:
        write_per_query(args.per_query, evaluation)
    print(notes(evaluation), file=sys.stderr)
    print(json.dumps(evaluation.means()) if args.json else table(evaluation.means()))


if __name__ == "__main__":
    run_main(main)
