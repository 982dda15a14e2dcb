"""Reciprocal rank fusion by hand, by brute force, and as a searcher."""

from collections.abc import Sequence
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from retriever_server.searcher import Fusion, fuse


class Fixed:
    """A searcher that answers every query with one list."""

    def __init__(self, name: str, docids: str, others: str = "") -> None:
        self.name, self.index_id, self.num_passages = name, f"{name}-1", len(docids) + len(others)
        self.docids, self.known, self.asked = docids, set(docids + others), 0

    def search(self, queries: Sequence[str], k: int) -> list[list[tuple[str, float]]]:
        self.asked = k
        return [[(docid, 9.0 - place) for place, docid in enumerate(self.docids[:k])] for _ in queries]

    def gold_ranks(self, queries: Sequence[str], golds: Sequence[Sequence[str]], depth: int) -> list[int | None]:
        raise NotImplementedError

    def contents(self, docids: Sequence[str]) -> list[str]:
        assert not self.missing(docids)
        return [f"{self.name}'s {docid}" for docid in docids]

    def missing(self, docids: Sequence[str]) -> list[str]:
        return [docid for docid in docids if docid not in self.known]


def test_scores_by_hand() -> None:
    assert fuse([["a", "b", "c"], ["c", "d"]], 60) == [
        ("c", 1 / 63 + 1 / 61),
        ("a", 1 / 61),
        ("b", 1 / 62),
        ("d", 1 / 62),
    ]
    assert fuse([["a", "b"], ["b", "a"]], 60) == [
        ("a", 1 / 61 + 1 / 62),
        ("b", 1 / 62 + 1 / 61),
    ]  # a tie: the first list decides
    assert fuse([["x"], ["y"], ["z"]], 1) == [("x", 0.5), ("y", 0.5), ("z", 0.5)]
    assert fuse([["a"], []], 3) == [("a", 0.25)]
    assert fuse([[], []], 60) == []


@given(st.lists(st.lists(st.sampled_from("abcdefgh"), unique=True), min_size=2, max_size=4), st.integers(1, 100))
def test_against_exact_fractions(lists: list[list[str]], rrf_k: int) -> None:
    exact = {
        d: sum(Fraction(1, rrf_k + docids.index(d) + 1) for docids in lists if d in docids)
        for docids in lists
        for d in docids
    }
    places = {d: [docids.index(d) if d in docids else 99 for docids in lists] for d in exact}
    fused = fuse(lists, rrf_k)
    assert [score for _, score in fused] == pytest.approx([float(exact[docid]) for docid, _ in fused])
    assert [docid for docid, _ in fused] == sorted(exact, key=lambda d: (-exact[d], places[d]))


def test_a_fusion_is_a_searcher() -> None:
    sparse, dense = Fixed("bm25", "abc", others="z"), Fixed("ance", "cdy")
    fusion = Fusion([sparse, dense], 60)
    assert (fusion.name, fusion.index_id, fusion.num_passages) == ("rrf", "rrf60(bm25-1+ance-1)", 4)
    assert [docid for docid, _ in fusion.search(["q"], 9)[0]] == ["c", "a", "b", "d", "y"]
    assert [docid for docid, _ in fusion.search(["q"], 2)[0]] == ["c", "a"]
    assert (sparse.asked, dense.asked) == (100, 100)  # a short answer is the beginning of a long one
    fusion.search(["q"], 250)
    assert (sparse.asked, dense.asked) == (250, 250)
    assert fusion.gold_ranks(["q"] * 5, [["b"], ["z"], ["d", "a"], ["y"], ["c"]], 4) == [3, None, 2, None, 1]
    assert fusion.missing(["a", "y", "z", "q"]) == ["q"]
    assert fusion.contents(["y", "c", "z", "c"]) == ["ance's y", "bm25's c", "bm25's z", "bm25's c"]
    with pytest.raises(ValueError, match=r"docid 'q' is not in the indexes rrf60\(bm25-1\+ance-1\)"):
        fusion.contents(["a", "q"])
