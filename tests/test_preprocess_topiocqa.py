"""TopiOCQA in the forms of its public releases, and the proxy on the real conversations."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from data_preprocess import topiocqa

SHARED = Path(__file__).resolve().parents[2] / "shared"
REAL_ZIP = SHARED / "data" / "topiocqa" / "topiocqa.zip"
needs_real_zip = pytest.mark.skipif(
    not REAL_ZIP.exists(), reason=f"the real TopiOCQA conversations are not at {REAL_ZIP}"
)

Run = Callable[..., None]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Run:
    def call(*arguments: object) -> None:
        monkeypatch.setattr(sys, "argv", ["topiocqa", *map(str, arguments)])
        topiocqa.main()

    return call


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _dataset(conversations: int, turns: int) -> list[dict[str, Any]]:
    """Turn 2 of every conversation is UNANSWERABLE; each conversation has a topic of its own with two sections."""
    records = []
    for conv in range(1, conversations + 1):
        context: list[str] = []
        for turn in range(1, turns + 1):
            answered = turn != 2
            answer = f"answer {conv}.{turn}" if answered else "UNANSWERABLE"
            records.append(
                {
                    "Context": list(context),
                    "Conversation_no": conv,
                    "Turn_no": turn,
                    "Question": f"question {conv}.{turn}?",
                    "is_nq": turn == 1,
                    "Answer": answer,
                    "Topic": f"Topic {conv}" if answered else "",
                    "Topic_section": f"Section {turn % 2}" if answered else "",
                }
            )
            context += [f"question {conv}.{turn}?", answer]
    return records


def _retriever(dataset: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {
            "conv_id": turn["Conversation_no"],
            "turn_id": turn["Turn_no"],
            "question": "q [SEP] a",
            "positive_ctxs": [
                {"title": "T", "text": "x", "passage_id": f"wiki:{turn['Conversation_no'] % 3}"},
                {"title": "T", "text": "y", "passage_id": "wiki:9"},
            ],
            "hard_negative_ctxs": [],
        }
        for turn in dataset
    ]


@pytest.fixture
def release(tmp_path: Path) -> Path:
    """A folder as `python -m data_preprocess.download topiocqa` leaves it."""
    raw = tmp_path / "raw"
    for split, conversations in (("train", 6), ("dev", 3)):
        dataset = _dataset(conversations, 3)
        for folder, records in (("topiocqa_dataset", dataset), ("retriever/all_history", _retriever(dataset))):
            (raw / folder).mkdir(parents=True, exist_ok=True)
            (raw / folder / f"{split}.json").write_text(json.dumps(records))
    rows = [f'wiki:{i}\t"text {i} ""quoted"""\tArticle {i} [SEP] Part [SEP] Sub' for i in range(10)]
    (raw / "full_wiki_segments.tsv").write_text("id\ttext\ttitle\n" + "\n".join(rows) + "\n")
    return raw


