"""The compiled loops of dense search: which passages could pass a threshold, and the inner product that decides.

``scaled[j] = products[q, j] x (query_scale x scale[j]) + offset[j]`` approximates a passage's score, shifted by a
number of the query, within the caller's bound; only passages that it leaves open are scored with ``dot``.
"""

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numpy as np
from numba import njit, types
from numba.extending import overload

CHUNK = 512  # passages that are compared without a branch before single ones are tested
# numba has no float16: its bits are looked up here
HALVES = np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32)

Array = Any
F = TypeVar("F", bound=Callable[..., Any])


def compiled(function: F) -> F:
    """Compiled at the first call and cached beside this file; runs without the GIL."""
    return cast(F, njit(nogil=True, cache=True)(function))


def number(value):  # type: ignore[no-untyped-def]  # numba needs the same signature here and below
    """A float32 as it is; the bits of a float16 (uint16) as float32."""
    return HALVES[value] if isinstance(value, np.uint16) else value


@overload(number)
def _number(value):  # type: ignore[no-untyped-def]
    return (lambda value: HALVES[value]) if isinstance(value, types.Integer) else (lambda value: value)


element: Any = number


@compiled
def dot(query: Array, row: Array) -> np.float32:
    """A passage's score: the inner product (float32; or ``row`` the bits of float16), summed in float64 in one fixed
    order, rounded to float32.

    Products of float32 numbers are exact in float64, so the sum's error is at most about 1e-13 of |query| |row|, and
    equal vectors score equally.
    """
    size = len(query)
    whole = size - size % 8
    a0 = a1 = a2 = a3 = a4 = a5 = a6 = a7 = 0.0
    for i in range(0, whole, 8):
        a0 += np.float64(query[i]) * np.float64(element(row[i]))
        a1 += np.float64(query[i + 1]) * np.float64(element(row[i + 1]))
        a2 += np.float64(query[i + 2]) * np.float64(element(row[i + 2]))
        a3 += np.float64(query[i + 3]) * np.float64(element(row[i + 3]))
        a4 += np.float64(query[i + 4]) * np.float64(element(row[i + 4]))
        a5 += np.float64(query[i + 5]) * np.float64(element(row[i + 5]))
        a6 += np.float64(query[i + 6]) * np.float64(element(row[i + 6]))
        a7 += np.float64(query[i + 7]) * np.float64(element(row[i + 7]))
    for i in range(whole, size):
        a0 += np.float64(query[i]) * np.float64(element(row[i]))
    return np.float32(((a0 + a1) + (a2 + a3)) + ((a4 + a5) + (a6 + a7)))


@compiled
def dots(query: Array, vectors: Array, rows: Array, out: Array) -> None:
    """The scores of some rows of ``vectors``, into ``out``."""
    for i in range(len(rows)):
        out[i] = dot(query, vectors[rows[i]])


@compiled
def reaching(products: Array, query_scale: np.float32, scale: Array, offset: Array, low: np.float32) -> int:
    """How many of a chunk's passages reach ``low``; a loop without a branch, which the compiler vectorises."""
    found = 0
    for j in range(len(products)):
        found += np.float32(products[j]) * (query_scale * scale[j]) + offset[j] >= low
    return found


@compiled
def count_block(
    products: Array,
    queries: Array,
    query_scales: Array,
    scale: Array,
    offset: Array,
    low: Array,
    high: Array,
    thresholds: Array,
    ties_before: Array,
    vectors: Array,
    first: int,
    counts: Array,
    depth: int,
) -> None:
    """Adds to ``counts`` the block's passages that beat each query's threshold; a query stops at ``depth``.

    ``products`` [Q, n] is the block's approximation, whose first passage is row ``first`` of ``vectors``. Above
    ``high`` a passage beats for sure, below ``low`` it does not. An equal score beats if its row is below
    ``ties_before``.
    """
    size = products.shape[1]
    for q in range(len(counts)):
        query_scale = query_scales[q]
        for start in range(0, size, CHUNK):
            end = min(start + CHUNK, size)
            if reaching(products[q, start:end], query_scale, scale[start:end], offset[start:end], low[q]) == 0:
                continue
            for j in range(start, end):
                value = np.float32(products[q, j]) * (query_scale * scale[j]) + offset[j]
                if value > high[q]:
                    counts[q] += 1
                elif value >= low[q]:
                    row = first + j
                    score = dot(queries[q], vectors[row])
                    counts[q] += score > thresholds[q] or (score == thresholds[q] and row < ties_before[q])
            if counts[q] >= depth:
                break


@compiled
def worse(score: np.float32, row: int, other_score: np.float32, other_row: int) -> bool:
    """Whether a passage ranks behind another: a lower score, or the same and a later row."""
    return bool(score < other_score or (score == other_score and row > other_row))


@compiled
def keep(scores: Array, rows: Array, score: np.float32, row: int) -> None:
    """Replaces the worst passage of a heap, which is its first, and restores the heap."""
    size, at = len(scores), 0
    while True:
        child = 2 * at + 1
        if child >= size:
            break
        if child + 1 < size and worse(scores[child + 1], rows[child + 1], scores[child], rows[child]):
            child += 1
        if worse(score, row, scores[child], rows[child]):
            break
        scores[at], rows[at] = scores[child], rows[child]
        at = child
    scores[at], rows[at] = score, row


@compiled
def lowest(score: np.float32, slack: float) -> np.float32:
    """score - slack, rounded down (the margin covers the rounding to float32 of this and of the scores)."""
    return np.float32(score - slack - (abs(score) + abs(slack)) * 2.0**-22)


@compiled
def top_block(
    products: Array,
    queries: Array,
    query_scales: Array,
    scale: Array,
    offset: Array,
    shifts: Array,
    bounds: Array,
    vectors: Array,
    first: int,
    heap_scores: Array,
    heap_rows: Array,
) -> None:
    """Puts a block's passages into each query's heap of the best k; later calls must have higher rows.

    A passage's score is at most its approximation + ``shifts`` + ``bounds`` of the query. Empty places of a heap hold
    (-inf, a row beyond all).
    """
    size = products.shape[1]
    for q in range(products.shape[0]):
        query_scale, slack = query_scales[q], shifts[q] + bounds[q]
        for start in range(0, size, CHUNK):
            end = min(start + CHUNK, size)
            low = lowest(heap_scores[q, 0], slack)
            if reaching(products[q, start:end], query_scale, scale[start:end], offset[start:end], low) == 0:
                continue
            for j in range(start, end):
                value = np.float32(products[q, j]) * (query_scale * scale[j]) + offset[j]
                if value >= low:
                    row = first + j
                    score = dot(queries[q], vectors[row])
                    if worse(heap_scores[q, 0], heap_rows[q, 0], score, row):
                        keep(heap_scores[q], heap_rows[q], score, row)
                        low = lowest(heap_scores[q, 0], slack)
