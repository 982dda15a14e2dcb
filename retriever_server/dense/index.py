"""Dense retrieval over an index folder: exact flat search by inner product, and exact gold ranks without a ranking.

A score is dense_kernels.dot (float64 sum, rounded to float32); every passage has a rank, whatever the sign of its score; ties go by index order.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from retriever_server.dense.build import Manifest
from retriever_server.dense.codes import Codes
from retriever_server.dense.flat import Flat, Scanner, best_first, best_gold
from retriever_server.storage import Array, load_array, load_dictionary, load_strings

QUERY_LENGTH = 512  # tokens; the paper's
Encode = Callable[[Sequence[str]], Array]  # texts -> float32 [n, dim]


class DenseIndex:
    """An opened index folder. Thread-safe.

    Example: ``DenseIndex.load("outputs/ance", model_name_or_path="castorini/ance-msmarco-passage").search(["who wrote Hamlet?"], k=3)``
    """

    def __init__(
        self, folder: str | Path, encode: Encode, scanners: Sequence[tuple[int, Scanner]] | None = None
    ) -> None:
        """``scanners``: (first row, rows) of the folder's vectors in index order; by default one Flat over all of them.

        Raises:
            ValueError: something is missing, damaged, of another version, or does not fit the manifest.
        """
        self.folder, self._encode = Path(folder), encode
        self.manifest = manifest = Manifest.read(self.folder)
        self.name, self.index_id, self.num_passages = manifest.retriever, manifest.index_id, manifest.num_passages
        docids = load_strings(self.folder, "docids", manifest.num_passages)
        self._docids, self._find = docids, load_dictionary(self.folder, "docids", docids).find
        self._contents = load_strings(self.folder, "contents", manifest.num_passages) if manifest.texts else None
        self._scanners = list(scanners or [(0, Flat(*read_vectors(self.folder, manifest)))])

    @classmethod
    def load(
        cls,
        folder: str | Path,
        model_name_or_path: str | None = None,
        device: str = "auto",
        n_gpu: int = 1,
        max_length: int = QUERY_LENGTH,
        batch_size: int = 64,
        backend: str = "flat",
        ray_parts: int = 0,
        ray_address: str | None = None,
    ) -> "DenseIndex":
        """Opens the folder and the encoder of its queries (by default the one that the manifest names).

        ``n_gpu``: devices that share the vectors, where there is CUDA. ``backend``: "flat" (ours), or "faiss" for searches (see dense_faiss).
        ``ray_parts``: spread the vectors over so many actors of the Ray cluster at ``ray_address`` instead (see dense_ray).

        Raises:
            ValueError: as the constructor; the encoder is not the one of the passages, or its vectors are of another size.
            Unavailable: the encoder cannot be fetched.
        """
        from retriever_server.encoder import Encoder, choose_device

        manifest = Manifest.read(Path(folder))
        name = model_name_or_path or manifest.encoder
        if not name:
            raise ValueError(
                f"the vectors of {folder} were imported: name the encoder of the queries with --model_name_or_path"
            )
        device = choose_device(device)
        encoder = Encoder.load(name, device)
        if encoder.dim != manifest.dim:
            raise ValueError(
                f"{name} makes vectors of {encoder.dim} numbers, the index {folder} has {manifest.dim}: use the passages' encoder"
            )
        if manifest.encoder_sha256 and encoder.sha256 != manifest.encoder_sha256:
            raise ValueError(
                f"{name} is not the encoder of the index {folder}, which was built with {manifest.encoder}: its files differ"
            )

        def encode(texts: Sequence[str]) -> Array:
            return encoder.encode(texts, max_length, batch_size)

        scanners: list[tuple[int, Scanner]] | None = None
        if ray_parts:
            from retriever_server.dense.ray_parts import spread

            scanners = spread(Path(folder), manifest, ray_parts, device, ray_address)
        elif device.startswith("cuda"):
            from retriever_server.dense.device import split

            scanners = split(*read_vectors(Path(folder), manifest), n_gpu)
        if backend == "faiss" and ray_parts:
            raise ValueError("the faiss backend searches in this process: leave out --ray_parts, or --faiss_gpu")
        if backend == "faiss":
            from retriever_server.dense.faiss_search import FaissTop

            scanners = [
                (0, FaissTop(read_vectors(Path(folder), manifest)[0], n_gpu if device.startswith("cuda") else 0))
            ]
        elif backend != "flat":
            raise ValueError(f"backend must be flat or faiss, got {backend!r}")
        return cls(folder, encode, scanners)

    def search(self, queries: Sequence[str], k: int) -> list[list[tuple[str, float]]]:
        """The best ``k`` passages (all where there are no more), best first, ties by index order.

        Raises:
            ValueError: k is below 1.
        """
        if k < 1:
            raise ValueError(f"k must be at least 1, got {k}")
        if not queries:
            return []
        return [
            [(self._docids[row], score) for score, row in zip(scores.tolist(), rows.tolist(), strict=True)]
            for scores, rows in self.top(self._encode(queries), k)
        ]

    def gold_ranks(self, queries: Sequence[str], golds: Sequence[Sequence[str]], depth: int) -> list[int | None]:
        """1 + the number of passages that beat the best gold: a higher score, or the same and an earlier place in the index.

        None where that is beyond ``depth``.

        Raises:
            ValueError: depth is below 1, the lengths differ, a query has no gold, or a gold docid is not in the index.
        """
        if depth < 1:
            raise ValueError(f"depth must be at least 1, got {depth}")
        rows = gold_rows(queries, golds, self._row)
        if not rows:
            return []
        vectors = self._encode(queries)
        best = [self.best_gold(vector, docids) for vector, docids in zip(vectors, rows, strict=True)]
        thresholds, limits = (
            np.array([score for score, _ in best], np.float32),
            np.array([row for _, row in best], np.int64),
        )
        return [
            None if count >= depth else count + 1 for count in self.count(vectors, thresholds, limits, depth).tolist()
        ]

    def best_gold(self, vector: Array, rows: Sequence[int]) -> tuple[float, int]:
        """(score, row) of the gold that ranks first."""
        found = []
        for first, scanner, last in self._parts():
            if inside := [row - first for row in rows if first <= row < last]:
                score, row = best_gold(scanner, vector, inside)
                found.append((-score, row + first))
        score, row = min(found)
        return -score, row

    def count(self, vectors: Array, thresholds: Array, ties_before: Array, depth: int) -> Array:
        """As Scanner.count, over all parts: counts add up."""
        parts = self._parts()
        counts = self._each([lambda p=p: p[1].count(vectors, thresholds, ties_before - p[0], depth) for p in parts])  # type: ignore[misc]
        return np.asarray(sum(counts[1:], start=counts[0]))

    def top(self, vectors: Array, k: int) -> list[tuple[Array, Array]]:
        """As Scanner.top, over all parts."""
        found = self._each([lambda p=p: p[1].top(vectors, k) for p in self._parts()])  # type: ignore[misc]
        return merge(found, [first for first, _ in self._scanners], k)

    def _parts(self) -> list[tuple[int, Scanner, int]]:
        """(first row, scanner, row after the last)."""
        ends = [first for first, _ in self._scanners[1:]] + [self.num_passages]
        return [(first, scanner, end) for (first, scanner), end in zip(self._scanners, ends, strict=True)]

    @staticmethod
    def _each(calls: Sequence[Callable[[], Any]]) -> list[Any]:
        if len(calls) == 1:
            return [calls[0]()]
        with ThreadPoolExecutor(len(calls)) as pool:
            return [future.result() for future in [pool.submit(call) for call in calls]]

    def _row(self, docid: str) -> int:
        row = self._find(docid)
        if row is None:
            raise ValueError(f"docid {docid!r} is not in the index ({self.num_passages} passages)")
        return row

    def contents(self, docids: Sequence[str]) -> list[str]:
        """The passages' text; ValueError where a docid is not in the index, or it was imported without texts."""
        rows = [self._row(docid) for docid in docids]
        if self._contents is None:
            raise ValueError(f"{self.folder} was imported without --collection, so it has no texts")
        return [self._contents[row] for row in rows]

    def missing(self, docids: Sequence[str]) -> list[str]:
        """Those docids that are not in the index."""
        return [docid for docid in docids if self._find(docid) is None]


