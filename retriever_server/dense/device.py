"""Exact flat search with half-precision vectors on a device; what their error bound leaves open is scored exactly.

d' = d - m (m the mean vector) is kept as float16 with r >= |d' - half(d')|, measured; likewise q' with e. As in
codes.py, |q'.d' - half product| <= |q'| r + e (|d'| + r). The product is summed in float32: gamma_D (|q'| + e) (|d'| +
r) more.
"""

from typing import Any

import numpy as np
import torch

from retriever_server.dense import codes as dense_codes
from retriever_server.dense.codes import UP, Codes, Queries
from retriever_server.dense.flat import Flat, Scanner, Shards, best_first, limits
from retriever_server.storage import Array

BLOCK = 1 << 17  # rows per product: 64 queries make 32 MiB of scores
SPARE = 64  # candidates that a search keeps beyond k before it checks whether the bound settles the rest


class Device(Flat):
    """Vectors [N, D] with a half-precision copy on ``device`` (a CUDA device; tests use the CPU)."""

    def __init__(self, vectors: Array, codes: Codes, device: str) -> None:
        self.vectors, self.device, self.mean = vectors, device, codes.mean
        self._read = vectors.view(np.uint16) if vectors.dtype == np.float16 else vectors
        self._half = torch.empty(vectors.shape, dtype=torch.float16, device=device)
        self._offset = torch.from_numpy(np.array(codes.offset)).to(device)
        # Codes of one passage per block, with the block's largest error, norm and offset: what a bound is made of
        self._blocks: list[Codes] = []
        mean = torch.from_numpy(np.array(codes.mean)).to(device).double()
        for start in range(0, len(vectors), BLOCK):
            exact = torch.from_numpy(np.array(vectors[start : start + BLOCK])).to(device).double() - mean
            half = exact.half()
            if not torch.isfinite(half).all():
                raise ValueError("a vector is beyond half precision (65,504): search this index on the CPU")
            self._half[start : start + BLOCK] = half
            worst = [(exact - half.double()).norm(dim=1).max().item() * UP, exact.norm(dim=1).max().item() * UP]
            offset = float(np.abs(codes.offset[start : start + BLOCK]).max())
            zero, error, norm = np.zeros(1), np.array(worst[:1]), np.array(worst[1:])
            self._blocks.append(Codes(zero, zero, np.array([offset]), error, norm, codes.mean))

    def count(self, queries: Array, thresholds: Array, ties_before: Array, depth: int) -> Array:
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
                places, rows = near.nonzero().cpu().numpy().T
                for place in np.unique(places):
                    q = asked[open_[place]]
                    found = rows[places == place] + start
                    counts[q] += self._beating(queries[q], found, thresholds[q], ties_before[q])
            going_on = np.flatnonzero(counts[asked] < depth)
            if len(going_on) < len(asked):
                asked, ready = asked[going_on], ready.take(going_on)
                coarse = coarse[torch.from_numpy(going_on).to(self.device)]
            if not len(asked):
                break
        return counts

    def _beating(self, query: Array, rows: Array, threshold: Any, ties_before: Any) -> int:
        """How many of the rows, which the bound left open, beat the threshold by their exact score."""
        scores = self.score(query, rows)
        return int(((scores > threshold) | ((scores == threshold) & (rows < ties_before))).sum())

    def top(self, queries: Array, k: int) -> list[tuple[Array, Array]]:
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
                starts, one = range(0, len(self.vectors), BLOCK), coarse[q : q + 1]
                near = [(self._scores(one, start)[0] >= float(low)).nonzero()[:, 0].cpu().numpy() for start in starts]
                candidates = np.concatenate([rows + start for rows, start in zip(near, starts, strict=True)])
                scores, order = best_first(self.score(queries[q], candidates), candidates)
            results.append((scores[:size], order[:size]))
        return results

    def _half_queries(self, queries: Array) -> tuple[Queries, Any]:
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
        half = self._half[start : start + BLOCK].T
        product = torch.mm(coarse, half, out_dtype=torch.float32) if coarse.is_cuda else coarse.float() @ half.float()
        return product.add_(self._offset[start : start + BLOCK])


def split(vectors: Array, codes: Codes, n_gpu: int) -> Scanner:
    """The vectors over ``n_gpu`` CUDA devices.

    Raises:
        ValueError: torch sees fewer devices.
    """
    if not 1 <= n_gpu <= torch.cuda.device_count():
        raise ValueError(f"n_gpu is {n_gpu}, torch sees {torch.cuda.device_count()} CUDA devices here")
    step = -(-len(vectors) // n_gpu)
    starts = range(0, len(vectors), step)
    shards = [(s, Device(vectors[s : s + step], codes.rows(s, s + step), f"cuda:{i}")) for i, s in enumerate(starts)]
    return shards[0][1] if len(shards) == 1 else Shards(shards)
