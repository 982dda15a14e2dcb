"""The BM25 index: hand-worked scores, parity with a float64 brute force, exact ranks, and folders that are not
whole."""

import gzip
import json
import math
import random
import threading
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from helpers_retriever import build_bm25
from hypothesis import given, settings
from hypothesis import strategies as st

from retriever_server.bm25 import build as bm25_build
from retriever_server.bm25 import ranks as bm25_ranks
from retriever_server.bm25.formula import LENGTHS, length_bytes
from retriever_server.bm25.index import Bm25Index
from retriever_server.searcher import open_searcher
from retriever_server.text.analyzer import analyze, words

PASSAGES = {"d1": "The cat and a dog", "d2": "cat, Cat: bird!", "d3": "", "d4": "dog's cat"}


def write(path: Path, passages: dict[str, str]) -> Path:
    path.write_text("".join(json.dumps({"id": docid, "contents": text}) + "\n" for docid, text in passages.items()))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("bm25")
    build_bm25(write(root / "collection.jsonl", PASSAGES), root / "index")
    return root / "index"


@pytest.mark.parametrize(
    ("text", "terms"),
    [
        ("The dogs are running", ["dog", "run"]),
        ("don't U.S.A. dog's dog’s DOGS'", ["don't", "u.s.a", "dog", "dog", "dog"]),
        ("1,000 3.14 a,b x.5 and/or e-mail foo_bar", ["1,000", "3.14", "b", "x", "5", "e", "mail", "foo_bar"]),
        ("m² H₂O ½ _ __", ["m", "h", "o"]),
        ("東京 タワー ひら", ["東", "京", "タワー", "ひ", "ら"]),
        ("cafe\u0301 naïve Übung", ["cafe\u0301", "naïv", "übung"]),
        ("as us is it", ["us"]),
        ("", []),
        ("\ud800 lone \x00 half", ["lone", "half"]),
        ("x" * 300, ["x" * 255, "x" * 45]),
    ],
)
def test_analyzer(text: str, terms: list[str]) -> None:
    assert analyze(text) == terms


def test_words_keep_stop_words_and_inner_apostrophes() -> None:
    assert words("The U.S. dog's 1,000 b_c") == ["the", "u.s", "dog", "1,000", "b_c"]


def test_scores_by_hand(folder: Path) -> None:
    # terms: d1 cat dog; d2 cat cat bird; d3 -; d4 dog cat. N = 3 (Lucene leaves out passages without a term), mean
    # length 7/3, k1 0.9, b 0.4
    # idf(cat) = ln(1 + 0.5/3.5) = 0.1335314, idf(bird) = ln(1 + 2.5/1.5) = 0.9808293
    # norm(2 terms) = 0.9 (0.6 + 0.4 x 2 / 2.3333333) = 0.8485714, norm(3 terms) = 0.9 (0.6 + 0.4 x 3 / 2.3333333) =
    # 1.0028571
    # cat in d1: 0.1335314 / 1.8485714 = 0.0722349; in d2: 0.1335314 x 2 / 3.0028571 = 0.0889362; bird in d2: 0.9808293
    # / 2.0028571
    index = open_searcher(folder)
    assert index.num_passages == 4
    (hits,) = index.search(["cat?"], 10)
    assert [docid for docid, _ in hits] == ["d2", "d1", "d4"]  # d1 and d4 tie: index order
    assert [score for _, score in hits] == pytest.approx([0.0889362, 0.0722349, 0.0722349], abs=1e-6)
    (hits,) = index.search(["birds, cats and cats"], 1)
    assert hits == [("d2", pytest.approx(0.4897151 + 2 * 0.0889362, abs=1e-6))]
    assert index.gold_ranks(["cat"] * 6, [["d2"], ["d1"], ["d4"], ["d3"], ["d4", "d1"], ["d3", "d4"]], 100) == [
        1,
        2,
        3,
        None,
        2,
        3,
    ]
    assert index.gold_ranks(["cat", "cat"], [["d1"], ["d4"]], 2) == [2, None]


