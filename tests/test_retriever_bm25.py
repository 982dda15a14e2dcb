"""The BM25 index: hand-worked scores, parity with a float64 brute force, exact ranks, and folders that are not whole."""

import gzip
import json
import math
import shutil
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retriever_server import index as index_command
from retriever_server.analyzer import analyze, words
from retriever_server.bm25 import Bm25Index
from retriever_server.searcher import open_searcher

PASSAGES = {"d1": "The cat and a dog", "d2": "cat, Cat: bird!", "d3": "", "d4": "dog's cat"}


def write(path: Path, passages: dict[str, str]) -> Path:
    path.write_text("".join(json.dumps({"id": docid, "contents": text}) + "\n" for docid, text in passages.items()))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("bm25")
    Bm25Index.build(write(root / "collection.jsonl", PASSAGES), root / "index", progress=False)
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
    # terms: d1 cat dog; d2 cat cat bird; d3 -; d4 dog cat. N = 4, mean length 7/4, k1 0.9, b 0.4
    # idf(cat) = ln(1 + 1.5/3.5) = 0.3566749, idf(bird) = ln(1 + 3.5/1.5) = 1.2039728
    # norm(2 terms) = 0.9 (0.6 + 0.4 x 2 / 1.75) = 0.9514286, norm(3 terms) = 0.9 (0.6 + 0.4 x 3 / 1.75) = 1.1571429
    # cat in d1: 0.3566749 / 1.9514286 = 0.1827763; in d2: 0.3566749 x 2 / 3.1571429 = 0.2259479; bird in d2: 1.2039728 / 2.1571429
    index = open_searcher(folder)
    assert index.num_passages == 4
    (hits,) = index.search(["cat?"], 10)
    assert [docid for docid, _ in hits] == ["d2", "d1", "d4"]  # d1 and d4 tie: index order
    assert [score for _, score in hits] == pytest.approx([0.2259479, 0.1827763, 0.1827763], abs=1e-6)
    (hits,) = index.search(["birds, cats and cats"], 1)
    assert hits == [("d2", pytest.approx(0.5581331 + 2 * 0.2259479, abs=1e-6))]
    assert index.gold_ranks(["cat"] * 6, [["d2"], ["d1"], ["d4"], ["d3"], ["d4", "d1"], ["d3", "d4"]], 100) == [1, 2, 3, None, 2, 3]
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
    """BM25 in float64, straight from the formula: idf = ln(1 + (N - df + 0.5) / (df + 0.5)), tf / (tf + k1 (1 - b + b len / mean))."""
    passages = [analyze(text) for text in texts]
    mean = sum(map(len, passages)) / len(passages)
    scores = []
    for passage in passages:
        score = 0.0
        for term in analyze(query):
            tf, df = passage.count(term), sum(term in other for other in passages)
            if tf:
                score += math.log(1 + (len(passages) - df + 0.5) / (df + 0.5)) * tf / (tf + k1 * (1 - b + b * len(passage) / mean))
        scores.append(score)
    return scores


few_words = st.lists(st.sampled_from(["ant", "bat", "cat", "dog", "the", "elk"]), max_size=6).map(" ".join)


@settings(max_examples=25, deadline=None)
@given(
    texts=st.lists(few_words, min_size=1, max_size=14),
    queries=st.lists(few_words, min_size=1, max_size=4),
    k1=st.sampled_from([0.0, 0.9, 1.5]),
    b=st.sampled_from([0.0, 0.4, 1.0]),
    data=st.data(),
)
def test_parity_with_brute_force(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], queries: list[str], k1: float, b: float, data: st.DataObject
) -> None:
    root = tmp_path_factory.mktemp("parity")
    docids = [f"p{number}" for number in range(len(texts))]
    index = Bm25Index.build(write(root / "c.jsonl", dict(zip(docids, texts, strict=True))), root / "index", k1, b, progress=False)
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
            assert 1 + sum(score > gold * (1 + 1e-5) for score in exact) <= best <= sum(score >= gold * (1 - 1e-5) for score in exact)


