"""Exact flat search over vectors on the CPU: gold ranks by counting, and the best k, from coarse products and few exact ones.

Every answer is that of ``dense_kernels.dot`` over all passages, ties by row. Coarse products (int8, see dense_codes; or float32) only decide what
their error bound settles.
"""

import functools
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import numpy as np

from retriever_server.dense import codes as dense_codes
from retriever_server.dense.codes import Codes, Queries
from retriever_server.storage import Array

BLOCK = 8192  # passages a coarse product
QUERIES = 256  # queries a coarse product: 8 MiB of int32


class Scanner(Protocol):
    """Rows of vectors somewhere, on the CPU or a device, which counts and searches over several of them add up."""

    def score(self, query: Array, rows: Array) -> Array:
        """THE scores of some rows, float32."""

    def count(self, queries: Array, thresholds: Array, ties_before: Array, depth: int) -> Array:
        """How many rows beat each threshold, int64 [Q], exact below ``depth``; from there on, some number that is at least ``depth``.

        ``queries`` float32 [Q, D]; ``thresholds`` float32 [Q]; rows below ``ties_before`` [Q] beat with an equal score too.
        """

    def top(self, queries: Array, k: int) -> list[tuple[Array, Array]]:
        """(scores, rows) of the best ``k`` rows of each query, best first, ties by row."""


