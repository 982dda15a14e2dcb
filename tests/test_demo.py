"""The embedded conversations: size, form, questions that need their context, rewrites that find the passages."""

import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from helpers_retriever import build_bm25

from convsearch.files import read_jsonl
from eval.conversations import read_column
from retriever_server.bm25.index import Bm25Index
from retriever_server.text.analyzer import analyze

ROOT = Path(__file__).resolve().parents[1]
ASSETS = ROOT / "assets" / "demo"
SPLITS = ("train", "validation", "test")


def conversations(split: str) -> list[dict]:
    return [record for _, record in read_jsonl(ASSETS / f"{split}.jsonl")]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Bm25Index]:
    folder = tmp_path_factory.mktemp("demo")
    subprocess.run(
        [sys.executable, "-m", "data_preprocess.demo", "--output", folder / "data"],
        check=True,
        cwd=ROOT,
        capture_output=True,
    )
    return folder / "data", build_bm25(folder / "data" / "collection.jsonl", folder / "index")


def rows_of(folder: Path, split: str) -> list[dict]:
    return [row for _, row in read_jsonl(folder / f"{split}.json")]


def mrr(index: Bm25Index, queries: list[str], rows: list[dict]) -> float:
    ranks = index.gold_ranks(queries, [row["gold_docids"] for row in rows], 100)
    return sum(1 / rank if rank else 0.0 for rank in ranks) / len(ranks)


def test_there_are_enough_conversations_of_four_to_twelve_turns() -> None:
    sizes = {split: len(conversations(split)) for split in SPLITS}
    assert sizes["train"] >= 100
    assert sizes["validation"] >= 35
    assert sizes["test"] >= 50
    assert all(4 <= len(c["turns"]) <= 12 for split in SPLITS for c in conversations(split))


def test_no_longer_question_is_in_two_conversations() -> None:
    words = Counter(
        " ".join(turn["question"].lower().split())
        for split in SPLITS
        for c in conversations(split)
        for turn in c["turns"]
        if len(turn["question"].split()) > 6
    )
    assert [question for question, count in words.items() if count > 1] == []


def test_two_thirds_switch_the_topic() -> None:
    everything = [c for split in SPLITS for c in conversations(split)]
    switching = sum(len({turn["article"] for turn in c["turns"]}) > 1 for c in everything)
    assert switching / len(everything) > 0.6


@pytest.mark.parametrize("split", SPLITS)
def test_the_questions_are_like_those_of_topiocqa(built: tuple[Path, Bm25Index], split: str) -> None:
    """Its development questions: 80% new golds, 31% topic switches, 63% pronouns, 6.9 words (docs/data.md)."""
    folder, _ = built
    column = {name: float(value.replace(",", "")) for name, value in read_column(folder / f"{split}.json").items()}
    assert column["later turns with a new gold, %"] >= 75
    assert 20 <= column["later turns that switch the topic, %"] <= 35
    assert 50 <= column["questions with a pronoun, %"] <= 70
    assert 6 <= column["words per question"] <= 8
    assert column["content words of a question in its gold, %"] <= 30


@pytest.mark.parametrize("split", SPLITS)
def test_raw_questions_find_little_and_the_last_one_in_front_is_no_remedy(
    built: tuple[Path, Bm25Index], split: str
) -> None:
    folder, index = built
    rows = rows_of(folder, split)
    assert mrr(index, [row["question"] for row in rows], rows) <= 0.3
    assert mrr(index, [" ".join([*row["context"][-2:-1], row["question"]]) for row in rows], rows) <= 0.4


def test_rewrites_made_by_hand_find_the_passages(built: tuple[Path, Bm25Index]) -> None:
    folder, index = built
    rows = rows_of(folder, "test")
    assert mrr(index, [row["rewrite"] for row in rows], rows) >= 0.55


def test_rewrites_name_what_a_question_leaves_out_and_borrow_nothing(built: tuple[Path, Bm25Index]) -> None:
    """At most 3% have a word of the gold passage or the answer that neither the question nor the history has."""
    folder, _ = built
    passages = {row["id"]: row["contents"] for _, row in read_jsonl(folder / "collection.jsonl")}
    rows = rows_of(folder, "test")
    borrowed = [
        row["qid"]
        for row in rows
        if (set(analyze(row["rewrite"])) - set(analyze(" ".join([*row["context"], row["question"]]))))
        & set(analyze(f"{passages[row['gold_docids'][0]]} {row['answer']}"))
    ]
    assert len(borrowed) <= 0.03 * len(rows), borrowed


def test_the_training_files_have_no_human_rewrite(built: tuple[Path, Bm25Index]) -> None:
    folder, _ = built
    for split in ("train", "validation"):
        assert "rewrite" not in (folder / f"{split}.json").read_text()
