"""Gold ranks and searches equal Lucene's: thousands of queries over two real collections, to the last rank."""

import gzip
import json
import random
from collections.abc import Sequence
from pathlib import Path

import helpers_lucene
import pytest
from helpers_retriever import build_bm25

from convsearch.files import read_jsonl
from data_preprocess.demo_data import find_summaries, read_articles
from retriever_server import lucene
from retriever_server.bm25.index import Bm25Index

MTRAG = Path(__file__).resolve().parents[2] / "shared/data/mtrag"
absent = helpers_lucene.why_absent()
pytestmark = [pytest.mark.lucene, pytest.mark.slow, pytest.mark.skipif(absent is not None, reason=absent or "")]

Case = tuple[str, list[str]]  # a query and its golds


def compare(
    folder: Path, passages: list[tuple[str, str]], cases: Sequence[Case]
) -> tuple[Bm25Index, lucene.LuceneIndex]:
    """Builds both indexes and holds their ranks of the golds together, to depth 100 and to depth 1,000."""
    theirs = helpers_lucene.lucene_index(passages, folder)
    ours = build_bm25(folder / "collection.jsonl", folder / "bm25")
    queries, golds = [query for query, _ in cases], [golds for _, golds in cases]
    expected = helpers_lucene.lucene_ranks(theirs, queries, golds, 1000)
    assert ours.gold_ranks(queries, golds, 1000) == expected
    assert ours.gold_ranks(queries, golds, 100) == [
        rank if rank is not None and rank <= 100 else None for rank in expected
    ]
    found = [rank for rank in expected if rank is not None]
    assert len(found) > len(cases) / 4  # a comparison of nothing found would show nothing
    assert len(set(found)) > 50
    return ours, theirs


@pytest.mark.skipif(not MTRAG.is_dir(), reason="MTRAG is not in ../shared/data")
def test_mtrag(tmp_path: Path) -> None:
    """777 conversations x last turn, rewrite and whole history, with all golds of each; and each of them with one gold
    drawn at random."""
    with gzip.open(MTRAG / "corpus.jsonl.gz", "rt") as file:
        passages = [(row["_id"], f"{row['title']} {row['text']}") for row in map(json.loads, file)]
    golds: dict[str, list[str]] = {}
    for line in (MTRAG / "qrels.trec").read_text().splitlines():
        qid, _, docid, grade = line.split()
        if int(grade) > 0:
            golds.setdefault(qid, []).append(docid)
    draw, cases = random.Random(1), []
    for _, row in read_jsonl(MTRAG / "queries.jsonl.gz"):
        for text in (row["lastturn"], row["rewrite"], " ".join([*map(str, row["history"]), row["query"]])):
            cases += [(text, golds[row["_id"]]), (text, [draw.choice(passages)[0]])]
    assert len(cases) == 777 * 6
    ours, theirs = compare(tmp_path, passages, cases)
    for (query, _), hits in zip(cases[::60], theirs.search([query for query, _ in cases[::60]], 1000), strict=True):
        assert ours.search([query], 1000) == [hits]


def test_summaries(tmp_path: Path) -> None:
    """One word, four hundred words, words again and again, sentences of a passage, nothing at all; one to five
    golds."""
    articles = read_articles(find_summaries()).values()
    passages = [(article.docid, " ".join([article.title, *article.sentences])) for article in articles]
    draw = random.Random(2)
    words = [word for _, text in draw.sample(passages, 400) for word in text.split()]
    cases: list[Case] = [
        ("", ["wiki-00000"]),
        ("the of and to", ["wiki-00001"]),
        ("zzzqqq", ["wiki-00002"]),
        ("?!", ["wiki-00003"]),
    ]
    for number in range(2000):
        chosen = draw.sample(passages, draw.choice((1, 1, 2, 5)))
        its_words = chosen[0][1].split()
        query = (
            draw.choice(its_words),
            " ".join(draw.choices(words, k=400)),
            " ".join(draw.choices(its_words, k=3) * draw.choice((2, 7))),
            " ".join(its_words[:12] + draw.choices(words, k=40)),
        )[number % 4]
        cases.append((query, [docid for docid, _ in chosen]))
    compare(tmp_path, passages, cases)