class DenseShards:
    """Several index folders of one encoder as one index, in their order: the golds' best score goes to each, and counts add up."""

    def __init__(self, shards: Sequence[DenseIndex], encode: Encode) -> None:
        """Raises ValueError where there is no shard, their vectors differ in size, or encoders differ."""
        if not shards or len({(shard.manifest.dim, shard.manifest.encoder_sha256) for shard in shards}) != 1:
            raise ValueError("shards must be at least one, and of one encoder")
        self.shards, self._encode = list(shards), encode
        self.name = shards[0].name
        self.index_id = "+".join(shard.index_id for shard in shards)
        self.num_passages = sum(shard.num_passages for shard in shards)
        self._first = np.cumsum([0, *(shard.num_passages for shard in shards)]).tolist()

    def search(self, queries: Sequence[str], k: int) -> list[list[tuple[str, float]]]:
        """As DenseIndex.search."""
        if k < 1:
            raise ValueError(f"k must be at least 1, got {k}")
        if not queries:
            return []
        vectors = self._encode(queries)
        merged = merge([shard.top(vectors, k) for shard in self.shards], self._first[:-1], k)
        return [
            [(self._docid(row), score) for score, row in zip(s.tolist(), r.tolist(), strict=True)] for s, r in merged
        ]

    def gold_ranks(self, queries: Sequence[str], golds: Sequence[Sequence[str]], depth: int) -> list[int | None]:
        """As DenseIndex.gold_ranks."""
        if depth < 1:
            raise ValueError(f"depth must be at least 1, got {depth}")
        rows = gold_rows(queries, golds, self._row)
        if not rows:
            return []
        vectors = self._encode(queries)
        best = [min(self._scored(vector, some)) for vector, some in zip(vectors, rows, strict=True)]
        thresholds, limits = (
            np.array([-score for score, _ in best], np.float32),
            np.array([row for _, row in best], np.int64),
        )
        totals = np.zeros(len(rows), np.int64)
        for shard, first in zip(self.shards, self._first, strict=False):
            left = np.flatnonzero(totals < depth)
            if len(left):
                totals[left] += shard.count(vectors[left], thresholds[left], limits[left] - first, depth)
        return [None if count >= depth else count + 1 for count in totals.tolist()]

    def _scored(self, vector: Array, rows: Sequence[int]) -> list[tuple[float, int]]:
        found = []
        for shard, first in zip(self.shards, self._first, strict=False):
            if inside := [row - first for row in rows if first <= row < first + shard.num_passages]:
                score, row = shard.best_gold(vector, inside)
                found.append((-score, row + first))
        return found

    def _row(self, docid: str) -> int:
        for shard, first in zip(self.shards, self._first, strict=False):
            if not shard.missing([docid]):
                return int(first + shard._row(docid))
        raise ValueError(f"docid {docid!r} is not in the index ({self.num_passages} passages)")

    def _docid(self, row: int) -> str:
        at = int(np.searchsorted(self._first, row, side="right")) - 1
        return self.shards[at]._docids[row - self._first[at]]

    def contents(self, docids: Sequence[str]) -> list[str]:
        """As DenseIndex.contents."""
        if absent := self.missing(docids):
            raise ValueError(f"docid {absent[0]!r} is not in the index ({self.num_passages} passages)")
        return [
            next(shard for shard in self.shards if not shard.missing([docid])).contents([docid])[0] for docid in docids
        ]

    def missing(self, docids: Sequence[str]) -> list[str]:
        """Those docids that are in no shard."""
        return [docid for docid in docids if all(shard.missing([docid]) for shard in self.shards)]


