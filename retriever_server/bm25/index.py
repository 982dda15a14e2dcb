"""BM25 over an index folder, bit for bit as Lucene scores: the best k passages, and exact gold ranks without a ranking.

A passage's score is the float32 of the double sum of its terms' float32 scores (formula.py). Doubles hold such sums
without rounding except for extremely unlike terms, so the order of terms does not matter.
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

from retriever_server.base import Hits, Index
from retriever_server.bm25 import gold, kernels, ranks
from retriever_server.bm25.manifest import Manifest
from retriever_server.storage import AGAIN, load_array, load_dictionary, load_strings
from retriever_server.text.analyzer import analyze

Bag = tuple[tuple[int, int], ...]  # a query's (term, times)
Item = tuple[Bag, tuple[int, ...]]  # with its golds, ascending
Lists = tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.float32], npt.NDArray[Any]]


class Bm25Index(Index):
    """An opened index folder. Thread-safe: after loading only a cache is written, which has its own lock.

    Example: ``Bm25Index.load("outputs/demo/bm25").search(["who wrote Hamlet?"], k=3)``
    """

    name = "bm25"
    window = kernels.WINDOW

    def __init__(self, folder: str | Path, threads: int | None = None) -> None:
        """Opens the folder and memory-maps its arrays. ``threads`` share the queries of a call (default: one per core).

        Raises:
            ValueError: something is missing, damaged, of another version, or does not fit the manifest.
        """
        folder = Path(folder)
        manifest = Manifest.read(folder)
        num_terms, num_postings, code_type = manifest.num_terms, manifest.num_postings, manifest.code_type
        self.k1, self.b = manifest.k1, manifest.b
        self.index_id, self.num_passages = manifest.index_id, manifest.num_passages
        self._docids = load_strings(folder, "docids", manifest.num_passages)
        self._row_of = load_dictionary(folder, "docids", self._docids)
        self._contents = load_strings(folder, "contents", manifest.num_passages)
        terms = load_dictionary(folder, "terms", load_strings(folder, "terms", num_terms))
        self._starts = load_array(folder / "term_starts.npy", "int64", num_terms)
        self._frequencies = load_array(folder / "term_frequencies.npy", "int32", num_terms)
        self._idf = load_array(folder / "term_idf.npy", "float32", num_terms)
        self._max_codes = load_array(folder / "term_max_codes.npy", code_type, num_terms)
        docs = load_array(folder / "postings_docs.npy", "int32", num_postings)
        codes = load_array(folder / "postings_codes.npy", code_type, num_postings)
        names = ("tf", "inverse_norm", "gain")
        of_codes = [load_array(folder / f"code_{name}.npy", "float32", manifest.num_codes) for name in names]
        if int(self._frequencies.sum(dtype=np.int64)) != num_postings:
            raise ValueError(f"{folder / 'term_frequencies.npy'} is damaged: {AGAIN}")
        self._postings = kernels.Postings(docs, codes, *of_codes)
        self._term = lru_cache(maxsize=1 << 18)(terms.find)
        self._threads = threads or len(os.sched_getaffinity(0))
        self._pool = ThreadPoolExecutor(self._threads, thread_name_prefix="bm25")
        self._scratch = threading.local()

    @classmethod
    def load(cls, folder: str | Path, threads: int | None = None) -> "Bm25Index":
        return cls(folder, threads)

    def _find(self, docid: str) -> int | None:
        return self._row_of.find(docid)

    def _text(self, row: int) -> str:
        return self._contents[row]

    def _bag(self, text: str) -> Bag:
        """The query's terms that are in the index, as (number, times), in order of appearance."""
        return tuple(Counter(number for term in analyze(text) if (number := self._term(term)) is not None).items())

    def _lists(self, bags: Sequence[Bag]) -> tuple[Lists, npt.NDArray[np.int64]]:
        """Start, end, weight and largest code of the postings of all bags' terms; and where each bag's terms end."""
        pairs = np.array([pair for bag in bags for pair in bag], np.int64).reshape(-1, 2)
        numbers, times = pairs[:, 0], pairs[:, 1].astype(np.float32)
        starts = self._starts[numbers]
        lists = starts, starts + self._frequencies[numbers], times * self._idf[numbers], self._max_codes[numbers]
        return lists, np.cumsum([0, *map(len, bags)])

    def _search(self, queries: Sequence[str], k: int) -> list[Hits]:
        return list(self._pool.map(lambda query: self._top(query, k), queries))

    def _top(self, query: str, k: int) -> Hits:
        (starts, ends, weights, _), _ = self._lists([self._bag(query)])
        rows, scores, zeros = np.empty(k, np.int64), np.empty(k, np.float32), self._zeros()
        count = kernels.best(starts, ends, weights, k, self.num_passages, self._postings, zeros, rows, scores)
        found = zip(rows[:count].tolist(), scores[:count].tolist(), strict=True)
        return [(self._docids[row], score) for row, score in found]

    def _zeros(self) -> npt.NDArray[np.float64]:
        """This thread's accumulators; the kernels leave them at zero."""
        if not hasattr(self._scratch, "zeros"):
            self._scratch.zeros = np.zeros(self.window)
        zeros: npt.NDArray[np.float64] = self._scratch.zeros
        return zeros

    def _gold_ranks(self, queries: Sequence[str], golds: Sequence[Sequence[int]], depth: int) -> list[int | None]:
        """Queries of the same terms and golds, which the samples of one prompt often are, are ranked once."""
        numbers: dict[Item, int] = {}
        items = [(self._bag(query), tuple(sorted(rows))) for query, rows in zip(queries, golds, strict=True)]
        which = [numbers.setdefault(item, len(numbers)) for item in items]
        found = self._ranks(list(numbers), depth)
        return [int(found[number]) or None for number in which]

    def _ranks(self, items: Sequence[Item], depth: int) -> npt.NDArray[np.int64]:
        """Each item's rank, 0 if it has none."""
        (starts, ends, weights, max_codes), term_ends = self._lists([bag for bag, _ in items])
        batch = gold.Batch(
            term_ends=term_ends,
            starts=starts,
            ends=ends,
            times=np.array([times for bag, _ in items for _, times in bag], np.int64),
            weights=weights,
            max_codes=max_codes,
            gold_ends=np.cumsum([0, *(len(golds) for _, golds in items)]),
            golds=np.array([row for _, golds in items for row in golds], np.int64),
        )
        return ranks.ranks(batch, depth, self._postings, self.num_passages, self._pool, self._threads)
