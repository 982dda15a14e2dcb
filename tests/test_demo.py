"""The embedded conversations: size, form, questions that need their context, rewrites that find the passages."""

import json
from collections import Counter
from pathlib import Path

import pytest
from helpers_retriever import build_bm25

from convsearch.files import read_jsonl
from retriever_server.bm25.index import Bm25Index

ROOT = Path(__file__).resolve().parents[1]
ASSETS = ROOT / "assets" / "demo"
SPLITS = ("train", "validation", "test")


def conversations(split: str) -> list[dict]:
    return [record for _, record in read_jsonl(ASSETS / f"{split}.jsonl")]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Bm25Index]:
    import subprocess
    import sys

    folder = tmp_path_factory.mktemp("demo")
    subprocess.run(
        [sys.executable, "-m", "data_preprocess.demo", "--output", folder / "data"],
        check=True,
        cwd=ROOT,
        capture_output=True,
    )
    return folder / "data", build_bm25(folder / "data" / "collection.jsonl", folder / "index")


def mrr(index: Bm25Index, queries: list[str], golds: list[list[str]]) -> float:
    ranks = index.gold_ranks(queries, golds, 10_033)
    return sum(1 / rank if rank else 0.0 for rank in ranks) / len(ranks)


def test_there_are_enough_conversations_of_four_to_seven_turns() -> None:
    sizes = {split: len(conversations(split)) for split in SPLITS}
    assert sizes["train"] >= 100
    assert sizes["validation"] >= 20
    assert sizes["test"] >= 30
    assert all(4 <= len(c["turns"]) <= 7 for split in SPLITS for c in conversations(split))


def test_no_article_and_no_longer_question_is_in_two_conversations() -> None:
    articles = Counter(
        a for split in SPLITS for c in conversations(split) for a in {turn["article"] for turn in c["turns"]}
    )
    assert [article for article, count in articles.items() if count > 1] == []
    words = Counter(
        " ".join(turn["question"].lower().split())
        for split in SPLITS
        for c in conversations(split)
        for turn in c["turns"]
        if len(turn["question"].split()) > 4
    )
    assert [question for question, count in words.items() if count > 1] == []


def test_two_thirds_switch_the_topic() -> None:
    everything = [c for split in SPLITS for c in conversations(split)]
    switching = sum(len({turn["article"] for turn in c["turns"]}) > 1 for c in everything)
    assert switching / len(everything) > 0.6


@pytest.mark.parametrize("split", SPLITS)
def test_raw_questions_find_little(built: tuple[Path, Bm25Index], split: str) -> None:
    folder, index = built
    rows = [json.loads(line) for line in (folder / f"{split}.json").read_text().splitlines()]
    assert mrr(index, [row["question"] for row in rows], [row["gold_docids"] for row in rows]) <= 0.35


def test_rewrites_made_by_hand_find_the_passages(built: tuple[Path, Bm25Index]) -> None:
    folder, index = built
    rows = [json.loads(line) for line in (folder / "test.json").read_text().splitlines()]
    rewritten = [row for row in rows if row.get("rewrite")]
    assert len(rewritten) >= 60
    golds = [row["gold_docids"] for row in rewritten]
    assert mrr(index, [row["rewrite"] for row in rewritten], golds) >= 0.75
    assert mrr(index, [row["question"] for row in rewritten], golds) <= 0.35


def test_the_training_files_have_no_human_rewrite(built: tuple[Path, Bm25Index]) -> None:
    folder, _ = built
    for split in ("train", "validation"):
        assert "rewrite" not in (folder / f"{split}.json").read_text()
