"""The analyzer for whole collections gives the terms of the analyzer for one text, whatever the text and however little
it remembers."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retriever_server.bm25 import bulk_analyzer
from retriever_server.bm25.bulk_analyzer import BulkAnalyzer
from retriever_server.text.analyzer import analyze

pieces = st.sampled_from(
    [
        "the",
        "Dogs",
        "dog's",
        "1,000",
        "e-mail",
        "naïve",
        "東京",
        "a\u00a0b",
        "x\u202fy",
        "’s",
        "_",
        "\x1c",
        "\t",
        "\n",
        "  ",
        "é",
        "🏴",
    ]
)
texts = st.lists(
    st.one_of(st.lists(pieces, max_size=12).map(" ".join), st.text(alphabet=st.characters(codec="utf-8"), max_size=30)),
    max_size=6,
)


def terms_of(analyzer: BulkAnalyzer, batch: list[str]) -> list[list[str]]:
    numbers, each = analyzer([text.encode() for text in batch])
    names = list(analyzer.vocabulary)
    assert (numbers.dtype, len(each)) == (np.int64, len(batch))
    ends = np.cumsum(each)
    return [[names[number] for number in numbers[end - count : end]] for end, count in zip(ends, each, strict=True)]


def test_by_hand() -> None:
    analyzer = BulkAnalyzer()
    numbers, each = analyzer([b"dogs, a dog", b"", b"cats"])
    assert (numbers.tolist(), each.tolist(), analyzer.vocabulary) == ([0, 0, 1], [2, 0, 1], {"dog": 0, "cat": 1})
    assert analyzer([])[0].tolist() == []


@settings(max_examples=60)
@given(batches=st.lists(texts, max_size=4), most=st.sampled_from([1, 5, 1 << 19]))
def test_terms_are_those_of_the_analyzer(batches: list[list[str]], most: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bulk_analyzer, "MOST_CHUNKS", most)
        analyzer = BulkAnalyzer()
        for batch in batches:
            assert terms_of(analyzer, batch) == [analyze(text) for text in batch]


def test_more_chunks_than_the_table_begins_with() -> None:
    batch = [" ".join(f"w{number}" for number in range(start, start + 500)) for start in range(0, 10_000, 250)]
    analyzer = BulkAnalyzer()
    for _ in range(2):
        assert terms_of(analyzer, batch) == [text.split() for text in batch]


def test_equal_hashes_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    analyzer = BulkAnalyzer()
    cut = bulk_analyzer.cut
    monkeypatch.setattr(bulk_analyzer, "cut", lambda data, ends: _same_hash(cut(data, ends)))
    assert terms_of(analyzer, ["cat dog", "dog cat"]) == [["cat", "dog"], ["dog", "cat"]]


def _same_hash(found: tuple[np.ndarray, ...]) -> tuple[np.ndarray, ...]:
    starts, stops, hashes, each = found
    return starts, stops, np.zeros_like(hashes), each
