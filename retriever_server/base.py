"""What all indexes share: the checks of arguments, and the way from docids to rows."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

Hits = list[tuple[str, float]]  # (docid, score), best first


class Index(ABC):
    """An index over passages that are numbered by row, in index order. Thread-safe."""

    name: str  # "bm25", ...
    index_id: str  # the same for the same collection and parameters
    num_passages: int

    @abstractmethod
    def _find(self, docid: str) -> int | None:
        """The row of a passage, None if it is not in the index."""

    @abstractmethod
    def _text(self, row: int) -> str: ...

    @abstractmethod
    def _search(self, queries: Sequence[str], k: int) -> list[Hits]:
        """``k`` is from 1 to the number of passages."""

    @abstractmethod
    def _gold_ranks(self, queries: Sequence[str], golds: Sequence[Sequence[int]], depth: int) -> list[int | None]:
        """``golds``: one or more rows per query."""

    def search(self, queries: Sequence[str], k: int) -> list[Hits]:
        """The best ``k`` passages per query, best first, ties by index order; of BM25 only those that score above 0.

        Raises:
            ValueError: k is below 1.
        """
        if k < 1:
            raise ValueError(f"k must be at least 1, got {k}")
        return self._search(queries, min(k, self.num_passages)) if queries else []

    def gold_ranks(self, queries: Sequence[str], golds: Sequence[Sequence[str]], depth: int) -> list[int | None]:
        """1 + the number of passages that beat the best gold: a higher score, or the same and an earlier row.

        None if the rank is above ``depth``, or BM25 scores the gold 0.

        Raises:
            ValueError: depth is below 1, the lengths differ, a query has no gold, or a gold docid is not in the index.
        """
        if depth < 1:
            raise ValueError(f"depth must be at least 1, got {depth}")
        if len(queries) != len(golds):
            raise ValueError(f"{len(queries)} queries but {len(golds)} lists of gold docids")
        for docids in golds:
            if isinstance(docids, str) or not docids:
                raise ValueError(f"each query needs a list of at least one gold docid, got {docids!r}")
        rows = [[self._row(docid) for docid in docids] for docids in golds]
        return self._gold_ranks(queries, rows, depth) if queries else []

    def _row(self, docid: str) -> int:
        row = self._find(docid)
        if row is None:
            raise ValueError(f"docid {docid!r} is not in the index ({self.num_passages} passages)")
        return row

    def contents(self, docids: Sequence[str]) -> list[str]:
        """The passages' text; ValueError if a docid is not in the index, or the index has no texts."""
        return [self._text(row) for row in [self._row(docid) for docid in docids]]

    def missing(self, docids: Sequence[str]) -> list[str]:
        """Those docids that are not in the index."""
        return [docid for docid in docids if self._find(docid) is None]
