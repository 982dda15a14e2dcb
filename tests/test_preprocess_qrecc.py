"""QReCC in the form of the shared task: turns as a JSON array, passages inside a zip file."""

import json
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from data_preprocess import qrecc

SAMPLE = Path(__file__).resolve().parents[2] / "shared" / "data" / "qrecc" / "dev-sampled2k.json.gz"

Run = Callable[..., None]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Run:
    def call(*arguments: object) -> None:
        monkeypatch.setattr(sys, "argv", ["qrecc", *map(str, arguments)])
        qrecc.main()

    return call


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _turn(conv: int, turn: int, golds: list[str], answer: str | None = None) -> dict[str, Any]:
    return {
        "Conversation_no": conv,
        "Turn_no": turn,
        "Conversation_source": "quac",
        "Question": f"q{conv}.{turn}",
        "Truth_answer": f"a{conv}.{turn}" if answer is None else answer,
        "Truth_rewrite": f"rewrite {conv}.{turn}",
        "Truth_passages": golds,
    }


TRAIN = [
    _turn(1, 1, ["http://x/a_p0"]),
    _turn(1, 2, [], answer=""),  # no gold: no query, but part of what follows
    _turn(1, 3, ["http://x/a_p0", "http://y/b_p1", "http://x/a_p0"]),
    _turn(2, 1, [""]),  # another way to have no gold
    _turn(2, 2, ["http://y/b_p1"]),
    _turn(3, 1, ["http://z/c_p2"]),
]
PASSAGES = {
    "collection-paragraph/wayback/one.jsonl": [("http://y/b_p1", "passage b"), ("http://blank/_p0", "")],
    "collection-paragraph/wayback-backfill/two.jsonl": [("http://z/c_p2", "passage c")],
    "collection-paragraph/commoncrawl/three.jsonl": [("http://x/a_p0", "passage ä")],
    "collection-paragraph/empty.jsonl": [],
}


