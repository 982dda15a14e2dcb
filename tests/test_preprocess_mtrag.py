"""MTRAG: the three-file form (real, where it is at hand) and IBM's repository in its two ages."""

import gzip
import json
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from data_preprocess import mtrag
from data_preprocess.mtrag_ibm import user_turns, without_marker

REAL = Path(__file__).resolve().parents[2] / "shared" / "data" / "mtrag"

Run = Callable[..., None]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Run:
    def call(*arguments: object) -> None:
        monkeypatch.setattr(sys, "argv", ["mtrag", *map(str, arguments)])
        mtrag.main()

    return call


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _write_lines(path: Path, records: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


@pytest.mark.skipif(not REAL.exists(), reason=f"MTRAG is not at {REAL}")
def test_the_real_data_set(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run("--input", REAL, "--output", out)
    splits = {split: _lines(out / f"{split}.json") for split in ("train", "validation", "test", "all")}
    assert {split: len(turns) for split, turns in splits.items()} == {
        "train": 456,
        "validation": 82,
        "test": 239,
        "all": 777,
    }
    conversations = {split: {turn["conv_id"] for turn in turns} for split, turns in splits.items()}
    assert {split: len(ids) for split, ids in conversations.items()} == {
        "train": 66,
        "validation": 11,
        "test": 33,
        "all": 110,
    }
    assert len(conversations["train"] | conversations["validation"] | conversations["test"]) == 110
    released = sorted(line.split() for line in (REAL / "qrels.trec").read_text().splitlines())
    assert sorted(line.split() for line in (out / "all.trec").read_text().splitlines()) == released
    assert len(released) == 2128
    assert sorted(turn["qid"] for split in ("train", "validation", "test") for turn in splits[split]) == sorted(
        t["qid"] for t in splits["all"]
    )
    assert not any("rewrite" in turn for turn in splits["train"])
    assert all(turn["rewrite"] for turn in splits["all"])
    assert all(
        len(turn["context"]) == 2 * (turn["turn_id"] - 1) and not turn["question"].startswith("|")
        for turn in splits["all"]
    )
    assert pq.read_metadata(out / "train.parquet").num_rows == 456
    assert not (out / "all.parquet").exists()
    with open(out / "collection.jsonl", encoding="utf-8") as lines:
        first = json.loads(next(lines))
        assert first["contents"].startswith(
            "Designating the Record – California Appellate Courts Designating the Record"
        )
        assert sum(1 for _ in lines) == 37531


def _flat(folder: Path, conversations: int = 10) -> Path:
    """Conversations c0, c1, ... of 2 turns; turn 2 asks with IBM's marker."""
    queries, qrels = [], []
    for conv in range(conversations):
        for turn in (1, 2):
            qid = f"c{conv}<::>{turn}"
            history = [] if turn == 1 else [f"|user|: q{conv}.1", f"a{conv}.1"]
            queries.append(
                {
                    "_id": qid,
                    "domain": "fiqa",
                    "history": history,
                    "query": f"|user|: q{conv}.{turn}",
                    "response": f"a{conv}.{turn}",
                    "rewrite": f"|user|: r{conv}.{turn}",
                    "lastturn": f"q{conv}.{turn}",
                }
            )
            qrels.append(f"{qid} 0 d{turn} 1\n{qid} 0 d9 0\n")
    _write_lines(folder / "queries.jsonl", queries)
    (folder / "qrels.trec").write_text("".join(qrels))
    corpus = [{"_id": f"d{i}", "title": "T" if i else "", "text": f"text {i}", "domain": "fiqa"} for i in range(10)]
    (folder / "corpus.jsonl.gz").write_bytes(
        gzip.compress("".join(json.dumps(passage) + "\n" for passage in corpus).encode())
    )
    return folder


def test_markers_are_removed_grades_count_and_fractions_split(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(
        "--input",
        _flat(tmp_path / "raw"),
        "--output",
        out,
        "--train-fraction",
        0.5,
        "--validation-fraction",
        0,
        "--test-fraction",
        0.5,
    )
    assert not (out / "validation.json").exists()
    train, test, everything = _lines(out / "train.json"), _lines(out / "test.json"), _lines(out / "all.json")
    assert (len(train), len(test), len(everything)) == (10, 10, 20)
    assert everything[1] == {
        "qid": "c0<::>2",
        "conv_id": "c0",
        "turn_id": 2,
        "question": "q0.2",
        "context": ["q0.1", "a0.1"],
        "answer": "a0.2",
        "gold_docids": ["d2"],  # d9 is judged irrelevant
        "domain": "fiqa",
        "rewrite": "r0.2",
    }
    assert [passage["contents"] for passage in _lines(out / "collection.jsonl")[:2]] == ["text 0", "T text 1"]
    first = {turn["qid"] for turn in train}
    run(
        "--input",
        tmp_path / "raw",
        "--output",
        out,
        "--train-fraction",
        0.5,
        "--validation-fraction",
        0,
        "--test-fraction",
        0.5,
        "--seed",
        14,
    )
    assert {turn["qid"] for turn in _lines(out / "train.json")} != first


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"_id": "c0-2"}, r"queries\.jsonl:2: field '_id' must look like <conversation><::><turn>, got 'c0-2'"),
        ({"history": ["odd"]}, r"queries\.jsonl:2: field 'history' must alternate"),
        ({"query": ""}, r"queries\.jsonl:2: field 'query' is blank"),
        ({"rewrite": 5}, r"queries\.jsonl:2: field 'rewrite' must be a string, got 5"),
        ({"_id": "c99<::>1"}, r"the qrels judge 1 queries that are not among the queries, the first 'c0<::>2'"),
    ],
)
def test_a_malformed_query_is_named(change: dict[str, Any], message: str, run: Run, tmp_path: Path) -> None:
    raw = _flat(tmp_path / "raw")
    queries = _lines(raw / "queries.jsonl")
    queries[1].update(change)
    _write_lines(raw / "queries.jsonl", queries)
    with pytest.raises(ValueError, match=message):
        run("--input", raw, "--output", tmp_path / "out")


