"""Retrieval measures over columns: trec_eval's definitions, computed on whole arrays.

Passages are ranked by score in float32, ties by docid in descending order, whatever the run's rank column says. Formulas:
trec_eval 9 (m_recip_rank.c, m_ndcg_cut.c, m_recall.c, m_map.c, m_P.c, m_success.c); the tests hold them to pytrec_eval.
"""

import re
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from eval.columns import Columns

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
    """One measure: ``Measure("NDCG@3", "nDCG", cutoff=3, rel=None)``; ``rel`` is its own relevance threshold, if it has one."""

    name: str  # as it was asked for
    kind: Kind
    cutoff: int | None
    rel: int | None


def parse_measures(text: str) -> list[Measure]:
    """Reads names parted by spaces or commas: MRR, RR@10, nDCG@3, R@100, MAP, P@5, Success@1, R(rel=2)@10, recall_10, in any case.

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
        raise ValueError(
            f"unknown measure {name!r}: there are MRR[@k], NDCG[@k], MAP[@k], R@k, P@k, Success@k, and (rel=N) before the @"
        )
    rel, cutoff = (int(group) if group else None for group in match.group(2, 3))
    if cutoff is None and kind in ("R", "P", "Success"):
        raise ValueError(f"measure {name!r} needs a cutoff of at least 1, as in {name}@10")
    if cutoff == 0 or rel == 0:
        raise ValueError(f"measure {name!r}: cutoff and rel must be at least 1")
    if kind == "nDCG" and rel is not None:
        raise ValueError(
            f"measure {name!r}: nDCG weighs the grades themselves, it has no threshold: leave (rel={rel}) out"
        )
    return Measure(name, kind, cutoff, rel)


@dataclass(frozen=True, slots=True)
class Judged:
    """The run's rows that the qrels know, ordered by query and rank, and the qrels themselves. Queries are those of the qrels."""

    num_queries: int
    query: Ints  # [rows], index of the query
    rank: Ints  # [rows], from 1
    grade: Ints  # [rows]
    qrel_query: Ints  # [qrels], index of the query
    qrel_grade: Ints  # [qrels]


def judge(run: Columns, qrels: Columns) -> Judged:
    """Looks the run's passages up in the qrels: a table of the qrels' hashes drops most rows, pyarrow and a search find the rest."""
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
    return Judged(
        len(qrels.qids),
        query[order],
        rank[order],
        grades[found][order],
        qrels.query_of_row.astype(np.int64),
        qrels.values,
    )


def _candidates(run: Columns, qrels: Columns) -> Ints:
    """The rows whose docid may be in the qrels, by the low bits of its hash: all that are, and one in 32 of the others at most."""
    size = 1 << max(10, (32 * len(qrels.docids) - 1).bit_length())
    table = np.zeros(size, np.bool_)
    table[(qrels.docid_hashes & np.uint64(size - 1)).view(np.int64)] = True
    rows: Ints = np.flatnonzero(table[(run.docid_hashes & np.uint64(size - 1)).view(np.int64)])
    return rows


def _lookup(items: Any, values: Any) -> Ints:
    """The place in ``values`` of each of ``items``, -1 where it has none."""
    import pyarrow.compute as pc

    places: Ints = pc.fill_null(pc.index_in(items, value_set=values), -1).to_numpy().astype(np.int64)
    return places


def ranks(run: Columns, rows: Ints) -> Ints:
    """The ranks of ``rows`` within their queries, from 1, in trec_eval's order: score in float32 and then docid, both descending."""
    query, score = run.query_of_row, run.values.astype(np.float32)
    firsts = np.flatnonzero(
        np.concatenate([[True], query[1:] != query[:-1]])[: len(query)]
    )  # where a stretch of equal queries begins
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
    """The permutation that sorts the rows; docids are compared for those rows alone whose score is not their own."""
    import pyarrow as pa
    import pyarrow.compute as pc

    order: Ints = np.lexsort((-score, query)).astype(np.int64)
    tied = (query[order][1:] == query[order][:-1]) & (score[order][1:] == score[order][:-1])
    places = np.flatnonzero(np.concatenate([tied, [False]]) | np.concatenate([[False], tied]))
    if len(places):
        rows = order[places]
        table = pa.table(
            {"query": query[rows], "score": score[rows] + np.float32(0), "docid": run.docids.take(pa.array(rows))}
        )
        keys = [("query", "ascending"), ("score", "descending"), ("docid", "descending")]
        order[places] = rows[pc.sort_indices(table, sort_keys=keys).to_numpy().astype(np.int64)]
    return order


def compute(measure: Measure, judged: Judged, rel_threshold: int) -> Floats:
    """The measure of every query of the qrels, [queries], in 0..1; 0 where the run lacks the query or nothing is relevant."""
    cutoff = measure.cutoff or np.iinfo(np.int64).max
    if measure.kind == "nDCG":
        return _ndcg(judged, cutoff)
    threshold = measure.rel or rel_threshold
    relevant = judged.grade >= threshold
    query, rank = judged.query[relevant], judged.rank[relevant]
    place = _place_in_group(query)  # how many relevant passages stand at this rank or above
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
    starts = np.concatenate([[True], query[1:] != query[:-1]])[: len(query)]
    places: Ints = rows - np.maximum.accumulate(np.where(starts, rows, 0)) + 1
    return places