def test_a_full_release_is_converted(
    run: Run, release: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    run("--input", release, "--output", out, "--validation-conversations", 2)
    train, validation, dev = (_lines(out / f"{split}.json") for split in ("train", "validation", "dev"))
    assert [len(train), len(validation), len(dev)] == [12, 6, 9]
    assert {turn["conv_id"] for turn in train}.isdisjoint({turn["conv_id"] for turn in validation})
    assert dev[1] == {
        "qid": "topiocqa-dev_1_2",
        "conv_id": 1,
        "turn_id": 2,
        "question": "question 1.2?",
        "context": ["question 1.1?", "answer 1.1"],
        "answer": "UNANSWERABLE",  # a query with a gold passage all the same, as in the reference
        "topic": "",
        "topic_section": "",
        "gold_docids": ["wiki:1"],  # the first of positive_ctxs, as in the published qrels
        "positive_ctxs": [
            {"title": "T", "text": "x", "passage_id": "wiki:1"},
            {"title": "T", "text": "y", "passage_id": "wiki:9"},
        ],
    }
    assert all(turn["qid"].startswith("topiocqa-train_") for turn in train + validation)
    assert (out / "dev.trec").read_text().splitlines()[1] == "topiocqa-dev_1_2 0 wiki:1 1"
    collection = _lines(out / "collection.jsonl")
    assert len(collection) == 10
    assert collection[3] == {"id": "wiki:3", "contents": 'Article 3 Part Sub text 3 "quoted"'}
    assert pq.read_table(out / "validation.parquet").num_rows == 6

    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    capsys.readouterr()
    run("--input", release, "--output", out, "--validation-conversations", 2)
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["reused", "reused", "reused"]
    assert {path.name: path.stat().st_mtime_ns for path in out.iterdir()} == before
    run("--input", release, "--output", out, "--validation-conversations", 0)
    said = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert said == ["wrote", "reused", "reused"]
    assert not (out / "validation.json").exists()
    assert len(_lines(out / "train.json")) == 18


def test_files_can_be_named_one_by_one(run: Run, release: Path, tmp_path: Path) -> None:
    flags: list[object] = ["--collection", release / "full_wiki_segments.tsv"]
    for kind, folder in (("dataset", "topiocqa_dataset"), ("retriever", "retriever/all_history")):
        for split in ("train", "dev"):
            flags += [f"--{kind}-{split}", release / folder / f"{split}.json"]
    run(*flags, "--output", tmp_path / "out", "--validation-conversations", 1)
    assert len(_lines(tmp_path / "out" / "dev.json")) == 9


@needs_real_zip
def test_without_gold_passages_the_error_says_what_is_missing_and_that_there_is_a_proxy(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "data_preprocess.topiocqa",
        "--input",
        str(REAL_ZIP),
        "--output",
        str(tmp_path / "out"),
    ]
    result = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1
    assert result.stderr.startswith(
        "error: TopiOCQA's conversations have no gold passages, and --retriever-train, --retriever-dev, --collection"
    )
    for part in ("zenodo.org/records/6151011", "zenodo.org/records/6149599", "--proxy"):
        assert part in result.stderr
    assert not (tmp_path / "out").exists()


def test_missing_conversations_are_an_error(run: Run, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"conversations are missing: give --dataset-train and --dataset-dev, from https://zenodo"
    ):
        run("--input", tmp_path, "--output", tmp_path / "out", "--proxy")


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        (
            "topiocqa_dataset/dev.json",
            {"Question": None},
            r"dev\.json: record 5: field 'Question' must be a string, got None",
        ),
        (
            "topiocqa_dataset/dev.json",
            {"Context": ["odd"]},
            r"dev\.json: record 5: field 'Context' must alternate question and answer",
        ),
        (
            "topiocqa_dataset/dev.json",
            {"Turn_no": "two"},
            r"dev\.json: record 5: field 'Turn_no' must be a whole number",
        ),
        (
            "retriever/all_history/dev.json",
            {"positive_ctxs": []},
            r"dev\.json: record 5: field 'positive_ctxs' is empty",
        ),
        (
            "retriever/all_history/dev.json",
            {"positive_ctxs": [{"title": "T"}]},
            r"dev\.json: record 5, positive_ctxs\[0\]: field 'passage_id' is missing",
        ),
    ],
)
def test_a_malformed_turn_is_named_or_skipped(
    file: str,
    change: dict[str, Any],
    message: str,
    run: Run,
    release: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    records = json.loads((release / file).read_text())
    records[4].update(change)
    (release / file).write_text(json.dumps(records))
    arguments = ("--input", release, "--output", tmp_path / "out", "--validation-conversations", 1)
    with pytest.raises(ValueError, match=message):
        run(*arguments)
    run(*arguments, "--skip-bad", 1)
    assert "topiocqa-dev_2_2" not in {turn["qid"] for turn in _lines(tmp_path / "out" / "dev.json")}
    assert len(_lines(tmp_path / "out" / "dev.json")) == 8
    assert "skipped a malformed record: " in capsys.readouterr().err


def test_files_of_different_releases_are_refused(run: Run, release: Path, tmp_path: Path) -> None:
    path = release / "retriever/all_history/dev.json"
    records = json.loads(path.read_text())
    path.write_text(json.dumps(records[:-1]))
    with pytest.raises(ValueError, match="do not have the same number of turns"):
        run("--input", release, "--output", tmp_path / "out", "--validation-conversations", 1)
    path.write_text(json.dumps([records[1], records[0], *records[2:]]))
    with pytest.raises(
        ValueError, match=r"record 1: fields 'conv_id' and 'turn_id' are 1 and 2, but the turn beside it .* is 1 and 1"
    ):
        run("--input", release, "--output", tmp_path / "out", "--validation-conversations", 1, "--skip-bad", 5)


def test_the_proxy_by_hand(run: Run, release: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run("--input", release, "--output", out, "--proxy", "--validation-conversations", 1)
    collection = _lines(out / "collection.jsonl")
    assert (
        len(collection) == 6
    )  # one section with two answered turns for each of the 6 topics; dev's topics are among train's
    assert collection[0] == {
        "id": "proxy-00000",
        "contents": "Topic 1 Section 1 answer 1.1 answer 1.3 answer 1.1 answer 1.3",
    }
    assert collection[5] == {"id": "proxy-00005", "contents": "Topic 6 Section 1 answer 6.1 answer 6.3"}
    dev = _lines(out / "dev.json")
    assert [turn["qid"] for turn in dev] == [f"topiocqa-dev_{conv}_{turn}" for conv in (1, 2, 3) for turn in (1, 3)]
    assert dev[1]["context"] == ["question 1.1?", "answer 1.1", "question 1.2?", "UNANSWERABLE"]
    assert dev[3]["gold_docids"] == ["proxy-00001"]


@pytest.mark.slow
@needs_real_zip
def test_the_proxy_of_the_real_conversations_has_the_known_counts(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run("--input", REAL_ZIP, "--output", out, "--proxy", "--prompt-style", "compact", "--max-history-turns", 3)
    counts = json.loads((out / "manifest.json").read_text())["steps"]["proxy"]["counts"]
    assert counts == {
        "train": {"queries": 40601, "conversations": 3409, "qrels": 40601},
        "validation": {"queries": 1197, "conversations": 100, "qrels": 1197},
        "dev": {"queries": 2340, "conversations": 205, "qrels": 2340},
        "collection": {"passages": 27613, "blank": 0, "missing_golds": 0},
    }
    dev = _lines(out / "dev.json")
    assert dev[0] | {"gold_docids": []} == {
        "qid": "topiocqa-dev_1_1",
        "conv_id": 1,
        "turn_id": 1,
        "question": "where does the man with the golden gun take place",
        "context": [],
        "answer": "Britain",
        "topic": "The Man with the Golden Gun (film)",
        "topic_section": "Introduction",
        "gold_docids": [],
    }
    train = {turn["conv_id"] for turn in _lines(out / "train.json")}
    assert train.isdisjoint({turn["conv_id"] for turn in _lines(out / "validation.json")})
    assert pq.read_metadata(out / "train.parquet").num_rows == 40601


def test_a_killed_conversion_leaves_no_partial_collection_and_can_be_run_again(
    run: Run, release: Path, tmp_path: Path
) -> None:
    with open(release / "full_wiki_segments.tsv", "a") as file:
        file.writelines(f"more:{i}\t{'text ' * 200}\tTitle\n" for i in range(60_000))
    out = tmp_path / "out"
    arguments = ["--input", str(release), "--output", str(out), "--validation-conversations", "1"]
    root = Path(__file__).resolve().parents[1]
    process = subprocess.Popen(
        [sys.executable, "-m", "data_preprocess.topiocqa", *arguments], cwd=root, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 30
    while not list(out.glob("collection.jsonl.tmp-*")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (out / "collection.jsonl").exists()
    run(*arguments)
    assert not list(out.glob("*.tmp-*"))
    with open(out / "collection.jsonl", encoding="utf-8") as lines:
        assert sum(1 for _ in lines) == 60_010


def test_help_is_quick() -> None:
    for name in ("topiocqa", "qrecc", "mtrag", "demo", "demo_model", "download"):
        start = time.monotonic()
        result = subprocess.run(
            [sys.executable, "-m", f"data_preprocess.{name}", "--help"],
            capture_output=True,
            cwd=Path(__file__).parents[1],
        )
        assert result.returncode == 0
        assert time.monotonic() - start < 1.0
