"""BM25 over an index folder: full search, and exact gold ranks without one.

A passage's score is the float32 sum, over the query's distinct terms in byte order, of (times in the query) x (the term's
score in the passage). Search and gold ranks use this one sum, so that they agree to the last bit, ties included.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt

from retriever_server import bm25_build
from retriever_server.analyzer import analyze
from retriever_server.storage import load_array, load_strings

Scores = npt.NDArray[np.float32]


class Bm25Index:
    """An opened index folder. Thread-safe: nothing is written after loading but a cache that locks itself.

    Example: ``Bm25Index.load("outputs/demo/bm25").search(["who wrote Hamlet?"], k=3)``
    """

    name = "bm25"

    def __init__(self, folder: str | Path) -> None:
        """Opens the folder; the arrays stay on disk and are memory-mapped.

        Raises:
            ValueError: something is missing, damaged, of another version, or does not fit the manifest.
        """
        folder = Path(folder)
        manifest = bm25_build.Manifest.read(folder)
        self.k1, self.b = manifest.k1, manifest.b
        self.index_id, self.num_passages = manifest.index_id, manifest.num_passages
        order = load_array(folder / "docids_order.npy", "int32", manifest.num_passages)
        self._docids = load_strings(folder, "docids", manifest.num_passages, order)
        self._contents = load_strings(folder, "contents", manifest.num_passages)
        terms = load_strings(folder, "terms", manifest.num_terms)
        self._postings = load_array(folder / "postings.npy", "int32", manifest.num_postings)
        self._impacts = load_array(folder / "impacts.npy", "float32", manifest.num_postings)
        self._offsets = load_array(folder / "postings_offsets.npy", "int64", manifest.num_terms + 1)
        if self._offsets[-1] != manifest.num_postings:
            raise ValueError(f"{folder / 'postings_offsets.npy'} is damaged: build the index again with --overwrite")
        self._term: Callable[[str], int | None] = lru_cache(maxsize=1 << 18)(terms.find)

    @classmethod
    def load(cls, folder: str | Path) -> "Bm25Index":
        return cls(folder)

    @classmethod
    def build(
        cls,
        collections: str | Path | Sequence[str | Path],
        output: str | Path,
        k1: float = 0.9,
        b: float = 0.4,
        overwrite: bool = False,
        progress: bool = True,
    ) -> "Bm25Index":
        """Builds the folder unless it is there already (see bm25_build.build) and opens it."""
        paths = [collections] if isinstance(collections, str | Path) else collections
        bm25_build.build(paths, output, k1, b, overwrite, progress)
        return cls(output)

    def _scores(self, query: str) -> Scores | None:
        """Every passage's score, float32[num_passages]; None where no term of the query is in the index."""
        weights = Counter(number for term in analyze(query) if (number := self._term(term)) is not None)
        if not weights:
            return None
        scores = np.zeros(self.num_passages, np.float32)
        for number, weight in sorted(weights.items()):
            start, end = self._offsets[number], self._offsets[number + 1]
            impacts = self._impacts[start:end]
            # a term lists a passage once, so that plain indexed addition loses nothing
            scores[self._postings[start:end]] += impacts if weight == 1 else np.float32(weight) * impacts
        return scores

    def search(self, queries: Sequence[str], k: int) -> list[list[tuple[str, float]]]:
        """The best ``k`` passages that score above 0, best first, ties by index order; fewer where there are no more.

        Raises:
            ValueError: k is below 1.
        """
        if k < 1:
            raise ValueError(f"k must be at least 1, got {k}")
        results = []
        for query in queries:
            scores = self._scores(query)
            best = [] if scores is None else _top(scores, k)
            results.append([(self._docids[index], score) for index, score in best])
        return results

    def gold_ranks(self, queries: Sequence[str], golds: Sequence[Sequence[str]], depth: int) -> list[int | None]:
        """1 + the number of passages that beat the best gold: a higher score, or the same and an earlier place in the index.

        None where the gold scores 0 or its rank is beyond ``depth``.

        Raises:
            ValueError: depth is below 1, the lengths differ, a query has no gold, or a gold docid is not in the index.
        """
        if depth < 1:
            raise ValueError(f"depth must be at least 1, got {depth}")
        if len(queries) != len(golds):
            raise ValueError(f"{len(queries)} queries but {len(golds)} lists of gold docids")
        return [self._gold_rank(query, self._gold_indices(docids), depth) for query, docids in zip(queries, golds, strict=True)]

    def _gold_rank(self, query: str, golds: npt.NDArray[np.int64], depth: int) -> int | None:
        scores = self._scores(query)
        if scores is None:
            return None
        best = golds[np.argmax(scores[golds])]  # golds ascend, and argmax takes the first of equals
        threshold = scores[best]
        if threshold <= 0:
            return None
        rank = 1 + int(np.count_nonzero(scores > threshold)) + int(np.count_nonzero(scores[:best] == threshold))
        return rank if rank <= depth else None

    def _gold_indices(self, docids: Sequence[str]) -> npt.NDArray[np.int64]:
        if isinstance(docids, str) or not docids:
            raise ValueError(f"each query needs a list of at least one gold docid, got {docids!r}")
        return np.array(sorted(self._index_of(docid) for docid in docids), np.int64)

    def _index_of(self, docid: str) -> int:
        index = self._docids.find(docid)
        if index is None:
            raise ValueError(f"docid {docid!r} is not in the index ({self.num_passages} passages)")
        return index

    def contents(self, docids: Sequence[str]) -> list[str]:
        """The passages' text; ValueError where a docid is not in the index."""
        return [self._contents[self._index_of(docid)] for docid in docids]

    def missing(self, docids: Sequence[str]) -> list[str]:
        """Those docids that are not in the index."""
        return [docid for docid in docids if self._docids.find(docid) is None]


def _top(scores: Scores, k: int) -> list[tuple[int, float]]:
    """(index, score) of the ``k`` best scores above 0, best first, equal ones by index."""
    candidates = np.flatnonzero(scores)
    if len(candidates) > k:
        values = scores[candidates]
        least = np.partition(values, len(values) - k)[len(values) - k]
        above, equal = candidates[values > least], candidates[values == least]
        candidates = np.sort(np.concatenate([above, equal[: k - len(above)]]))
    values = scores[candidates]
    order = np.argsort(-values, kind="stable")
    return [(int(candidates[i]), float(values[i])) for i in order]