def read_vectors(folder: Path, manifest: Manifest) -> tuple[Array, Codes]:
    """(vectors [N, D], their codes) of an index folder, memory-mapped."""
    vectors = load_array(folder / "vectors.npy", manifest.dtype, manifest.num_passages * manifest.dim).reshape(
        -1, manifest.dim
    )
    return vectors, Codes.load(folder, manifest.num_passages, manifest.dim)


def gold_rows(queries: Sequence[str], golds: Sequence[Sequence[str]], row: Callable[[str], int]) -> list[list[int]]:
    """The rows of each query's golds; ValueError where lengths differ or a query has none."""
    if len(queries) != len(golds):
        raise ValueError(f"{len(queries)} queries but {len(golds)} lists of gold docids")
    for docids in golds:
        if isinstance(docids, str) or not docids:
            raise ValueError(f"each query needs a list of at least one gold docid, got {docids!r}")
    return [[row(docid) for docid in docids] for docids in golds]


def merge(parts: Sequence[Sequence[tuple[Array, Array]]], first: Sequence[int], k: int) -> list[tuple[Array, Array]]:
    """The best ``k`` of each query over parts whose rows start at ``first``."""
    merged = []
    for found in zip(*parts, strict=True):
        scores = np.concatenate([scores for scores, _ in found])
        rows = np.concatenate([rows + start for (_, rows), start in zip(found, first, strict=True)])
        best_scores, best_rows = best_first(scores, rows)
        merged.append((best_scores[:k], best_rows[:k]))
    return merged
