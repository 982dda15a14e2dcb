"""Exact gold ranks of a batch of queries: the choice of columns, and the threads' shares (the loops are in gold.py)."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt

from retriever_server.bm25 import gold
from retriever_server.bm25.gold import Batch, Columns, Golds, Plan
from retriever_server.bm25.kernels import Postings

Array = npt.NDArray[Any]

# Approximate nanoseconds on one core: adding a posting to a sum, writing it into a column; per passage, clearing a
# column
# and adding it. The time of a batch hardly depends on them (97 to 605 columns chosen: within 10%).
ADD_POSTING, WRITE_POSTING, CLEAR_COLUMN, ADD_COLUMN = 0.9, 0.9, 0.02, 0.012
MAX_COLUMNS = 1024
CACHE_BYTES = 8 << 20  # of the last-level cache for a thread's columns
SHORTEST_WINDOW, LONGEST_WINDOW = 1 << 12, 1 << 15  # passages whose sums are in use at a time: 8 to 64 KiB of uint16
WORTH_SHARING = 64  # queries; fewer are prepared before a second thread has woken up
COLUMN_UNITS, SUM_UNITS = 254, 60_000  # the largest score in a column, and of a query, before rounding up

_scratch = threading.local()


def ranks(
    batch: Batch, depth: int, postings: Postings, num_passages: int, pool: ThreadPoolExecutor, threads: int
) -> Array:
    """1 + the passages that beat each query's best gold; 0 if it scores 0, or ``depth`` passages beat it.

    The threads share the queries while preparing them, and then the passages, so that one query uses all threads.
    """
    queries, terms = len(batch.term_ends) - 1, len(batch.starts)

    def share_queries(work: Callable[[Array], None]) -> None:
        if queries < WORTH_SHARING:
            work(np.arange(queries))
        else:
            list(pool.map(work, (np.arange(thread, queries, threads) for thread in range(threads))))

    golds = Golds(
        gold=np.empty(queries, np.int64),
        threshold=np.empty(queries, np.float32),
        error=np.empty(queries),
        order=np.empty(terms, np.int64),
        num_head=np.empty(queries, np.int64),
    )
    share_queries(lambda share: gold.score_golds(share, num_passages, batch, golds, postings))
    columns = choose_columns(batch, golds, num_passages)
    repeats = np.where(columns.of_term < 0, 0, batch.times)
    unit, sum_type = units(batch, columns, repeats, postings)
    plan = Plan(
        scanned=np.empty(terms, np.int64),
        scanned_rest=np.empty(terms + queries, np.float32),
        num_scanned=np.empty(queries, np.int64),
        scanned_head=np.empty(queries, np.int64),
        column_ends=np.r_[0, np.cumsum(repeats)][batch.term_ends],
        columns=np.empty(repeats.sum(), np.int64),
        columns_rest=np.empty(repeats.sum() + queries, np.float32),
        columns_head=np.empty(queries, np.int64),
    )
    share_queries(lambda share: gold.arrange(share, batch, golds, columns, plan, postings))
    work = gold.Work(num_passages, batch, golds, columns, plan, postings, unit)
    beaten = np.zeros((threads, queries), np.int64)

    def scan(me: int) -> None:
        low, high = (num_passages * part // threads for part in (me, me + 1))
        scratch = _arrays(len(columns.starts), sum_type)
        gold.scan(low, high, me, depth, work, *scratch, beaten)

    list(pool.map(scan, range(threads)))
    total = beaten.sum(axis=0)
    return np.where((golds.gold < 0) | (total >= depth), 0, total + 1)


def choose_columns(batch: Batch, golds: Golds, num_passages: int) -> Columns:
    """The terms that are cheaper as a column than posting by posting for each query that has them in its head."""
    lengths = np.diff(batch.term_ends)
    place = np.arange(len(batch.starts)) - np.repeat(batch.term_ends[:-1], lengths)  # in its query's order
    query = np.repeat(np.arange(len(golds.gold)), lengths)
    in_head = np.empty(len(batch.starts), np.bool_)
    in_head[golds.order + batch.term_ends[query]] = (place < golds.num_head[query]) & (golds.gold[query] >= 0)
    distinct, first, number = np.unique(batch.starts, return_index=True, return_inverse=True)
    uses = np.bincount(number[in_head], minlength=len(distinct))
    density = (batch.ends[first] - distinct) / num_passages
    gain = density * (ADD_POSTING * uses - WRITE_POSTING) - CLEAR_COLUMN - ADD_COLUMN * uses
    best = np.argsort(-gain, kind="stable")[:MAX_COLUMNS]
    best = np.sort(best[gain[best] > 0])
    column = np.full(len(distinct), -1)
    column[best] = np.arange(len(best))
    example = first[best]
    idf = batch.weights[example] / batch.times[example].astype(np.float32)
    return Columns(distinct[best], batch.ends[example], idf, column[number])


def units(
    batch: Batch, columns: Columns, repeats: Array, postings: Postings
) -> tuple[float, type[np.unsignedinteger[Any]]]:
    """The unit in which scores fit a byte per column and sums do not overflow; and the type of the sums."""
    bounds = batch.weights * postings.gain[batch.max_codes]
    reach = np.diff(np.r_[0, np.cumsum(bounds, dtype=np.float64)][batch.term_ends]).max(initial=0)
    in_column = (bounds / batch.times)[columns.of_term >= 0].max(initial=0)
    unit = max(reach / SUM_UNITS, float(in_column) / COLUMN_UNITS, float(np.finfo(np.float32).tiny))
    # Each score is rounded up by less than a unit: 65,535 hold 5,000 such roundings beside the scores.
    roundings = np.diff(np.r_[0, np.cumsum(np.maximum(repeats, 1))][batch.term_ends]).max(initial=0)
    return unit, np.uint16 if roundings <= 5000 else np.uint32


def _arrays(num_columns: int, sum_type: type[np.unsignedinteger[Any]]) -> tuple[Array, Array, Array]:
    """This thread's columns, sums and found passages, for windows that fit in the cache; reused by later calls."""
    window = min(max(1 << (CACHE_BYTES // max(num_columns, 1)).bit_length() - 1, SHORTEST_WINDOW), LONGEST_WINDOW)
    if not hasattr(_scratch, "columns") or len(_scratch.columns) < num_columns * window:
        _scratch.columns = np.empty(max(num_columns * window, CACHE_BYTES), np.uint8)
    if not hasattr(_scratch, "found"):
        _scratch.found = np.empty(LONGEST_WINDOW, np.int32)
        _scratch.sums = {}
    sums = _scratch.sums.setdefault(sum_type, np.empty(LONGEST_WINDOW, sum_type))[:window]
    return _scratch.columns[: num_columns * window].reshape(num_columns, window), sums, _scratch.found