def test_equal_passages_rank_by_index_order(tmp_path: Path) -> None:
    texts = {f"d{number}": "same words here" for number in range(50)}
    index = Bm25Index.build(write(tmp_path / "c.jsonl", texts), tmp_path / "index", progress=False)
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
    index = Bm25Index.build([first, tmp_path / "b.jsonl.gz"], tmp_path / "index", progress=False)
    assert [[docid for docid, _ in hits] for hits in index.search(["gamma", "beta", "ignored"], 1)] == [["3"], ["é ü"], []]
    assert index.contents(["é ü"]) == ["beta\nwith\u2028lines ?"]


def test_a_collection_without_terms(tmp_path: Path) -> None:
    index = Bm25Index.build(write(tmp_path / "c.jsonl", {"a": "", "b": "the"}), tmp_path / "index", progress=False)
    assert index.search(["the cat"], 3) == [[]]
    assert index.gold_ranks(["cat"], [["b"]], 3) == [None]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (['{"id": "a", "contents": "x"}', '{"id": "b"}'], r"c\.jsonl:2: field 'contents' must be a string, got None"),
        (['{"id": "a", "contents": "x"}', "", '{"id": "a", "contents": "y"}'], r"c\.jsonl:3: docid 'a' is given twice"),
        (['{"id": 7, "contents": "x"}'], r"c\.jsonl:1: field 'id' must be a non-empty string, got 7"),
        (['{"id": "\\ud800", "contents": "x"}'], r"c\.jsonl:1: field 'id' is not valid Unicode"),
        (['{"id": "a", "contents": "x"}', '{"id": "b", "cont'], r"c\.jsonl:2: not a line of JSON"),
        (["[1]"], r"c\.jsonl:1: expected a JSON object"),
        ([], "no passage"),
    ],
)
def test_bad_collections_leave_nothing_behind(tmp_path: Path, lines: list[str], message: str) -> None:
    (tmp_path / "c.jsonl").write_text("\n".join(lines))
    with pytest.raises(ValueError, match=message):
        Bm25Index.build(tmp_path / "c.jsonl", tmp_path / "index", progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["c.jsonl"]


@pytest.mark.parametrize(("k1", "b"), [(-1, 0.4), (0.9, 1.1), (float("nan"), 0.4), (0.9, float("nan")), (float("inf"), 0)])
def test_bad_parameters(tmp_path: Path, k1: float, b: float) -> None:
    with pytest.raises(ValueError, match="k1 >= 0 and 0 <= b <= 1"):
        Bm25Index.build(tmp_path / "c.jsonl", tmp_path / "index", k1, b)


def damage_manifest(**changes: object):  # type: ignore[no-untyped-def]
    def change(folder: Path) -> None:
        path = folder / "manifest.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def cut(name: str):  # type: ignore[no-untyped-def]
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-1])


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (shutil.rmtree, "there is no index folder"),
        (lambda folder: (folder / "manifest.json").unlink(), "has no manifest.json"),
        (lambda folder: (folder / "manifest.json").write_text('{"format"'), "manifest.json is damaged"),
        (lambda folder: (folder / "manifest.json").write_text("[]"), "manifest.json is damaged"),
        (damage_manifest(format="faiss"), "has format 'faiss', not 'convsearch-bm25'"),
        (damage_manifest(version=99), "has version 99, this program reads 1"),
        (damage_manifest(analyzer="german"), "has analyzer 'german'"),
        (damage_manifest(k1="0.9"), "field 'k1' must be float"),
        (damage_manifest(num_passages=5), r"docids_order.npy holds int32\[4\] where the manifest counts int32\[5\]"),
        (lambda folder: np.save(folder / "docids_offsets.npy", np.zeros(4, np.int64)), r"docids_offsets.npy holds int64\[4\]"),
        (lambda folder: np.save(folder / "impacts.npy", np.zeros(6, np.float64)), r"impacts.npy holds float64"),
        (lambda folder: np.save(folder / "impacts.npy", np.array([{}], object), allow_pickle=True), "impacts.npy is cut short or damaged"),
        (lambda folder: np.save(folder / "postings_offsets.npy", np.zeros(4, np.int64)), "postings_offsets.npy is damaged"),
        (lambda folder: (folder / "postings.npy").unlink(), "postings.npy is missing"),
        (lambda folder: (folder / "postings.npy").write_bytes(b""), "postings.npy is cut short or damaged"),
        (lambda folder: (folder / "postings.npy").write_bytes(b"nonsense" * 40), "postings.npy is cut short or damaged"),
        *((cut(f"{name}.npy"), f"{name}.npy is cut short") for name in ("impacts", "contents", "docids", "terms", "contents_offsets")),
    ],
)
def test_damaged_folders(folder: Path, tmp_path: Path, harm, message: str) -> None:  # type: ignore[no-untyped-def]
    shutil.copytree(folder, tmp_path / "index")
    harm(tmp_path / "index")
    with pytest.raises(ValueError, match=message) as raised:
        Bm25Index.load(tmp_path / "index")
    assert "\n" not in str(raised.value)