class Flat:
    """Vectors [N, D] (float32 or float16, memory-mapped or not) on the CPU. Thread-safe."""

    def __init__(self, vectors: Array, codes: Codes | None = None, coarse: str | None = None) -> None:
        """``codes``: those of the vectors, made here where none are given. ``coarse``: "int8" or "float32"; by default int8 where this
        processor's product of bytes is exact."""
        import torch

        self.vectors = vectors
        self._read = vectors.view(np.uint16) if vectors.dtype == np.float16 else vectors  # as dense_kernels wants them
        self.coarse = coarse or ("int8" if bytes_multiply_exactly() else "float32")
        self._codes = codes or Codes.of(vectors)
        self._pool = (
            ThreadPoolExecutor(torch.get_num_threads(), thread_name_prefix="dense")
            if torch.get_num_threads() > 1
            else None
        )
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The given NumPy array is not writable")  # nor is it written to
            self._matrix = torch.from_numpy(self._codes.codes if self.coarse == "int8" else vectors)

    def score(self, query: Array, rows: Array) -> Array:
        from retriever_server.dense.kernels import dots

        out = np.empty(len(rows), np.float32)
        dots(np.ascontiguousarray(query, np.float32), self._read, rows, out)
        return out

    def count(self, queries: Array, thresholds: Array, ties_before: Array, depth: int) -> Array:
        from retriever_server.dense.kernels import count_block

        counts = np.zeros(len(queries), np.int64)
        for first_query in range(0, len(queries), QUERIES):
            asked = np.arange(first_query, min(first_query + QUERIES, len(queries)))
            ready = self._ready(queries[asked])
            for start in range(0, len(self.vectors), BLOCK):
                block = self._codes.rows(start, start + BLOCK)
                low, high = limits(thresholds[asked], ready.shift, self._bounds(ready, block))
                products, scale, offset = self._products(ready, block, start)
                found = np.zeros(len(asked), np.int64)

                def run(
                    part: slice,
                    ready: Queries = ready,
                    found: Array = found,
                    asked: Array = asked,
                    coarse: tuple[Array, ...] = (products, scale, offset, low, high),
                    start: int = start,
                ) -> None:
                    products, scale, offset, low, high = coarse
                    rest = depth - counts[asked[part]].min()
                    count_block(
                        products[part],
                        ready.exact[part],
                        ready.scale[part],
                        scale,
                        offset,
                        low[part],
                        high[part],
                        thresholds[asked[part]],
                        ties_before[asked[part]],
                        self._read,
                        start,
                        found[part],
                        rest,
                    )

                self._share(run, len(asked))
                counts[asked] += found
                going_on = np.flatnonzero(counts[asked] < depth)
                if len(going_on) < len(asked):
                    asked, ready = asked[going_on], ready.take(going_on)
                if not len(asked):
                    break
        return counts

    def top(self, queries: Array, k: int) -> list[tuple[Array, Array]]:
        from retriever_server.dense.kernels import top_block

        results: list[tuple[Array, Array]] = []
        size = min(k, len(self.vectors))
        for first_query in range(0, len(queries), QUERIES):
            ready = self._ready(queries[first_query : first_query + QUERIES])
            scores = np.full((len(ready.exact), size), -np.inf, np.float32)
            rows = np.full((len(ready.exact), size), len(self.vectors), np.int64)
            for start in range(0, len(self.vectors), BLOCK):
                block = self._codes.rows(start, start + BLOCK)
                products, scale, offset = self._products(ready, block, start)
                bounds = self._bounds(ready, block)

                def run(
                    part: slice,
                    ready: Queries = ready,
                    scores: Array = scores,
                    rows: Array = rows,
                    coarse: tuple[Array, ...] = (products, scale, offset, bounds),
                    start: int = start,
                ) -> None:
                    products, scale, offset, bounds = coarse
                    top_block(
                        products[part],
                        ready.exact[part],
                        ready.scale[part],
                        scale,
                        offset,
                        ready.shift[part],
                        bounds[part],
                        self._read,
                        start,
                        scores[part],
                        rows[part],
                    )

                self._share(run, len(ready.exact))
            results += [best_first(*pair) for pair in zip(scores, rows, strict=True)]
        return results

    def _ready(self, queries: Array) -> Queries:
        return Queries.of(queries, self._codes.mean if self.coarse == "int8" else None)

    def _bounds(self, queries: Queries, block: Codes) -> Array:
        if self.coarse == "int8":
            return dense_codes.bounds(queries, block, 2**-21)
        return plain_bounds(queries.full_length, block, self.vectors.shape[1])

    def _products(self, queries: Queries, block: Codes, start: int) -> tuple[Array, Array, Array]:
        """The coarse products of a block, [Q, n], with the scale and offset of each passage."""
        import torch

        matrix, coarse = self._matrix[start : start + len(block.scale)], torch.from_numpy(queries.coarse)
        if self.coarse == "int8":
            # torch 2.13 misreads a matrix of one column: its strides do not tell it from its transpose
            product = torch._int_mm(coarse, matrix.T) if matrix.shape[1] > 1 else coarse.int() * matrix.T.int()
            return product.numpy(), block.scale, block.offset
        ones, zeros = np.ones(len(block.scale), np.float32), np.zeros(len(block.scale), np.float32)
        return torch.mm(coarse, matrix.float().T).numpy(), ones, zeros

    def _share(self, run: Callable[[slice], None], queries: int) -> None:
        """Runs over the queries, in as many parts as torch has threads."""
        if self._pool is None or queries < 4:
            run(slice(0, queries))
            return
        step = -(-queries // self._pool._max_workers)
        list(self._pool.map(run, [slice(start, start + step) for start in range(0, queries, step)]))


def count_beating(
    vectors: Array, queries: Array, gold_rows: Sequence[Sequence[int]], depth: int, scanner: Scanner | None = None
) -> Array:
    """How many passages beat the best gold of each query, int64 [Q]; exact below ``depth``, else some number that is at least ``depth``.

    ``vectors`` [N, D], ``queries`` float32 [Q, D], ``gold_rows``: one or more rows a query. A passage beats with a higher score, or with the
    same and a lower row. ``count_beating(numpy.eye(3, dtype="float32"), [[1, 3, 2]], [[0, 2]], 100)`` is ``[1]``.
    """
    scanner = scanner or Flat(vectors)
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
    """(low, high) float32 [Q]: a coarse score above ``high`` certainly beats the threshold, one below ``low`` certainly does not."""
    exact = thresholds.astype(np.float64)
    bounds = bounds + (np.abs(exact) + np.abs(shifts)) * 2**-22  # scores are rounded to float32
    low, high = (exact - shifts - bounds).astype(np.float32), (exact - shifts + bounds).astype(np.float32)
    return np.nextafter(low, np.float32(-np.inf)), np.nextafter(high, np.float32(np.inf))


def plain_bounds(query_lengths: Array, block: Codes, dim: int) -> Array:
    """Of a float32 product summed in any order: gamma_D |q| |d| (Higham, Accuracy and Stability, section 3.1), float64 [Q]."""
    unit = dim * 2.0**-24
    norm = float(block.norm.max()) + float(np.linalg.norm(block.mean.astype(np.float64)))
    return np.asarray(query_lengths * (unit / (1 - unit) + 1e-12) * norm)


@functools.cache
def bytes_multiply_exactly() -> bool:
    """Whether torch's product of int8 matrices is there and exact: processors without VNNI may saturate its sums at 16 bits."""
    import torch

    extremes: Any = torch.tensor([[127, 127], [-127, -127], [127, -127], [-127, 127]], dtype=torch.int8).repeat(8, 128)
    if not hasattr(torch, "_int_mm"):
        return False
    try:
        found = torch._int_mm(extremes, extremes.T)
    except (RuntimeError, NotImplementedError):
        return False
    return bool((found == extremes.int() @ extremes.int().T).all())