def test_nothing_to_search_for(folder: Path) -> None:
    index = Bm25Index.load(folder)
    queries = ["", "the of", "zebra", "\ud800", "!?"]
    assert index.search(queries, 5) == [[], [], [], [], []]
    assert index.gold_ranks(queries, [["d1"]] * 5, 5) == [None] * 5
    assert index.contents(["d2", "d3"]) == ["cat, Cat: bird!", ""]
    assert index.missing(["d1", "x", "\ud800", ""]) == ["x", "\ud800", ""]


def test_wrong_arguments(folder: Path) -> None:
    index = Bm25Index.load(folder)
    for call in (
        lambda: index.search(["cat"], 0),
        lambda: index.gold_ranks(["cat"], [["d1"]], 0),
        lambda: index.gold_ranks(["cat"], [], 1),
        lambda: index.gold_ranks(["cat"], [[]], 1),
        lambda: index.gold_ranks(["cat"], ["d1"], 1),  # type: ignore[list-item]
    ):
        with pytest.raises(ValueError):
            call()
    with pytest.raises(ValueError, match="'d9' is not in the index"):
        index.gold_ranks(["cat"], [["d1", "d9"]], 1)


def brute_force(texts: list[str], query: str, k1: float, b: float) -> list[float]:
    """BM25 in float64, straight from the formula: idf = ln(1 + (N - df + 0.5) / (df + 0.5)), tf / (tf + k1 (1 - b + b
    len / mean))."""
    passages = [analyze(text) for text in texts]
    num = max(1, sum(map(bool, passages)))  # Lucene counts the passages that have a term
    mean = sum(map(len, passages)) / num
    scores = []
    for passage in passages:
        score = 0.0
        for term in analyze(query):
            tf, df = passage.count(term), sum(term in other for other in passages)
            if tf:
                score += (
                    math.log(1 + (num - df + 0.5) / (df + 0.5)) * tf / (tf + k1 * (1 - b + b * len(passage) / mean))
                )
        scores.append(score)
    return scores


few_words = st.lists(st.sampled_from(["ant", "bat", "cat", "dog", "the", "elk"]), max_size=6).map(" ".join)


@settings(max_examples=25)
@given(
    texts=st.lists(few_words, min_size=1, max_size=14),
    queries=st.lists(few_words, min_size=1, max_size=4),
    k1=st.sampled_from([0.0, 0.9, 1.5]),
    b=st.sampled_from([0.0, 0.4, 1.0]),
    data=st.data(),
)
def test_parity_with_brute_force(
    tmp_path_factory: pytest.TempPathFactory,
    texts: list[str],
    queries: list[str],
    k1: float,
    b: float,
    data: st.DataObject,
) -> None:
    root = tmp_path_factory.mktemp("parity")
    docids = [f"p{number}" for number in range(len(texts))]
    index = build_bm25(
        write(root / "c.jsonl", dict(zip(docids, texts, strict=True))), root / "index", k1, b, progress=False
    )
    for query, hits in zip(queries, index.search(queries, len(texts) + 3), strict=True):
        exact = brute_force(texts, query, k1, b)
        assert {docid for docid, _ in hits} == {docid for docid, score in zip(docids, exact, strict=True) if score > 0}
        assert [score for _, score in hits] == pytest.approx([exact[int(docid[1:])] for docid, _ in hits], rel=1e-5)
        keys = [(-score, int(docid[1:])) for docid, score in hits]
        assert keys == sorted(keys)
        for k in (1, 2, len(texts)):
            assert index.search([query], k) == [hits[:k]]
        position = {docid: rank for rank, (docid, _) in enumerate(hits, start=1)}
        golds = data.draw(st.lists(st.sampled_from(docids), min_size=1, max_size=3))
        depth = data.draw(st.integers(1, len(texts) + 1))
        best = min((position[gold] for gold in golds if gold in position), default=None)
        assert index.gold_ranks([query], [golds], depth) == [best if best is not None and best <= depth else None]
        if best is not None:  # and against the formula, as far as float32 can tell scores apart
            gold = max(exact[int(gold[1:])] for gold in golds)
            assert (
                1 + sum(score > gold * (1 + 1e-5) for score in exact)
                <= best
                <= sum(score >= gold * (1 - 1e-5) for score in exact)
            )


