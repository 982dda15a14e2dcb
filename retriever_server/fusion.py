"""Several indexes searched as one, by reciprocal rank fusion (Cormack, Clarke and Büttcher, SIGIR 2009)."""

import math
from collections.abc import Sequence

from retriever_server.searcher import Searcher

FUSED_DEPTH = (
    100  # each index gives its best max(k, FUSED_DEPTH): then the first k of a longer list are those of a shorter one
)


def fuse(lists: Sequence[Sequence[str]], rrf_k: int) -> list[tuple[str, float]]:
    """(docid, score) in the fused order: the score is the sum of 1 / (rrf_k + rank) over the lists that hold the passage.

    Of equal scores the one that stands higher in the first list goes first (one that is missing there goes last), then in the second, and so on.
    ``fuse([["a", "b"], ["b", "c"]], 60)`` is ``[("b", 1/62 + 1/61), ("a", 1/61), ("c", 1/62)]``.
    """
    ranks: dict[str, list[float]] = {}
    for number, docids in enumerate(lists):
        for rank, docid in enumerate(docids, start=1):
            ranks.setdefault(docid, [math.inf] * len(lists))[number] = rank
    # fsum rounds once, whatever the order of the lists: sums that are equal stay equal
    scores = {docid: math.fsum(1 / (rrf_k + rank) for rank in of_lists) for docid, of_lists in ranks.items()}
    return [(docid, scores[docid]) for docid in sorted(ranks, key=lambda docid: (-scores[docid], ranks[docid]))]


class Fusion:
    """A searcher whose lists are fused from those of others. A passage is known where one of them knows it."""

    name = "rrf"

    def __init__(self, searchers: Sequence[Searcher], rrf_k: int = 60) -> None:
        assert len(searchers) > 1
        self._searchers, self._rrf_k = searchers, rrf_k
        self.index_id = f"rrf{rrf_k}({'+'.join(searcher.index_id for searcher in searchers)})"
        self.num_passages = max(searcher.num_passages for searcher in searchers)

    def search(self, queries: Sequence[str], k: int) -> list[list[tuple[str, float]]]:
        """The first ``k`` of the fused order; the lists that are fused are cut at max(k, FUSED_DEPTH)."""
        depth = max(k, FUSED_DEPTH)
        found = [searcher.search(queries, depth) for searcher in self._searchers]
        return [
            fuse([[docid for docid, _ in hits] for hits in of_query], self._rrf_k)[:k]
            for of_query in zip(*found, strict=True)
        ]

    def gold_ranks(self, queries: Sequence[str], golds: Sequence[Sequence[str]], depth: int) -> list[int | None]:
        """The best gold's place in what ``search`` returns for k = ``depth``; None where none of them is there."""
        ranks: list[int | None] = []
        for hits, docids in zip(self.search(queries, depth), golds, strict=True):
            ranks.append(next((rank for rank, (docid, _) in enumerate(hits, start=1) if docid in docids), None))
        return ranks

    def contents(self, docids: Sequence[str]) -> list[str]:
        texts: dict[str, str] = {}
        for searcher in self._searchers:
            left = [docid for docid in docids if docid not in texts]
            absent = set(searcher.missing(left))
            known = [docid for docid in left if docid not in absent]
            texts |= zip(known, searcher.contents(known), strict=True)
        if left := [docid for docid in docids if docid not in texts]:
            raise ValueError(f"docid {left[0]!r} is not in the indexes {self.index_id}")
        return [texts[docid] for docid in docids]

    def missing(self, docids: Sequence[str]) -> list[str]:
        for searcher in self._searchers:
            docids = searcher.missing(docids) if docids else []
        return list(docids)