def test_malformed_qrels_and_passages_are_named(run: Run, tmp_path: Path) -> None:
    raw = _flat(tmp_path / "raw")
    with open(raw / "qrels.trec", "a") as file:
        file.write("c0<::>1 0 d1\n")
    with pytest.raises(ValueError, match=r"qrels\.trec:41: expected 'qid 0 docid grade', got 'c0<::>1 0 d1'"):
        run("--input", raw, "--output", tmp_path / "out")
    raw = _flat(tmp_path / "raw")
    (raw / "corpus.jsonl.gz").unlink()
    _write_lines(raw / "corpus.jsonl", [{"_id": "d1", "title": "", "text": "x"}] * 2)
    with pytest.raises(ValueError, match=r"corpus\.jsonl:2: field '_id' repeats 'd1'"):
        run("--input", raw, "--output", tmp_path / "out")


def test_what_is_missing_is_named(run: Run, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError,
        match=r"lacks queries\.jsonl, corpus\.jsonl, qrels\.trec .* get it from https://github.com/IBM/mt-rag-",
    ):
        run("--input", tmp_path, "--output", tmp_path / "out")
    with pytest.raises(ValueError, match="no such folder"):
        run("--input", tmp_path / "gone", "--output", tmp_path / "out")


def _repository(root: Path, human: str, qid: Callable[[str, int], str]) -> Path:
    """IBM's layout: two domains, one conversation of 3 turns each; turn 2 is unanswerable: in no retrieval task."""
    for domain in ("clapnq", "govt"):
        folder = root / human / "retrieval_tasks" / domain
        questions = [f"{domain} one?", f"{domain} two\nin two lines?", f"{domain} three?"]
        kept = (1, 3)
        _write_lines(
            folder / f"{domain}_lastturn.jsonl",
            [{"_id": qid(domain, t), "text": f"|user|: {questions[t - 1]} "} for t in kept],
        )
        _write_lines(
            folder / f"{domain}_rewrite.jsonl", [{"_id": qid(domain, t), "text": f"|user|: rewrite {t}"} for t in kept]
        )
        _write_lines(
            folder / f"{domain}_questions.jsonl",
            [
                {"_id": qid(domain, t), "text": "\n".join(f"|user|: {question}" for question in questions[:t])}
                for t in kept
            ],
        )
        (folder / "qrels").mkdir()
        rows = [f"{qid(domain, t)}\t{domain}-d{t}\t1\n" for t in kept]
        (folder / "qrels" / "dev.tsv").write_text("query-id\tcorpus-id\tscore\n" + "".join(rows))
        corpora = root / "corpora" / "passage_level"
        corpora.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(corpora / f"{domain}.jsonl.zip", "w") as archive:
            lines = [
                json.dumps({"_id": f"{domain}-d{i}", "title": "T", "text": f"{domain} {i}", "url": ""})
                for i in range(5)
            ]
            archive.writestr(f"{domain}.jsonl", "\n".join(lines))
    return root


HALVES = ("--train-fraction", 0.5, "--validation-fraction", 0, "--test-fraction", 0.5)


