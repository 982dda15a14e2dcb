"""Retrieval measures over columns: trec_eval's definitions, computed on whole arrays.

Passages are ranked by score in float32, ties by docid in descending order; the run's rank column does not count.
Formulas: trec_eval 9 (m_recip_rank.c, m_ndcg_cut.c, m_recall.c, m_map.c, m_P.c, m_success.c); the tests compare with
pytrec_eval.
"""

import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from convsearch.files import atomic_write
from eval import DEFAULT_MEASURES
from eval.columns import Columns
from eval.runs import read_qrels, read_unchecked_run

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Kind = Literal["RR", "nDCG", "R", "AP", "P", "Success"]
_KINDS: dict[str, Kind] = {
    "rr": "RR", "mrr": "RR", "recip_rank": "RR", "ndcg": "nDCG", "ndcg_cut": "nDCG", "r": "R", "recall": "R",
    "ap": "AP", "map": "AP", "map_cut": "AP", "p": "P", "success": "Success",
}  # fmt: skip
_NAME = re.compile(r"([a-z_]+?)(?:\(rel=(\d+)\))?(?:[@_.](\d+))?", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Measure:
    """``Measure("NDCG@3", "nDCG", cutoff=3, rel=None)``; ``rel`` is its own relevance threshold, if it has one."""

    name: str  # as the user wrote it
    kind: Kind
    cutoff: int | None
    rel: int | None


def parse_measures(text: str) -> list[Measure]:
    """Reads names separated by spaces or commas, in any case.

    Known are MRR, RR@10, nDCG@3, R@100, MAP, P@5, Success@1, R(rel=2)@10, recall_10 and their like.

    Raises:
        ValueError: a name is unknown, or lacks the cutoff that it needs; names the known ones.
    """
    names = dict.fromkeys(re.split(r"[\s,]+", text.strip()))
    if names == {"": None}:
        raise ValueError("no measure was named: choose some of MRR[@k], NDCG[@k], MAP[@k], R@k, P@k, Success@k")
    return [_parse_measure(name) for name in names]


def _parse_measure(name: str) -> Measure:
    match = _NAME.fullmatch(name)
    kind = _KINDS.get(match[1].lower()) if match else None
    if match is None or kind is None:
        known = "MRR[@k], NDCG[@k], MAP[@k], R@k, P@k, Success@k, and (rel=N) before the @"
        raise ValueError(f"unknown measure {name!r}: there are {known}")
    rel, cutoff = (int(group) if group else None for group in match.group(2, 3))
    if cutoff is None and kind in ("R", "P", "Success"):
        raise ValueError(f"measure {name!r} needs a cutoff of at least 1, as in {name}@10")
    if cutoff == 0 or rel == 0:
        raise ValueError(f"measure {name!r}: cutoff and rel must be at least 1")
    if kind == "nDCG" and rel is not None:
        raise ValueError(f"measure {name!r}: nDCG weighs the grades and has no threshold: leave (rel={rel}) out")
    return Measure(name, kind, cutoff, rel)


@dataclass(frozen=True, slots=True)
class Judged:
    """The run's rows that are in the qrels, by query and rank, and the qrels. Queries are those of the qrels."""

    num_queries: int
    query: Ints  # [rows], index of the query
    rank: Ints  # [rows], from 1
    grade: Ints  # [rows]
    qrel_query: Ints  # [qrels], index of the query
    qrel_grade: Ints  # [qrels]


def judge(run: Columns, qrels: Columns) -> Judged:
    """Looks the run's passages up in the qrels.

    A table of the qrels' hashes drops most rows; pyarrow and a binary search find the rest.
    """
    coded = qrels.docids.dictionary_encode()
    docids = coded.dictionary
    keys = qrels.query_of_row.astype(np.int64) * len(docids) + coded.indices.to_numpy()
    by_key = np.argsort(keys)
    keys, grades = keys[by_key], qrels.values[by_key]
    rows = _candidates(run, qrels)
    docs, query = _lookup(run.docids.take(rows), docids), _lookup(run.qids, qrels.qids)[run.query_of_row[rows]]
    wanted = query * len(docids) + docs
    found = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    known = (query >= 0) & (docs >= 0) & (keys[found] == wanted)
    rows, query, found = rows[known], query[known], found[known]
    rank = ranks(run, rows)
    order = np.lexsort((rank, query))
    qrel_query = qrels.query_of_row.astype(np.int64)
    return Judged(len(qrels.qids), query[order], rank[order], grades[found][order], qrel_query, qrels.values)


def _candidates(run: Columns, qrels: Columns) -> Ints:
    """The rows whose docid may be in the qrels, by its hash's low bits: all that are, and at most 1 in 32 others."""
    size = 1 << max(10, (32 * len(qrels.docids) - 1).bit_length())
    table = np.zeros(size, np.bool_)
    table[(qrels.docid_hashes & np.uint64(size - 1)).view(np.int64)] = True
    rows: Ints = np.flatnonzero(table[(run.docid_hashes & np.uint64(size - 1)).view(np.int64)])
    return rows


def _lookup(items: Any, values: Any) -> Ints:
    """The place in ``values`` of each of ``items``, -1 if it has none."""
    places: Ints = pc.fill_null(pc.index_in(items, value_set=values), -1).to_numpy().astype(np.int64)
    return places


def ranks(run: Columns, rows: Ints) -> Ints:
    """The ranks of ``rows`` within their queries, from 1; trec_eval's order: float32 score, then docid, descending."""
    query, score = run.query_of_row, run.values.astype(np.float32)
    firsts = np.flatnonzero(_starts(query))
    descends = score[1:] < score[:-1]
    descends[firsts[1:] - 1] = True
    if len(firsts) == len(run.qids) and descends.all():
        start = np.empty(len(run.qids), np.int64)
        start[query[firsts]] = firsts
        return rows - start[query[rows]] + 1
    order = _trec_order(run, query, score)
    result = np.empty(len(query), np.int64)
    result[order] = _place_in_group(query[order])
    return result[rows]


def _trec_order(run: Columns, query: npt.NDArray[np.int32], score: npt.NDArray[np.float32]) -> Ints:
    """The permutation that sorts the rows; docids are compared only between rows with equal scores."""
    order: Ints = np.lexsort((-score, query)).astype(np.int64)
    tied = (query[order][1:] == query[order][:-1]) & (score[order][1:] == score[order][:-1])
    places = np.flatnonzero(np.concatenate([tied, [False]]) | np.concatenate([[False], tied]))
    if len(places):
        rows = order[places]
        columns = {"query": query[rows], "score": score[rows] + np.float32(0), "docid": run.docids.take(pa.array(rows))}
        keys = [("query", "ascending"), ("score", "descending"), ("docid", "descending")]
        order[places] = rows[pc.sort_indices(pa.table(columns), sort_keys=keys).to_numpy().astype(np.int64)]
    return order


def compute(measure: Measure, judged: Judged, rel_threshold: int) -> Floats:
    """The measure of every query of the qrels, [queries], in 0..1; 0 without the query or a relevant passage."""
    cutoff = measure.cutoff or np.iinfo(np.int64).max
    if measure.kind == "nDCG":
        return _ndcg(judged, cutoff)
    threshold = measure.rel or rel_threshold
    relevant = judged.grade >= threshold
    query, rank = judged.query[relevant], judged.rank[relevant]
    place = _place_in_group(query)  # how many relevant passages have this rank or a better one
    within = rank <= cutoff
    query, rank, place = query[within], rank[within], place[within]
    if measure.kind == "RR":
        return _sums(query[place == 1], 1 / rank[place == 1], judged)
    credit = place / rank if measure.kind == "AP" else np.ones(len(query))
    gained = _sums(query, credit, judged)
    if measure.kind == "Success":
        return np.minimum(gained, 1)
    if measure.kind == "P":
        return gained / cutoff
    relevant = judged.qrel_grade >= threshold
    num_relevant = _sums(judged.qrel_query[relevant], np.ones(np.count_nonzero(relevant)), judged)
    fractions: Floats = gained / np.maximum(num_relevant, 1)
    return fractions


def _sums(query: Ints, amounts: Floats, judged: Judged) -> Floats:
    """The amounts' sum by query, [queries]."""
    sums: Floats = np.bincount(query, amounts, judged.num_queries).astype(np.float64)
    return sums


def _ndcg(judged: Judged, cutoff: int) -> Floats:
    """Gain = grade, discount = log2(rank + 1), ideal = the query's judged passages by grade."""
    ideal_order = np.lexsort((-judged.qrel_grade, judged.qrel_query))
    ideal_query, ideal_grade = judged.qrel_query[ideal_order], judged.qrel_grade[ideal_order]

    def dcg(query: Ints, rank: Ints, grade: Ints) -> Floats:
        counts = (rank <= cutoff) & (grade > 0)
        return _sums(query[counts], grade[counts] / np.log2(rank[counts] + 1), judged)

    ideal = dcg(ideal_query, _place_in_group(ideal_query), ideal_grade)
    fractions: Floats = dcg(judged.query, judged.rank, judged.grade) / np.where(ideal > 0, ideal, 1)
    return fractions


def _place_in_group(query: npt.NDArray[np.integer[Any]]) -> Ints:
    """1, 2, 3, ... within each stretch of equal queries."""
    rows = np.arange(len(query))
    places: Ints = rows - np.maximum.accumulate(np.where(_starts(query), rows, 0)) + 1
    return places


def _starts(query: npt.NDArray[np.integer[Any]]) -> npt.NDArray[np.bool_]:
    """Whether a stretch of equal queries begins at each row."""
    starts: npt.NDArray[np.bool_] = np.concatenate([[True], query[1:] != query[:-1]])[: len(query)]
    return starts


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The measures of one run, query by query, in the order of ``qids``. All values are in 0..1."""

    qids: tuple[str, ...]  # the queries that count
    values: Mapping[str, Floats]  # measure name -> [queries]
    missing: int  # queries of the qrels that the run lacks
    unanswerable: int  # queries of the qrels that have no relevant passage
    unjudged: int  # queries of the run that the qrels lack; they do not count

    def means(self) -> dict[str, float]:
        return {name: float(values.mean()) for name, values in self.values.items()}


def evaluate(
    run: Columns, qrels: Columns, measures: Sequence[Measure], rel_threshold: int = 1, skip_unanswerable: bool = False
) -> Evaluation:
    """Computes the measures of every query.

    Raises:
        ValueError: the run has none of the qrels' queries, no query has a relevant passage, or a threshold is below 1.
    """
    if rel_threshold < 1:
        raise ValueError(f"the relevance threshold must be at least 1, got {rel_threshold}")
    qids = qrels.qids.to_pylist()
    shared = pc.sum(pc.is_in(run.qids, value_set=qrels.qids)).as_py() or 0
    if len(run.qids) and not shared:
        found = f"run: {_some(run.qids)}; qrels: {_some(qrels.qids)}"
        raise ValueError(f"the run has none of the {len(qids)} queries of the qrels ({found})")
    answerable = np.bincount(qrels.query_of_row[qrels.values >= rel_threshold], minlength=len(qids)) > 0
    if not answerable.any():
        lower = "lower the relevance threshold"
        raise ValueError(f"no query of the qrels has a passage of grade {rel_threshold} or more: {lower}")
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
    parsed = parse_measures(measures)
    with ThreadPoolExecutor(1) as pool:
        judgements = pool.submit(read_qrels, qrels)
        columns, refuse_duplicates = read_unchecked_run(run)
        checked = pool.submit(refuse_duplicates)
        evaluation = evaluate(columns, judgements.result(), parsed, rel_threshold, skip_unanswerable)
        checked.result()
    return evaluation


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


def write_per_query(path: str | Path, qids: Sequence[str], columns: Mapping[str, Floats]) -> None:
    """One line per query, tab-separated below a header: qid, then each column's value at full precision."""
    values = [column.tolist() for column in columns.values()]
    with atomic_write(path) as file:
        file.write("\t".join(["qid", *columns]) + "\n")
        for qid, *row in zip(qids, *values, strict=True):
            file.write("\t".join([qid, *map(repr, row)]) + "\n")
