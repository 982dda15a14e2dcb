"""BM25 over an index folder, to the last bit as Lucene scores: the best k passages, and exact gold ranks without a ranking.

A passage's score is the float32 of the double sum of its terms' float32 scores (retriever_server/bm25/formula.py); doubles hold such sums
without rounding but for wildly unlike terms, so that their order does not matter, and search and gold ranks agree, ties included.
"""

import os
import threading
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from retriever_server.bm25 import build as bm25_build
from retriever_server.bm25 import gold as bm25_gold
from retriever_server.bm25 import kernels as bm25_kernels
from retriever_server.bm25 import ranks as bm25_ranks
from retriever_server.storage import load_array, load_dictionary, load_strings
from retriever_server.text.analyzer import analyze

Bag = tuple[tuple[int, int], ...]  # a query's (term, times)
Item = tuple[Bag, tuple[int, ...]]  # with its golds, ascending
Lists = tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.float32], npt.NDArray[Any]]


class Bm25Index:
    """An opened index folder. Thread-safe: nothing is written after loading but a cache that locks itself.

    Example: ``Bm25Index.load("outputs/demo/bm25").search(["who wrote Hamlet?"], k=3)``
    """

    name = "bm25"
    window = bm25_kernels.WINDOW

    def __init__(self, folder: str | Path, threads: int | None = None) -> None:
        """Opens the folder; the arrays stay on disk and are memory-mapped. A call spreads its queries over ``threads`` (one a core).

        Raises:
            ValueError: something is missing, damaged, of another version, or does not fit the manifest.
        """
        folder = Path(folder)
        manifest = bm25_build.Manifest.read(folder)
        self.k1, self.b = manifest.k1, manifest.b
        self.index_id, self.num_passages = manifest.index_id, manifest.num_passages
        self._docids = load_strings(folder, "docids", manifest.num_passages)
        self._index_by_docid = load_dictionary(folder, "docids", self._docids)
        self._contents = load_strings(folder, "contents", manifest.num_passages)
        terms = load_dictionary(folder, "terms", load_strings(folder, "terms", manifest.num_terms))
        self._starts = load_array(folder / "term_starts.npy", "int64", manifest.num_terms)
        self._frequencies = load_array(folder / "term_frequencies.npy", "int32", manifest.num_terms)
        self._idf = load_array(folder / "term_idf.npy", "float32", manifest.num_terms)
        self._max_codes = load_array(folder / "term_max_codes.npy", manifest.code_type, manifest.num_terms)
        docs = load_array(folder / "postings_docs.npy", "int32", manifest.num_postings)
        codes = load_array(folder / "postings_codes.npy", manifest.code_type, manifest.num_postings)
        tf, inverse_norm, gain = (
            load_array(folder / f"code_{name}.npy", "float32", manifest.num_codes)
            for name in ("tf", "inverse_norm", "gain")
        )
        if int(self._frequencies.sum(dtype=np.int64)) != manifest.num_postings:
            raise ValueError(f"{folder / 'term_frequencies.npy'} is damaged: build the index again with --overwrite")
        self._postings = bm25_kernels.Postings(docs, codes, tf, inverse_norm, gain)
        self._term = lru_cache(maxsize=1 << 18)(terms.find)
        self._threads = threads or len(os.sched_getaffinity(0))
        self._pool = ThreadPoolExecutor(self._threads, thread_name_prefix="bm25")
        self._scratch = threading.local()

    @classmethod
    def load(cls, folder: str | Path, threads: int | None = None) -> "Bm25Index":
        return cls(folder, threads)

    @classmethod
    def build(
        cls,
        collections: str | Path | Sequence[str | Path],
        output: str | Path,
        k1: float = 0.9,
        b: float = 0.4,
        overwrite: bool = False,
        progress: bool = True,
        processes: int | None = None,
    ) -> "Bm25Index":
        """Builds the folder unless it is there already (see bm25_build.build) and opens it."""
        paths = [collections] if isinstance(collections, str | Path) else collections
        bm25_build.build(paths, output, k1, b, overwrite, progress, processes)
        return cls(output)

    def _bag(self, text: str) -> Bag:
        """The query's terms that are in the index, as (number, times), in order of appearance."""
        return tuple(Counter(number for term in analyze(text) if (number := self._term(term)) is not None).items())

    def _lists(self, bags: Sequence[Bag]) -> tuple[Lists, npt.NDArray[np.int64]]:
        """Where the postings of all bags' terms start and end, their weights and largest codes; and where each bag's terms end."""
        pairs = np.array([pair for bag in bags for pair in bag], np.int64).reshape(-1, 2)
        numbers, times = pairs[:, 0], pairs[:, 1].astype(np.float32)
        starts = self._starts[numbers]
        lists = starts, starts + self._frequencies[numbers], times * self._idf[numbers], self._max_codes[numbers]
        return lists, np.cumsum([0, *map(len, bags)])

    def search(self, queries: Sequence[str], k: int) -> list[list[tuple[str, float]]]:
        """The best ``k`` passages that score above 0, best first, ties by index order; fewer where there are no more.

        Raises:
            ValueError: k is below 1.
        """
        if k < 1:
            raise ValueError(f"k must be at least 1, got {k}")
        return list(self._pool.map(lambda query: self._search(query, min(k, self.num_passages)), queries))

    def _search(self, text: str, k: int) -> list[tuple[str, float]]:
        (starts, ends, weights, _), _ = self._lists([self._bag(text)])
        found, scores = np.empty(k, np.int64), np.empty(k, np.float32)
        count = bm25_kernels.best(
            starts, ends, weights, k, self.num_passages, self._postings, self._zeros(), found, scores
        )
        return [
            (self._docids[doc], score)
            for doc, score in zip(found[:count].tolist(), scores[:count].tolist(), strict=True)
        ]

    def gold_ranks(self, queries: Sequence[str], golds: Sequence[Sequence[str]], depth: int) -> list[int | None]:
        """1 + the number of passages that beat the best gold: a higher score, or the same and an earlier place in the index.

        None where the gold scores 0 or its rank is beyond ``depth``. Queries of the same terms and golds, as the samples of one prompt often are,
        are ranked once.

        Raises:
            ValueError: depth is below 1, the lengths differ, a query has no gold, or a gold docid is not in the index.
        """
        if depth < 1:
            raise ValueError(f"depth must be at least 1, got {depth}")
        if len(queries) != len(golds):
            raise ValueError(f"{len(queries)} queries but {len(golds)} lists of gold docids")
        numbers: dict[Item, int] = {}
        items = [(self._bag(query), self._gold_indices(docids)) for query, docids in zip(queries, golds, strict=True)]
        which = [numbers.setdefault(item, len(numbers)) for item in items]
        ranks = self._ranks(list(numbers), depth)
        return [int(ranks[number]) or None for number in which]

    def _ranks(self, items: Sequence[Item], depth: int) -> npt.NDArray[np.int64]:
        """Each item's rank, 0 where there is none."""
        (starts, ends, weights, max_codes), term_ends = self._lists([bag for bag, _ in items])
        batch = bm25_gold.Batch(
            term_ends=term_ends,
            starts=starts,
            ends=ends,
            times=np.array([times for bag, _ in items for _, times in bag], np.int64),
            weights=weights,
            max_codes=max_codes,
            gold_ends=np.cumsum([0, *(len(golds) for _, golds in items)]),
            golds=np.array([gold for _, golds in items for gold in golds], np.int64),
        )
        return bm25_ranks.ranks(batch, depth, self._postings, self.num_passages, self._pool, self._threads)

    def _zeros(self) -> npt.NDArray[np.float64]:
        """This thread's accumulators; the kernels leave sums as they find them, at zero."""
        if not hasattr(self._scratch, "zeros"):
            self._scratch.zeros = np.zeros(self.window)
        zeros: npt.NDArray[np.float64] = self._scratch.zeros
        return zeros

    def _gold_indices(self, docids: Sequence[str]) -> tuple[int, ...]:
        if isinstance(docids, str) or not docids:
            raise ValueError(f"each query needs a list of at least one gold docid, got {docids!r}")
        return tuple(sorted(self._index_of(docid) for docid in docids))

    def _index_of(self, docid: str) -> int:
        index = self._index_by_docid.find(docid)
        if index is None:
            raise ValueError(f"docid {docid!r} is not in the index ({self.num_passages} passages)")
        return index

    def contents(self, docids: Sequence[str]) -> list[str]:
        """The passages' text; ValueError where a docid is not in the index."""
        return [self._contents[self._index_of(docid)] for docid in docids]

    def missing(self, docids: Sequence[str]) -> list[str]:
        """Those docids that are not in the index."""
        return [docid for docid in docids if self._index_by_docid.find(docid) is None]