def test_ibms_repository_with_answers_from_the_generation_tasks(run: Run, tmp_path: Path) -> None:
    raw, out = (
        _repository(tmp_path / "raw", "mtrag-human", lambda domain, turn: f"{domain}c<::>{turn}"),
        tmp_path / "out",
    )
    tasks = []
    for domain in ("clapnq", "govt"):
        dialogue = [
            ("user", f"{domain} one?"),
            ("agent", "A1"),
            ("user", f"{domain} two\nin two lines?"),
            ("agent", "A2"),
            ("user", f"{domain} three?"),
        ]
        for turn in (1, 2, 3):
            said = [{"speaker": speaker, "text": text} for speaker, text in dialogue[: 2 * turn - 1]]
            tasks.append(
                {
                    "task_id": f"{domain}c::{turn}",
                    "input": said,
                    "targets": [{"speaker": "agent", "text": f"A{turn}"}],
                    "contexts": [],
                }
            )
    _write_lines(raw / "mtrag-human" / "generation_tasks" / "reference.jsonl", tasks)
    run("--input", raw, "--output", out, *HALVES)
    everything = _lines(out / "all.json")
    assert [turn["qid"] for turn in everything] == ["clapnqc<::>1", "clapnqc<::>3", "govtc<::>1", "govtc<::>3"]
    assert everything[3] == {
        "qid": "govtc<::>3",
        "conv_id": "govtc",
        "turn_id": 3,
        "question": "govt three?",
        "context": ["govt one?", "A1", "govt two\nin two lines?", "A2"],
        "answer": "A3",
        "gold_docids": ["govt-d3"],
        "domain": "govt",
        "rewrite": "rewrite 3",
    }
    assert len(_lines(out / "collection.jsonl")) == 10


def _old_qid(domain: str, turn: int) -> str:
    return f"author-1_17{domain == 'govt':d}{turn}"  # one author wrote both conversations


def test_the_earlier_repository_without_answers(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    run("--input", _repository(tmp_path / "raw", "human", _old_qid), "--output", out, *HALVES)
    everything = _lines(out / "all.json")
    assert everything[1]["context"] == ["clapnq one?", "", "clapnq two\nin two lines?", ""]
    assert [turn["turn_id"] for turn in everything] == [1, 3, 1, 3]
    assert everything[0]["conv_id"] == everything[1]["conv_id"] != everything[2]["conv_id"]
    assert "2 queries whose history lacks answers" in capsys.readouterr().out
    assert len(_lines(out / "train.json")) == len(_lines(out / "test.json")) == 2  # no conversation is torn apart


def test_the_earlier_repository_with_answers_from_the_conversations(run: Run, tmp_path: Path) -> None:
    raw, out = _repository(tmp_path / "raw", "human", _old_qid), tmp_path / "out"
    conversations = []
    for domain in ("clapnq", "govt"):
        messages = []
        for turn, question in enumerate(
            (f"{domain} one?", f"{domain} two\nin two lines?", f"{domain} three?"), start=1
        ):
            messages.append(
                {"speaker": "user", "text": question, "timestamp": int(_old_qid(domain, turn).rpartition("_")[2])}
            )
            messages.append({"speaker": "agent", "text": f"A{turn}", "timestamp": 9, "contexts": []})
        conversations.append({"author": "author-1", "messages": messages[:-1]})
    path = raw / "human" / "conversations" / "conversations.json"
    path.parent.mkdir()
    path.write_text(json.dumps(conversations))
    run("--input", raw, "--output", out, *HALVES)
    everything = _lines(out / "all.json")
    assert everything[1]["context"] == ["clapnq one?", "A1", "clapnq two\nin two lines?", "A2"]
    assert [turn["answer"] for turn in everything] == ["A1", "", "A1", ""]


def test_an_incomplete_repository_names_the_file(run: Run, tmp_path: Path) -> None:
    raw = _repository(tmp_path / "raw", "human", _old_qid)
    (raw / "corpora" / "passage_level" / "govt.jsonl.zip").unlink()
    with pytest.raises(ValueError, match=r"corpora/passage_level/govt\.jsonl\.zip: no such file"):
        run("--input", raw, "--output", tmp_path / "out")
    (raw / "human" / "retrieval_tasks" / "clapnq" / "qrels" / "dev.tsv").unlink()
    with pytest.raises(ValueError, match=r"clapnq/qrels/dev\.tsv: no such file"):
        run("--input", raw, "--output", tmp_path / "out")


def test_markers() -> None:
    assert without_marker(" |user|:  and his wife? ") == "and his wife?"
    assert without_marker("what does |user|: mean?") == "what does |user|: mean?"
    assert user_turns("|user|: one\nmore\n|user|: two\n|agent|: three") == ["one\nmore", "two", "three"]