def lucene_scores(passages: list[list[str]], query: list[str], k1: float, b: float) -> list[np.float32]:
    """Lucene's float32 arithmetic, one passage and one term after the other; doubles are added in the query's order."""
    f = np.float32
    lengths = [LENGTHS[np.searchsorted(LENGTHS, len(passage), side="right") - 1] for passage in passages]
    num = sum(map(bool, passages))
    mean = f(sum(map(len, passages)) / num)
    scores = []
    for passage, length in zip(passages, lengths, strict=True):
        norm_inverse = f(1) / (f(k1) * ((f(1) - f(b)) + f(b) * f(length) / mean))
        total = 0.0
        for term in dict.fromkeys(query):
            df = sum(term in other for other in passages)
            weight = f(query.count(term)) * f(math.log(1 + (num - df + 0.5) / (df + 0.5)))
            if term in passage:
                total += float(weight - weight / (f(1) + f(passage.count(term)) * norm_inverse))
        scores.append(f(total))
    return scores


@mock.patch.multiple(bm25_ranks, SHORTEST_WINDOW=64, LONGEST_WINDOW=64)
@settings(max_examples=30)
@given(data=st.data(), window=st.sampled_from([1, 3, 16, 64]), seed=st.integers(0, 10**6))
def test_ranks_and_searches_are_those_of_brute_force(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, window: int, seed: int
) -> None:
    """Many ties, repeated terms, long and short passages, windows far smaller than the collection: equal to the last
    bit."""
    draw = np.random.default_rng(seed)
    vocabulary = [f"w{number}" for number in range(draw.integers(2, 40))]
    skew = draw.dirichlet(np.full(len(vocabulary), 0.3))
    passages = [
        list(draw.choice(vocabulary, draw.choice([0, 1, 3, 8, 60]), p=skew)) for _ in range(draw.integers(1, 120))
    ]
    passages[0] = passages[0] or ["w0"]
    root = tmp_path_factory.mktemp("brute")
    collection = write(root / "c.jsonl", {f"p{number}": " ".join(passage) for number, passage in enumerate(passages)})
    index = build_bm25(collection, root / "index")
    index.window = window
    queries = [list(draw.choice(vocabulary, size)) for size in (1, 2, 7, 40, 300)]
    golds = [data.draw(st.lists(st.integers(0, len(passages) - 1), min_size=1, max_size=3)) for _ in queries]
    depth = data.draw(st.sampled_from([1, 2, 10, 1000]))
    ranks = index.gold_ranks(
        [" ".join(query) for query in queries], [[f"p{gold}" for gold in chosen] for chosen in golds], depth
    )
    for query, chosen, rank in zip(queries, golds, ranks, strict=True):
        scores = lucene_scores(passages, query, 0.9, 0.4)
        ranking = [number for number in np.argsort(-np.array(scores), kind="stable").tolist() if scores[number] > 0]
        expected = min((ranking.index(gold) + 1 for gold in chosen if gold in ranking), default=None)
        assert rank == (expected if expected is not None and expected <= depth else None)
        assert index.search([" ".join(query)], depth) == [
            [(f"p{number}", float(scores[number])) for number in ranking[:depth]]
        ]


def test_processes_build_the_same_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = np.random.default_rng(1)
    words_ = np.array([f"word{number}" for number in range(3000)])
    texts = {f"d{number}": " ".join(draw.choice(words_, 30)) for number in range(2000)}
    collection = write(tmp_path / "c.jsonl", texts)
    monkeypatch.setattr(bm25_build, "CHUNK_BYTES", 1 << 16)  # several chunks
    build_bm25(collection, tmp_path / "one", processes=1)
    build_bm25(collection, tmp_path / "two", processes=2)
    files = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert [path.name for path in sorted((tmp_path / "two").iterdir())] == files
    for name in files:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name


@pytest.mark.parametrize(
    ("length", "stands_for"), [(0, 0), (39, 39), (40, 40), (41, 40), (43, 42), (100, 96), (1000, 984), (10**6, 983064)]
)
def test_length_bytes_by_hand(length: int, stands_for: int) -> None:
    # Lucene's SmallFloat: 24 exact values, then 24 + (8 + b) << s: 24 + 16 = 40, 24 + 18 = 42, 24 + 72 = 96, 24 + 960 =
    # 984, 24 + (15 << 16) = 983064
    assert LENGTHS[length_bytes(np.array([length]))[0]] == stands_for