@pytest.fixture
def release(tmp_path: Path) -> Path:
    raw = tmp_path / "raw"
    raw.mkdir()
    (raw / "scai-qrecc21-training-turns.json").write_text(json.dumps(TRAIN))
    (raw / "scai-qrecc21-test-turns.json").write_text(json.dumps(TRAIN[:3]))
    with zipfile.ZipFile(raw / "passages.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.mkdir("collection-paragraph")
        archive.writestr("collection-paragraph/README.txt", "no passages here")
        for name, passages in PASSAGES.items():
            archive.writestr(
                name, "".join(json.dumps({"id": docid, "contents": text}) + "\n" for docid, text in passages)
            )
    return raw


def test_a_full_release_is_converted(
    run: Run, release: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    run("--input", release, "--output", out, "--validation-conversations", 1)
    written = {split: _lines(out / f"{split}.json") for split in ("train", "validation", "test")}
    assert sorted(turn["qid"] for turn in written["train"] + written["validation"]) == [
        f"QReCC-Train_{t}" for t in ("1_1", "1_3", "2_2", "3_1")
    ]
    assert {turn["conv_id"] for turn in written["train"]}.isdisjoint(
        {turn["conv_id"] for turn in written["validation"]}
    )
    assert all("rewrite" not in turn for turn in written["train"])
    assert written["test"][1] == {
        "qid": "QReCC-Test_1_3",
        "conv_id": 1,
        "turn_id": 3,
        "question": "q1.3",
        "context": ["q1.1", "a1.1", "q1.2", "UNANSWERABLE"],
        "answer": "a1.3",
        "gold_docids": ["http://x/a_p0", "http://y/b_p1"],
        "rewrite": "rewrite 1.3",
        "source": "quac",
    }
    assert (out / "test.trec").read_text().splitlines()[1:] == [
        "QReCC-Test_1_3 0 http://x/a_p0 1",
        "QReCC-Test_1_3 0 http://y/b_p1 1",
    ]
    assert pq.read_table(out / "test.parquet").to_pylist()[1]["reward_model"]["ground_truth"] == [
        "http://x/a_p0",
        "http://y/b_p1",
    ]
    collection = _lines(out / "collection.jsonl")
    assert [passage["id"] for passage in collection] == [
        "http://x/a_p0",
        "http://y/b_p1",
        "http://blank/_p0",
        "http://z/c_p2",
    ]  # commoncrawl first
    assert collection[0]["contents"] == "passage ä"
    assert json.loads((out / "manifest.json").read_text())["steps"]["collection"]["counts"] == {
        "passages": 4,
        "blank": 1,
        "missing_golds": 0,
    }
    capsys.readouterr()
    run("--input", release, "--output", out, "--validation-conversations", 1)
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["reused", "reused", "reused"]


@pytest.mark.parametrize("name", ["NewContext", "Context"])
def test_single_turns_use_their_context_field(name: str, run: Run, tmp_path: Path) -> None:
    turn = _turn(4, 3, ["http://x/a_p0"]) | {name: ["q4.1", "a4.1", "q4.2", ""]}
    (tmp_path / "test.json").write_text(json.dumps([turn, _turn(4, 4, ["http://x/a_p0"])]))
    run("--test", tmp_path / "test.json", "--without-train", "--without-collection", "--output", tmp_path / "out")
    contexts = [turn["context"] for turn in _lines(tmp_path / "out" / "test.json")]
    assert contexts == [
        ["q4.1", "a4.1", "q4.2", "UNANSWERABLE"],
        ["q4.1", "a4.1", "q4.2", "UNANSWERABLE", "q4.3", "a4.3"],
    ]


@pytest.mark.parametrize(
    ("place", "change", "message"),
    [
        (2, {"Question": ""}, r"record 3: field 'Question' is blank"),
        (
            2,
            {"Truth_passages": "http://x"},
            r"record 3: field 'Truth_passages' must be a list of strings, got 'http://x'",
        ),
        (2, {"Truth_passages": ["a b"]}, r"record 3: field 'qid' or 'gold_docids' has white space"),
        (
            2,
            {"Turn_no": 5},
            r"record 3: field 'Turn_no' is 5 in conversation 1, but the turns before it are not all in the file",
        ),
        (
            2,
            {"Turn_no": 5, "Context": ["q"]},
            r"record 3: field 'Context' must have 4 questions and answers before turn 5, got 1 strings",
        ),
        (2, {"Turn_no": 1, "Context": []}, r"record 3: field 'qid' repeats 'QReCC-Test_1_1'"),
    ],
)
def test_a_malformed_turn_is_named_or_skipped(
    place: int, change: dict[str, Any], message: str, run: Run, release: Path, tmp_path: Path
) -> None:
    turns = [dict(turn) for turn in TRAIN]
    turns[place].update(change)
    path = release / "scai-qrecc21-test-turns.json"
    path.write_text(json.dumps(turns))
    arguments = ("--test", path, "--without-train", "--without-collection", "--output", tmp_path / "out")
    with pytest.raises(ValueError, match=f"{path.name}: {message}"):
        run(*arguments)
    run(*arguments, "--skip-bad", 1)
    assert [turn["qid"] for turn in _lines(tmp_path / "out" / "test.json")] == [
        "QReCC-Test_1_1",
        "QReCC-Test_2_2",
        "QReCC-Test_3_1",
    ]


def test_a_malformed_passage_names_archive_member_and_line(run: Run, release: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(release / "passages.zip", "a") as archive:
        archive.writestr("late/bad.jsonl", '{"id": "http://ok/_p1", "contents": "x"}\n{"id": "http://bad/_p2"}\n')
    arguments = ("--input", release, "--output", tmp_path / "out", "--validation-conversations", 1)
    with pytest.raises(ValueError, match=r"passages\.zip!late/bad\.jsonl:2: field 'contents' is missing"):
        run(*arguments)
    run(*arguments, "--skip-bad", 1)
    assert len(_lines(tmp_path / "out" / "collection.jsonl")) == 5


def test_a_gold_passage_that_is_not_in_the_archive_is_named(run: Run, release: Path, tmp_path: Path) -> None:
    (release / "scai-qrecc21-test-turns.json").write_text(json.dumps([_turn(9, 1, ["http://nowhere/_p0"])]))
    with pytest.raises(ValueError, match=r"gold passage 'http://nowhere/_p0' is not in the collection"):
        run("--input", release, "--output", tmp_path / "out", "--validation-conversations", 1)


def test_a_damaged_archive_is_one_sentence(run: Run, release: Path, tmp_path: Path) -> None:
    path = release / "passages.zip"
    content = bytearray(path.read_bytes())
    place = content.index(b"two.jsonl") + len("two.jsonl") + 4
    content[place : place + 8] = b"\xff" * 8
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"passages\.zip!.*two\.jsonl: the archive is damaged .*fetch it again"):
        run("--input", release, "--output", tmp_path / "out", "--validation-conversations", 1)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("nothing.txt", "")
    with pytest.raises(ValueError, match=r"has no \.jsonl member"):
        run("--input", release, "--output", tmp_path / "out", "--validation-conversations", 1)


def test_what_is_missing_is_named_with_its_source(run: Run, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError,
        match=r"QReCC lacks --train, --test, --passages: get the turns from https://zenodo.org/records/5543685",
    ):
        run("--input", tmp_path, "--output", tmp_path / "out")


@pytest.mark.skipif(not SAMPLE.exists(), reason=f"the QReCC sample is not at {SAMPLE}")
def test_the_real_sample(run: Run, tmp_path: Path) -> None:
    run("--test", SAMPLE, "--without-train", "--without-collection", "--output", tmp_path / "out")
    turns = _lines(tmp_path / "out" / "test.json")
    counts = json.loads((tmp_path / "out" / "manifest.json").read_text())["steps"]["test"]["counts"]
    assert counts == {"test": {"queries": 927, "conversations": 727, "qrels": 1101}}
    assert all(len(turn["context"]) == 2 * (turn["turn_id"] - 1) for turn in turns)
    assert all("" not in turn["context"] for turn in turns)
    assert sum("UNANSWERABLE" in turn["context"] for turn in turns) > 0
    assert max(len(turn["gold_docids"]) for turn in turns) == 43
