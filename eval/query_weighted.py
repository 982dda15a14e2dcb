"""BM25 as in the published BRIGHT figures: the query's terms carry BM25 weights too, as if the query were a passage.

score(q, d) = sum over terms t of w(t, q) w(t, d), with
w(t, x) = idf(t) tf(t, x) / (tf(t, x) + k1 (1 - b + b |x| / mean length)) and idf(t) = ln((N + 1) / (df(t) + 0.5)).
Lengths are exact; a query's length counts the terms that are in the collection. This is gensim's LuceneBM25Model on
both sides of a sparse product, which BRIGHT's own script uses. It differs from Lucene: a long query's repeated terms
saturate, its length counts, and the idf is squared.
"""

import math
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt
from scipy.sparse import csr_matrix

from retriever_server.text.analyzer import TermIds, analyze

BLOCK = 64  # queries per product


class QueryWeightedBm25:
    """An index in memory. ``QueryWeightedBm25([("d1", "cats and dogs")]).search(["a dog"], k=1)``"""

    def __init__(self, passages: Iterable[tuple[str, str]], k1: float = 0.9, b: float = 0.4) -> None:
        """``passages``: (docid, text) in index order, which breaks ties.

        Raises:
            ValueError: there is no passage.
        """
        self.docids: list[str] = []
        terms, starts = TermIds(), [0]
        lengths: list[int] = []
        columns: list[int] = []
        counts: list[int] = []
        for docid, text in passages:
            bag = Counter(terms(text))
            self.docids.append(docid)
            lengths.append(bag.total())
            columns += bag.keys()
            counts += bag.values()
            starts.append(len(columns))
        if not self.docids:
            raise ValueError("there is no passage to search")
        self.k1, self.b, self.vocabulary = k1, b, terms.vocabulary
        self.mean_length = sum(lengths) / len(lengths) or 1.0
        frequencies = np.bincount(np.array(columns, np.int64), minlength=len(self.vocabulary))
        self.idf = math.log(len(lengths) + 1.0) - np.log(frequencies + 0.5)
        weights = self._weights(np.array(columns, np.int64), np.array(counts), np.repeat(lengths, np.diff(starts)))
        shape = (len(self.docids), max(1, len(self.vocabulary)))
        self._passages = csr_matrix((weights.astype(np.float32), np.array(columns), np.array(starts)), shape)

    def _weights(
        self, terms: npt.NDArray[np.int64], counts: npt.NDArray[np.int64], lengths: npt.NDArray[np.int64] | int
    ) -> npt.NDArray[np.float64]:
        """One weight per (term, count) of a text of that length."""
        norm = self.k1 * (1 - self.b + self.b * lengths / self.mean_length)
        weights: npt.NDArray[np.float64] = self.idf[terms] * (counts / (counts + norm))
        return weights

    def scores(self, queries: Sequence[str]) -> npt.NDArray[np.float32]:
        """float32 [queries, passages]."""
        columns, values, starts = [], [], [0]
        for query in queries:
            bag = Counter(number for term in analyze(query) if (number := self.vocabulary.get(term)) is not None)
            terms, counts = np.array(list(bag), np.int64), np.array(list(bag.values()), np.int64)
            columns.append(terms)
            values.append(self._weights(terms, counts, bag.total()))
            starts.append(starts[-1] + len(terms))
        weights = (np.concatenate(values).astype(np.float32), np.concatenate(columns), np.array(starts))
        product = csr_matrix(weights, (len(queries), self._passages.shape[1])) @ self._passages.T
        result: npt.NDArray[np.float32] = product.toarray()
        return result

    def search(self, queries: Sequence[str], k: int) -> list[list[tuple[str, float]]]:
        """The best ``k`` passages that score above 0, best first, ties by index order."""
        found: list[list[tuple[str, float]]] = []
        for start in range(0, len(queries), BLOCK):
            for row in self.scores(queries[start : start + BLOCK]):
                best = np.argsort(-row, kind="stable")[:k]
                best = best[row[best] > 0]
                scores = row[best].tolist()
                found.append([(self.docids[i], score) for i, score in zip(best.tolist(), scores, strict=True)])
        return found