def test_equal_passages_rank_by_index_order(tmp_path: Path) -> None:
    texts = {f"d{number}": "same words here" for number in range(50)}
    index = build_bm25(write(tmp_path / "c.jsonl", texts), tmp_path / "index")
    assert index.gold_ranks(["words"] * 50, [[docid] for docid in texts], 40) == [*range(1, 41), *[None] * 10]
    assert [docid for docid, _ in index.search(["words"], 7)[0]] == list(texts)[:7]


def test_threads_agree(folder: Path) -> None:
    index = Bm25Index.load(folder)
    wrong: list[object] = []

    def work() -> None:
        for number in range(200):
            if index.gold_ranks([f"cats birds {number}", "dogs"], [["d4"], ["d4"]], 9) != [3, 2]:
                wrong.append(number)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_several_gzipped_files_and_odd_texts(tmp_path: Path) -> None:
    first = write(tmp_path / "a.jsonl", {"1": "alpha", "é ü": "beta\nwith\u2028lines \ud83d"})
    with gzip.open(tmp_path / "b.jsonl.gz", "wt") as file:
        file.write('\n{"id": "3", "contents": "gamma", "title": "ignored"}\n')
    index = build_bm25([first, tmp_path / "b.jsonl.gz"], tmp_path / "index")
    assert [[docid for docid, _ in hits] for hits in index.search(["gamma", "beta", "ignored"], 1)] == [
        ["3"],
        ["é ü"],
        [],
    ]
    assert index.contents(["é ü"]) == ["beta\nwith\u2028lines ?"]


def test_a_collection_without_terms(tmp_path: Path) -> None:
    index = build_bm25(write(tmp_path / "c.jsonl", {"a": "", "b": "the"}), tmp_path / "index")
    assert index.search(["the cat"], 3) == [[]]
    assert index.gold_ranks(["cat"], [["b"]], 3) == [None]


def test_columns_tails_and_windows_change_no_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Common terms as columns and rare ones posting by posting, over many windows, against a search that scores
    everything."""
    draw = random.Random(1)
    common, rare = [f"c{i}" for i in range(12)], [f"r{i}" for i in range(300)]
    texts = [
        " ".join(draw.choices(common, k=draw.randint(0, 6)) + draw.choices(rare, k=draw.randint(0, 4)))
        for _ in range(700)
    ]
    collection = write(tmp_path / "c.jsonl", {f"p{number}": text for number, text in enumerate(texts)})
    build_bm25(collection, tmp_path / "index")
    index = Bm25Index(tmp_path / "index", threads=3)
    monkeypatch.setattr(bm25_ranks, "SHORTEST_WINDOW", 64)
    monkeypatch.setattr(bm25_ranks, "LONGEST_WINDOW", 256)
    queries = [
        " ".join(draw.choices(common, k=draw.randint(1, 9)) + draw.choices(rare, k=draw.randint(0, 30)))
        for _ in range(50)
    ]
    queries += ["c0 " * 5200 + "r1 c1", "c0 c0 c0 r1", "r1", "c1"]  # the first one's sums need more than 16 bits
    golds = [[f"p{draw.randrange(700)}" for _ in range(draw.randint(1, 3))] for _ in queries]
    chosen = []
    original = bm25_ranks.choose_columns
    monkeypatch.setattr(bm25_ranks, "choose_columns", lambda *args: chosen.append(original(*args)) or chosen[-1])
    for depth in (1, 20, 700):
        expected = []
        for hits, its_golds in zip(index.search(queries, depth), golds, strict=True):
            found = [rank for rank, (docid, _) in enumerate(hits, start=1) if docid in its_golds]
            expected.append(min(found, default=None))
        assert index.gold_ranks(queries, golds, depth) == expected
        assert [
            index.gold_ranks([query], [gold], depth)[0] for query, gold in zip(queries, golds, strict=True)
        ] == expected
    assert max(len(columns.starts) for columns in chosen) >= 5
    assert min(len(columns.starts) for columns in chosen) == 0