def run_index(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["index", "bm25", "--quiet", *map(str, arguments)])
    index_command.main()


def test_index_command_reuses_and_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    collection, output = write(tmp_path / "c.jsonl", PASSAGES), tmp_path / "deep" / "index"
    run_index(monkeypatch, "--collection", collection, "--output", output)
    assert "built in" in capsys.readouterr().out
    first = {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in output.iterdir()}
    assert not any(path.suffix == ".pkl" or "tmp" in path.name or "tokens" in path.name for path in output.iterdir())
    run_index(monkeypatch, "--collection", collection, "--output", output)
    assert "reused" in capsys.readouterr().out
    assert {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in output.iterdir()} == first
    with pytest.raises(ValueError, match=r"k1 0.9 \(asked: 1.2\)"):
        run_index(monkeypatch, "--collection", collection, "--output", output, "--k1", "1.2")
    before = Bm25Index.load(output)
    run_index(monkeypatch, "--collection", collection, "--output", output, "--k1", "1.2", "--overwrite")
    after = Bm25Index.load(output)
    assert (before.k1, after.k1) == (0.9, 1.2)
    assert before.index_id != after.index_id
    assert before.search(["cat"], 1) != after.search(["cat"], 1)  # the old one's files stay readable while it is open
    write(collection, {"d1": "other"})
    with pytest.raises(ValueError, match="collection"):
        run_index(monkeypatch, "--collection", collection, "--output", output, "--k1", "1.2")
    assert [path.name for path in output.parent.iterdir()] == ["index"]


def test_a_damaged_index_is_never_reused(tmp_path: Path, folder: Path) -> None:
    collection = write(tmp_path / "c.jsonl", PASSAGES)
    shutil.copytree(folder, tmp_path / "index")
    cut("postings.npy")(tmp_path / "index")
    with pytest.raises(ValueError, match=r"postings\.npy is cut short"):
        Bm25Index.build(collection, tmp_path / "index", progress=False)
    index = Bm25Index.build(collection, tmp_path / "index", overwrite=True, progress=False)
    assert index.gold_ranks(["cat"], [["d2"]], 1) == [1]


def test_index_command_leaves_other_folders_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    collection = write(tmp_path / "c.jsonl", PASSAGES)
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1").write_text("years of work")
    with pytest.raises(ValueError, match="is no index folder"):
        run_index(monkeypatch, "--collection", collection, "--output", tmp_path / "thesis", "--overwrite")
    assert (tmp_path / "thesis" / "chapter1").read_text() == "years of work"
    with pytest.raises(ValueError, match="there is no collection file"):
        run_index(monkeypatch, "--collection", tmp_path / "none.jsonl", "--output", tmp_path / "x")


def test_leftovers_of_a_killed_build_are_removed(tmp_path: Path) -> None:
    dead, alive = tmp_path / "index.tmp-4194399", tmp_path / "index.tmp-1"
    dead.mkdir()
    alive.mkdir()
    Bm25Index.build(write(tmp_path / "c.jsonl", PASSAGES), tmp_path / "index", progress=False)
    assert not dead.exists()
    assert alive.exists()
