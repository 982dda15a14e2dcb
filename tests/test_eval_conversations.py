"""Statistics of conversations, against figures worked out by hand."""

import json
import sys
from pathlib import Path

import pytest

from eval import conversations

PASSAGES = {"a1": "Hamlet is a play", "a2": "Hamlet was written in London", "b1": "London is a city"}


def turn(conv_id: int, question: str, topic: str, gold: str, answer: str = "two words") -> dict:
    return {"conv_id": conv_id, "question": question, "topic": topic, "gold_docids": [gold], "answer": answer}


TURNS = [
    turn(1, "what is the Hamlet play", "Hamlet", "a1"),
    turn(1, "where was it written", "Hamlet", "a2", answer="it was four words"),
    turn(1, "London?", "London", "b1"),
    turn(1, "and the writing of that first thing?", "Hamlet", "a2"),
    turn(2, "London is a city?", "London", "b1"),
    turn(2, "the", "London", "b1"),
]


def test_figures_by_hand() -> None:
    assert conversations.statistics(TURNS, PASSAGES) == {
        "conversations": "2",
        "turns": "6",
        "turns per conversation": "3.0",
        "topics per conversation": "1.5",
        "topic switches per conversation": "1.0",
        "words per question": "3.7",  # (5 + 4 + 1 + 7 + 4 + 1) / 6
        "words per answer": "2.3",
        "later turns with a new gold, %": "75",  # three of four
        "later turns that switch the topic, %": "50",
        "later turns that return to a topic, %": "25",
        "questions with a pronoun, %": "33",
        "questions of up to 4 words, %": "67",
        # what Hamlet plai: 2 of 3; where written: 1 of 2; 1 of 1; write first thing: 0 of 3; 2 of 2; "the" has none
        "content words of a question in its gold, %": "63",
    }


def test_the_command_and_its_errors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def write(name: str, records: list[dict]) -> Path:
        path = tmp_path / name
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        return path

    dev = write("dev.json", TURNS)
    write("collection.jsonl", [{"id": docid, "contents": text} for docid, text in PASSAGES.items()])
    monkeypatch.setattr(sys, "argv", ["conversations", str(dev), str(dev)])
    conversations.main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[:3] == [
        f"| | {tmp_path.name} dev | {tmp_path.name} dev |",
        "|---|---|---|",
        "| conversations | 2 | 2 |",
    ]
    write("dev.json", [{"qid": "q1", "conv_id": 1, "question": "x", "answer": "y", "gold_docids": ["a1"]}])
    with pytest.raises(ValueError, match=r"dev\.json: q1: no field 'topic'; give"):
        conversations.read_column(dev)
    write("dev.json", [turn(1, "x", "Hamlet", "z9")])
    with pytest.raises(ValueError, match=r"collection\.jsonl: no passage 'z9', a gold of dev\.json; convert"):
        conversations.read_column(dev)
