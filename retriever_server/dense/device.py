"""Exact flat search with half-precision vectors on a device; what their error bound cannot settle is scored from the memory-mapped originals.

d' = d - m (m the mean vector) is kept as float16 with r >= |d' - half(d')|, measured; the queries are rounded likewise (e). As in dense_codes,
|q'.d' - half product| <= |q'| r + e (|d'| + r), and the product itself is summed in float32: gamma_D (|q'| + e) (|d'| + r) more.
"""

from typing import Any

import numpy as np

from retriever_server.dense import codes as dense_codes
from retriever_server.dense.codes import UP, Codes, Queries
from retriever_server.dense.flat import Flat, Scanner, best_first, limits
from retriever_server.storage import Array

BLOCK = 1 << 17  # rows a product: 64 queries make 32 MiB of scores
SPARE = 64  # candidates that a search keeps beyond k before it looks whether the bound settles the rest


class Device(Flat):
    """Vectors [N, D] with a half-precision copy on ``device`` (a CUDA device; the CPU does for tests)."""

    def __init__(self, vectors: Array, codes: Codes, device: str) -> None:
        import torch

        self.vectors, self.device, self.mean = vectors, device, codes.mean
        self._read = vectors.view(np.uint16) if vectors.dtype == np.float16 else vectors
        self._half = torch.empty(vectors.shape, dtype=torch.float16, device=device)
        self._offset = torch.from_numpy(np.array(codes.offset)).to(device)
        self._blocks: list[
            Codes
        ] = []  # one passage each, the block's largest error, norm and offset: what a bound is made of
        mean = torch.from_numpy(np.array(codes.mean)).to(device).double()
        for start in range(0, len(vectors), BLOCK):
            exact = torch.from_numpy(np.array(vectors[start : start + BLOCK])).to(device).double() - mean
            half = exact.half()
            if not torch.isfinite(half).all():
                raise ValueError("a vector is beyond half precision (65,504): search this index on the CPU")
            self._half[start : start + BLOCK] = half
            worst = [(exact - half.double()).norm(dim=1).max().item() * UP, exact.norm(dim=1).max().item() * UP]
            offset = float(np.abs(codes.offset[start : start + BLOCK]).max())
            nothing = np.zeros(1)
            self._blocks.append(
                Codes(nothing, nothing, np.array([offset]), np.array(worst[:1]), np.array(worst[1:]), codes.mean)
            )

    def count(self, queries: Array, thresholds: Array, ties_before: Array, depth: int) -> Array:
        import torch

        counts = np.zeros(len(queries), np.int64)
        asked = np.arange(len(queries))
        ready, coarse = self._half_queries(queries)
        for number, start in enumerate(range(0, len(self.vectors), BLOCK)):
            low, high = limits(thresholds[asked], ready.shift, self._block_bounds(ready, number))
            scores = self._scores(coarse, start)
            above = scores > torch.from_numpy(high).to(self.device)[:, None]
            counts[asked] += above.sum(1).cpu().numpy()
            open_ = np.flatnonzero(counts[asked] < depth)
            if len(open_):
                picked = torch.from_numpy(open_).to(self.device)
                near = (scores[picked] >= torch.from_numpy(low[open_]).to(self.device)[:, None]) & ~above[picked]
                self._settle(
                    near.nonzero().cpu().numpy(), asked[open_], start, queries, thresholds, ties_before, counts
                )
            going_on = np.flatnonzero(counts[asked] < depth)
            if len(going_on) < len(asked):
                asked, ready = asked[going_on], ready.take(going_on)
                coarse = coarse[torch.from_numpy(going_on).to(self.device)]
            if not len(asked):
                break
        return counts

    def _settle(
        self,
        near: Array,
        asked: Array,
        start: int,
        queries: Array,
        thresholds: Array,
        ties_before: Array,
        counts: Array,
    ) -> None:
        """Scores the passages that the bound left open, (place in ``asked``, row in the block), and counts those that beat."""
        for place in np.unique(near[:, 0]):
            query, rows = asked[place], near[near[:, 0] == place, 1] + start
            scores, threshold = self.score(queries[query], rows), thresholds[query]
            counts[query] += int(((scores > threshold) | ((scores == threshold) & (rows < ties_before[query]))).sum())

    def top(self, queries: Array, k: int) -> list[tuple[Array, Array]]:
        import torch

        ready, coarse = self._half_queries(queries)
        size, keep = min(k, len(self.vectors)), min(k + SPARE, len(self.vectors))
        best = torch.full((len(queries), 0), -torch.inf, device=self.device)
        rows = torch.zeros((len(queries), 0), dtype=torch.int64, device=self.device)
        for start in range(0, len(self.vectors), BLOCK):
            scores = self._scores(coarse, start)
            found, at = scores.topk(min(keep, scores.shape[1]), dim=1)
            best, rows = torch.cat([best, found], 1), torch.cat([rows, at + start], 1)
            best, at = best.topk(min(keep, best.shape[1]), dim=1)
            rows = rows.gather(1, at)
        bounds = np.max([self._block_bounds(ready, number) for number in range(len(self._blocks))], axis=0)
        kept, least = rows.cpu().numpy(), best.min(1).values.cpu().numpy()
        results = []
        for q in range(len(queries)):
            scores, order = best_first(self.score(queries[q], kept[q]), kept[q])
            low = limits(scores[size - 1 : size], ready.shift[q : q + 1], bounds[q : q + 1])[0][0]
            if keep < len(self.vectors) and least[q] >= low:  # something that was not kept might belong here
                near = [
                    (self._scores(coarse[q : q + 1], start)[0] >= float(low)).nonzero()[:, 0].cpu().numpy() + start
                    for start in range(0, len(self.vectors), BLOCK)
                ]
                candidates = np.concatenate(near)
                scores, order = best_first(self.score(queries[q], candidates), candidates)
            results.append((scores[:size], order[:size]))
        return results

    def _half_queries(self, queries: Array) -> tuple[Queries, Any]:
        import torch

        exact = np.ascontiguousarray(queries, np.float32).astype(np.float64)
        centred = exact - self.mean
        half = centred.astype(np.float16)
        if not np.isfinite(half).all():
            raise ValueError("a query's vector is not finite in half precision: search this index on the CPU")
        norms = [np.linalg.norm(values, axis=1) * UP for values in (centred, centred - half, exact)]
        shift = exact @ self.mean.astype(np.float64)
        ready = Queries(exact.astype(np.float32), half, np.ones(len(exact), np.float32), shift, *norms)
        return ready, torch.from_numpy(half).to(self.device)

    def _block_bounds(self, queries: Queries, number: int) -> Array:
        unit = self.vectors.shape[1] * 2.0**-23  # twice the unit roundoff: tensor cores may truncate where they add
        return dense_codes.bounds(queries, self._blocks[number], unit / (1 - unit))

    def _scores(self, coarse: Any, start: int) -> Any:
        """float32 [Q, n]: products of half-precision numbers, summed in float32, and the passages' offsets."""
        import torch

        half = self._half[start : start + BLOCK].T
        product = torch.mm(coarse, half, out_dtype=torch.float32) if coarse.is_cuda else coarse.float() @ half.float()
        return product.add_(self._offset[start : start + BLOCK])


def split(vectors: Array, codes: Codes, n_gpu: int) -> list[tuple[int, Scanner]]:
    """(first row, rows) over ``n_gpu`` CUDA devices.

    Raises:
        ValueError: there are not so many devices.
    """
    import torch

    if not 1 <= n_gpu <= torch.cuda.device_count():
        raise ValueError(f"n_gpu {n_gpu} was asked for, torch sees {torch.cuda.device_count()} CUDA devices here")
    step = -(-len(vectors) // n_gpu)
    starts = range(0, len(vectors), step)
    return [(s, Device(vectors[s : s + step], codes.rows(s, s + step), f"cuda:{i}")) for i, s in enumerate(starts)]
