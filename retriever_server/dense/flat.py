"""Exact flat search on the CPU: gold ranks by counting, and the best k, from coarse and few exact products.

Every answer is that of ``kernels.dot`` over all passages, ties by row. Coarse products (int8, see codes.py; or float32)
only decide what their error bound settles.
"""

import functools
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

from retriever_server.dense import codes as dense_codes
from retriever_server.dense import kernels
from retriever_server.dense.codes import Codes, Queries
from retriever_server.storage import Array

BLOCK = 8192  # passages per coarse product
QUERIES = 256  # queries per coarse product: 8 MiB of int32


class Scanner(Protocol):
    """Rows of vectors on the CPU or a device, and the searches over all of them."""

    def score(self, query: Array, rows: Array) -> Array:
        """The exact scores of some rows, float32."""

    def count(self, queries: Array, thresholds: Array, ties_before: Array, depth: int) -> Array:
        """How many rows beat each threshold, int64 [Q]; exact below ``depth``, else any number from ``depth`` on.

        ``queries`` float32 [Q, D], ``thresholds`` float32 [Q]; rows below ``ties_before`` [Q] also beat an equal score.
        """

    def top(self, queries: Array, k: int) -> list[tuple[Array, Array]]:
        """(scores, rows) of the best ``k`` rows per query, best first, ties by row."""


class Coarse(NamedTuple):
    """Coarse products of a block: score = products x (query's scale x scale) + offset, up to an error of ``bounds``."""

    start: int  # the row of its first passage
    products: Array  # int32 or float32 [Q, n]
    scale: Array  # float32 [n]
    offset: Array  # float32 [n]
    bounds: Array  # float64 [Q]


