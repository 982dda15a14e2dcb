"""data_preprocess.subset: the first questions with their qrels, byte for byte as head and awk write them."""

import subprocess
import sys
from pathlib import Path

import pytest

from data_preprocess import subset
from data_preprocess.subset import subset as write_subset

CONVERSATIONS = '{"qid": "a_1", "question": "é?"}\n{"qid": "a_2"}\n{"qid":"b_1"}\n{"qid": "b_10"}\n'
QRELS = "b_1 0 d7 1\na_1 0 d1 1\na_1\t0\td2\t2\nb_10 0 d7 0"
AWK = (
    'NR == FNR { if (match($0, /"qid": *"[^"]*"/)) { q = substr($0, RSTART, RLENGTH); gsub(/"qid": *"|"$/, "", q); '
    "keep[q] } next } $1 in keep"
)


@pytest.fixture
def data(tmp_path: Path) -> tuple[Path, Path]:
    """A conversations file and its qrels, whose order and last line end differ."""
    (tmp_path / "data.json").write_text(CONVERSATIONS, encoding="utf-8")
    (tmp_path / "data.trec").write_text(QRELS)
    return tmp_path / "data.json", tmp_path / "data.trec"


@pytest.mark.parametrize("limit", [1, 2, 3, 4, 9, None])
def test_files_equal_those_of_head_and_awk(data: tuple[Path, Path], tmp_path: Path, limit: int | None) -> None:
    conversations, qrels = data
    counts = write_subset(conversations, qrels, limit, tmp_path / "out", "part")
    head = subprocess.run(["head", "-n", str(limit or 99), conversations], capture_output=True, check=True).stdout
    (tmp_path / "head.json").write_bytes(head)
    awk = subprocess.run(["awk", AWK, tmp_path / "head.json", qrels], capture_output=True, check=True).stdout
    assert (tmp_path / "out" / "part.json").read_bytes() == head
    assert (tmp_path / "out" / "part.trec").read_bytes() == awk
    number = min(limit or 4, 4)
    without = int(number > 1)  # a_2
    assert counts == {"questions": number, "qrels": awk.count(b"\n"), "questions without qrels": without}


def test_the_command_counts_what_it_writes(
    data: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--input", data[0], "--qrels", data[1], "--limit", 3, "--output", tmp_path / "out"]
    monkeypatch.setattr(sys, "argv", ["subset", *map(str, flags)])
    subset.main()
    written = "3 questions, 3 qrels, 1 questions without qrels"
    assert capsys.readouterr().out == f"wrote test.json, test.trec in {tmp_path / 'out'}: {written}\n"
    assert (tmp_path / "out" / "test.json").read_text().splitlines() == CONVERSATIONS.splitlines()[:3]


@pytest.mark.parametrize(
    ("text", "limit", "problem"),
    [
        (CONVERSATIONS, 0, "--limit must be at least 1, got 0"),
        ("\n", None, "has no question"),
        ('{"qid": "a"}\n{"id": 1}\n', None, "data.json:2: needs 'qid' \\(a string\\), got None"),
    ],
)
def test_mistakes_are_one_sentence_and_write_nothing(
    data: tuple[Path, Path], tmp_path: Path, text: str, limit: int | None, problem: str
) -> None:
    data[0].write_text(text)
    with pytest.raises(ValueError, match=problem):
        write_subset(*data, limit, tmp_path / "out")
    assert not (tmp_path / "out").exists()