class Flat:
    """Vectors [N, D] (float32 or float16, memory-mapped or not) on the CPU. Thread-safe."""

    def __init__(self, vectors: Array, codes: Codes | None = None, coarse: str | None = None) -> None:
        """``codes``: those of the vectors, made here if None. ``coarse``: "int8" or "float32"; by default int8 if this
        processor's product of bytes is exact."""
        self.vectors = vectors
        self._read = vectors.view(np.uint16) if vectors.dtype == np.float16 else vectors  # as kernels.dot reads them
        self.coarse = coarse or ("int8" if bytes_multiply_exactly() else "float32")
        self._codes = codes or Codes.of(vectors)
        threads = torch.get_num_threads()
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="dense") if threads > 1 else None
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The given NumPy array is not writable")  # it is only read
            self._matrix = torch.from_numpy(self._codes.codes if self.coarse == "int8" else vectors)

    def score(self, query: Array, rows: Array) -> Array:
        out = np.empty(len(rows), np.float32)
        kernels.dots(np.ascontiguousarray(query, np.float32), self._read, rows, out)
        return out

    def count(self, queries: Array, thresholds: Array, ties_before: Array, depth: int) -> Array:
        counts = np.zeros(len(queries), np.int64)
        for first in range(0, len(queries), QUERIES):
            asked = np.arange(first, min(first + QUERIES, len(queries)))
            ready = self._ready(queries[asked])
            for start in range(0, len(self.vectors), BLOCK):
                coarse = self._products(ready, start)
                wanted = thresholds[asked], ties_before[asked], counts[asked], depth
                counts[asked] += self._count_block(ready, coarse, *wanted)
                going_on = np.flatnonzero(counts[asked] < depth)
                if len(going_on) < len(asked):
                    asked, ready = asked[going_on], ready.take(going_on)
                if not len(asked):
                    break
        return counts

    def _count_block(
        self, ready: Queries, coarse: Coarse, thresholds: Array, ties_before: Array, counts: Array, depth: int
    ) -> Array:
        """How many of a block's passages beat each threshold, [Q]; ``counts``: of the blocks before."""
        start, products, scale, offset, bounds = coarse
        low, high = limits(thresholds, ready.shift, bounds)
        found = np.zeros(len(counts), np.int64)

        def run(part: slice) -> None:
            left = depth - counts[part].min()
            of_queries = products[part], ready.exact[part], ready.scale[part]
            wanted = low[part], high[part], thresholds[part], ties_before[part]
            kernels.count_block(*of_queries, scale, offset, *wanted, self._read, start, found[part], left)

        self._share(run, len(counts))
        return found

    def top(self, queries: Array, k: int) -> list[tuple[Array, Array]]:
        results: list[tuple[Array, Array]] = []
        size = min(k, len(self.vectors))
        for first in range(0, len(queries), QUERIES):
            ready = self._ready(queries[first : first + QUERIES])
            scores = np.full((len(ready.exact), size), -np.inf, np.float32)
            rows = np.full((len(ready.exact), size), len(self.vectors), np.int64)
            for start in range(0, len(self.vectors), BLOCK):
                self._top_block(ready, self._products(ready, start), scores, rows)
            results += [best_first(*pair) for pair in zip(scores, rows, strict=True)]
        return results

    def _top_block(self, ready: Queries, coarse: Coarse, scores: Array, rows: Array) -> None:
        """Takes a block's passages into the heaps of each query, ``scores`` and ``rows`` [Q, k]."""
        start, products, scale, offset, bounds = coarse

        def run(part: slice) -> None:
            of_queries = products[part], ready.exact[part], ready.scale[part]
            slack = ready.shift[part], bounds[part]
            kernels.top_block(*of_queries, scale, offset, *slack, self._read, start, scores[part], rows[part])

        self._share(run, len(scores))

    def _ready(self, queries: Array) -> Queries:
        return Queries.of(queries, self._codes.mean if self.coarse == "int8" else None)

    def _products(self, queries: Queries, start: int) -> Coarse:
        block = self._codes.rows(start, start + BLOCK)
        matrix, coarse = self._matrix[start : start + len(block.scale)], torch.from_numpy(queries.coarse)
        if self.coarse == "int8":
            # torch 2.13 misreads a matrix of one column: its strides do not tell it from its transpose
            product = torch._int_mm(coarse, matrix.T) if matrix.shape[1] > 1 else coarse.int() * matrix.T.int()
            bounds = dense_codes.bounds(queries, block, 2**-21)
            return Coarse(start, product.numpy(), block.scale, block.offset, bounds)
        ones, zeros = np.ones(len(block.scale), np.float32), np.zeros(len(block.scale), np.float32)
        bounds = plain_bounds(queries.full_length, block, self.vectors.shape[1])
        return Coarse(start, torch.mm(coarse, matrix.float().T).numpy(), ones, zeros, bounds)

    def _share(self, run: Callable[[slice], None], queries: int) -> None:
        """Runs over the queries, in one slice per thread of torch."""
        if self._pool is None or queries < 4:
            run(slice(0, queries))
            return
        step = -(-queries // self._pool._max_workers)
        list(self._pool.map(run, [slice(start, start + step) for start in range(0, queries, step)]))


class Shards:
    """Scanners over consecutive rows as one Scanner."""

    def __init__(self, shards: Sequence[tuple[int, Scanner]]) -> None:
        """``shards``: (first row, scanner) in row order."""
        self.firsts, self.scanners = [first for first, _ in shards], [scanner for _, scanner in shards]

    def score(self, query: Array, rows: Array) -> Array:
        owners = np.searchsorted(self.firsts, rows, side="right") - 1
        out = np.empty(len(rows), np.float32)
        for owner in np.unique(owners):
            inside = owners == owner
            out[inside] = self.scanners[owner].score(query, rows[inside] - self.firsts[owner])
        return out

    def count(self, queries: Array, thresholds: Array, ties_before: Array, depth: int) -> Array:
        found = self._map(lambda first, shard: shard.count(queries, thresholds, ties_before - first, depth))
        return np.asarray(np.sum(found, axis=0))

    def top(self, queries: Array, k: int) -> list[tuple[Array, Array]]:
        merged = []
        for found in zip(*self._map(lambda _, shard: shard.top(queries, k)), strict=True):
            scores = np.concatenate([scores for scores, _ in found])
            rows = np.concatenate([rows + first for first, (_, rows) in zip(self.firsts, found, strict=True)])
            scores, rows = best_first(scores, rows)
            merged.append((scores[:k], rows[:k]))
        return merged

    def _map(self, call: Callable[[int, Scanner], Any]) -> list[Any]:
        with ThreadPoolExecutor(len(self.scanners)) as pool:
            return list(pool.map(call, self.firsts, self.scanners))


def count_beating(scanner: Scanner, queries: Array, gold_rows: Sequence[Sequence[int]], depth: int) -> Array:
    """How many passages beat the best gold of each query, int64 [Q]; exact below ``depth``, else any number from it on.

    ``queries`` float32 [Q, D], ``gold_rows``: one or more rows per query. A passage beats with a higher score, or with
    the same and a lower row. ``count_beating(Flat(numpy.eye(3, dtype="float32")), [[1, 3, 2]], [[0, 2]], 100)`` is
    ``[1]``.
    """
    queries = np.ascontiguousarray(queries, np.float32)
    best = [best_gold(scanner, query, rows) for query, rows in zip(queries, gold_rows, strict=True)]
    thresholds = np.array([score for score, _ in best], np.float32)
    return scanner.count(queries, thresholds, np.array([row for _, row in best], np.int64), depth)


def best_gold(scanner: Scanner, query: Array, rows: Sequence[int]) -> tuple[float, int]:
    """(score, row) of the gold that ranks first."""
    ascending = np.array(sorted(rows), np.int64)
    scores = scanner.score(query, ascending)
    at = int(np.argmax(scores))  # the first of equals
    return float(scores[at]), int(ascending[at])


def best_first(scores: Array, rows: Array) -> tuple[Array, Array]:
    order = np.lexsort((rows, -scores))
    return scores[order], rows[order]


def limits(thresholds: Array, shifts: Array, bounds: Array) -> tuple[Array, Array]:
    """(low, high) float32 [Q]: coarse scores above ``high`` beat the threshold, those below ``low`` do not."""
    exact = thresholds.astype(np.float64)
    bounds = bounds + (np.abs(exact) + np.abs(shifts)) * 2**-22  # scores are rounded to float32
    low, high = (exact - shifts - bounds).astype(np.float32), (exact - shifts + bounds).astype(np.float32)
    return np.nextafter(low, np.float32(-np.inf)), np.nextafter(high, np.float32(np.inf))


def plain_bounds(query_lengths: Array, block: Codes, dim: int) -> Array:
    """Of a float32 sum in any order, float64 [Q]: gamma_D |q| |d| (Higham, Accuracy and Stability, section 3.1)."""
    unit = dim * 2.0**-24
    norm = float(block.norm.max()) + float(np.linalg.norm(block.mean.astype(np.float64)))
    return np.asarray(query_lengths * (unit / (1 - unit) + 1e-12) * norm)


@functools.cache
def bytes_multiply_exactly() -> bool:
    """Whether torch has an exact product of int8 matrices: processors without VNNI may saturate its sums at 16 bits."""
    extremes: Any = torch.tensor([[127, 127], [-127, -127], [127, -127], [-127, 127]], dtype=torch.int8).repeat(8, 128)
    if not hasattr(torch, "_int_mm"):
        return False
    try:
        found = torch._int_mm(extremes, extremes.T)
    except (RuntimeError, NotImplementedError):
        return False
    return bool((found == extremes.int() @ extremes.int().T).all())
