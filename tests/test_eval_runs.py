"""Reading and writing runs and qrels: every form that is read, every fault with its line, the order kept."""

import gzip
import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import pytrec_eval
from hypothesis import given, settings
from hypothesis import strategies as st

from eval import columns as reading
from eval.columns import Columns
from eval.runs import decreasing, from_mapping, read_qrels, read_run, write_run

ROOT = Path(__file__).resolve().parents[1]
SIX = "q1 Q0 d1 1 2.5 t\nq1 Q0 d2 2 1.5 t\nq2 Q0 d1 1 -3e2 t\n"
ROWS = [("q1", "d1", 2.5), ("q1", "d2", 1.5), ("q2", "d1", -300.0)]


def rows(columns: Columns) -> list[tuple[str, str, float]]:
    qids = columns.qids.to_pylist()
    return list(
        zip((qids[i] for i in columns.query_of_row), columns.docids.to_pylist(), columns.values.tolist(), strict=True)
    )


FORMS = {
    "six": SIX.encode(),
    "no newline at the end": SIX.encode().rstrip(),
    "crlf": SIX.replace("\n", "\r\n").encode(),
    "old mac": SIX.replace("\n", "\r").encode(),
    "tabs": SIX.replace(" ", "\t").encode(),
    "ragged": SIX.replace(" ", "  \t ").replace("\n", " \n\n").encode(),
    "indented": b"\n \n  " + SIX.encode(),
    "bom": b"\xef\xbb\xbf" + SIX.encode(),
    "gz": gzip.compress(SIX.encode()),
    "plus sign": SIX.replace("2.5", "+2.5").encode(),
    "seven": b"q1 Q0 d1 1 2.5 0.9 ance\nq1 Q0 d2 2 1.5 0.8 ance\nq2 Q0 d1 1 -300 0.1 ance\n",
    "json": json.dumps({"q1": {"d1": 2.5, "d2": 1.5}, "q2": {"d1": -300}}).encode(),
    "json.gz": gzip.compress(json.dumps({"q1": {"d1": 2.5, "d2": 1.5}, "q2": {"d1": -300}}).encode()),
}


@pytest.mark.parametrize("form", FORMS)
def test_all_forms_of_a_run(form: str, tmp_path: Path) -> None:
    (tmp_path / "run").write_bytes(FORMS[form])
    assert rows(read_run(tmp_path / "run")) == ROWS


def test_a_pipe_is_read() -> None:
    command = f"{sys.executable} -m eval.metrics --run <(printf '{SIX}') --qrels <(printf 'q1 0 d2 1\\n') --json"
    script = f"cat <(printf '{SIX}') > /dev/null; {command}"
    done = subprocess.run(["bash", "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["MRR"] == 0.5


def test_ids_are_taken_unchanged(tmp_path: Path) -> None:
    """Numbers stay text, quotes and the words NA and null mean nothing, queries may stand apart, non-ASCII is read."""
    (tmp_path / "run").write_text(
        '007 Q0 1e3 1 2 t\nNA Q0 null 1 5 t\n"q Q0 d"2 1 1 t\n007 Q0 "é 2 1 t\n#x Q0 a,b\\ 1 1 t\n'
    )
    assert rows(read_run(tmp_path / "run")) == [
        ("007", "1e3", 2),
        ("NA", "null", 5),
        ('"q', 'd"2', 1),
        ("007", '"é', 1),
        ("#x", "a,b\\", 1),
    ]


def test_qrels_of_any_grade(tmp_path: Path) -> None:
    (tmp_path / "qrels").write_text("q1 0 d1 -2\nq1\t0\td2   4\n\nq2 Q0 d1 0\n")
    assert rows(read_qrels(tmp_path / "qrels")) == [("q1", "d1", -2), ("q1", "d2", 4), ("q2", "d1", 0)]
    (tmp_path / "qrels").write_text('{"q1": {"d1": -2, "d2": 4}, "q2": {"d1": 0}}')
    assert rows(read_qrels(tmp_path / "qrels")) == [("q1", "d1", -2), ("q1", "d2", 4), ("q2", "d1", 0)]


GOOD = b"q1 Q0 d1 1 2.5 t\n"
FAULTS = {
    "empty": (b"", "is empty"),
    "blank": (b" \n\r\n\t\n", "is empty"),
    "empty gz": (gzip.compress(b""), "is empty"),
    "cut gz": (gzip.compress(GOOD * 1000)[:40], "gzip stream is damaged"),
    "binary": (GOOD + bytes(range(256)) * 9, ":2: has a NUL byte"),
    "utf-16": (GOOD.decode().encode("utf-16"), ":1: has a NUL byte"),
    "latin-1": (GOOD + "q1 Q0 é 1 2 t\n".encode("latin-1"), ":2: not UTF-8"),
    "five columns": (
        GOOD + b"\nq1 Q0 d2 2 1.5\n",
        ":3: found 5 columns where a line of a run file has 6 (qid Q0 docid rank score tag), or the reference's 7",
    ),
    "one column": (b"hello\n", ":1: found 1 column where"),
    "eight columns": (GOOD + b"q1 Q0 d2 2 1.5 t u v\n", ":2: found 8 columns"),
    "mixed columns": (b"\n" + GOOD + b"q1 Q0 d2 2 1.5 3 t\n", ":3: found 7 columns where line 2 has 6"),
    "nan": (GOOD + b"q1 Q0 d2 2 nan t\n", ":2: the score must be a finite number within the range of float32, got nan"),
    "infinite": (GOOD + b"q1 Q0 d2 2 -inf t\n", ":2: the score must be a finite number"),
    "beyond float32": (GOOD + b"q1 Q0 d2 2 1e39 t\n", ":2: the score must be a finite number within the range of"),
    "word": (GOOD + b"q1 Q0 d2 2 high t\n", ":2: the score must be a number, got 'high'"),
    "duplicate": (b"\n" + GOOD + b"q2 Q0 d1 1 2 t\r\n" + GOOD, ":4: passage 'd1' of query 'q1' is on line 2 already"),
    "huge line": (GOOD + b"x" * 3_000_000, ":2: a line of 3,000,000 bytes, where at most 1,048,576 are read"),
    "huge id": (GOOD + b"q1 Q0 " + b"x" * 5000 + b" 1 1 t\n", ":2: a docid of 5,000 bytes, where at most 4,096"),
    "bad json": (b'{"q1":\n {"d1": }}', ":2: not valid JSON"),
    "json list": (b'{"q1": [1]}', "query 'q1' must be an object {docid: score}, got list"),
    "json text": (b'{"q1": {"d1": "2"}}', "query 'q1', passage 'd1': the score must be a number, got '2'"),
    "json nan": (b'{"q1": {"d1": NaN}}', "query 'q1', passage 'd1': the score must be a finite number"),
    "json twice": (b'{"q1": {"d1": 2, "d1": 3}}', "the key 'd1' occurs twice"),
    "json empty": (b'{"q1": {}}', "is empty"),
    "json latin-1": ('{"é": {}}'.encode("latin-1"), "not UTF-8"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_of_a_run(fault: str, tmp_path: Path) -> None:
    content, words = FAULTS[fault]
    (tmp_path / "run").write_bytes(content)
    with pytest.raises(ValueError, match=r"^[^\n]+$") as caught:
        read_run(tmp_path / "run")
    assert str(caught.value).startswith(str(tmp_path / "run"))
    assert words in str(caught.value)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("q1 0 d1 1\nq1 0 d2 1.5\n", ":2: the grade must be a whole number, got '1.5'"),
        ("q1 0 d1 1\nq1 0 d2\n", ":2: found 3 columns where a line of a qrels file has 4 (qid 0 docid grade)"),
        ("q1 0 d1 1\nq1 0 d2 1\nq1 0 d1 0\n", ":3: passage 'd1' of query 'q1' is on line 1 already"),
        ("q1 0 d1 99999999999\n", ":1: the grade must be within"),
        ("q1 0 d1 99999999999999999999999\n", ":1: the grade must be within"),
        ('{"q1": {"d1": 1.0}}', "query 'q1', passage 'd1': the grade must be a whole number, got 1.0"),
        ('{"q1": {"d1": true}}', "the grade must be a whole number, got True"),
    ],
)
def test_faults_of_qrels(text: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "qrels").write_text(text)
    with pytest.raises(ValueError, match=r"^[^\n]+$") as caught:
        read_qrels(tmp_path / "qrels")
    assert words in str(caught.value)


def test_good_files_are_read_without_the_line_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "_slow", None)
    for form in FORMS:
        if form != "plus sign":
            (tmp_path / "run").write_bytes(FORMS[form])
            assert rows(read_run(tmp_path / "run")) == ROWS


IDS = st.text(st.characters(exclude_categories=("Z", "C")), min_size=1, max_size=20)


@settings(max_examples=100)
@given(
    run=st.dictionaries(
        IDS, st.dictionaries(IDS, st.floats(-1e30, 1e30), min_size=1, max_size=5), min_size=1, max_size=4
    )
)
def test_any_ids_are_read_unchanged(run: dict[str, dict[str, float]], tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "any.run"
    expected = [(qid, docid, score) for qid, scores in run.items() for docid, score in scores.items()]
    if next(iter(run)).startswith(("{", "\ufeff")):
        return
    path.write_bytes("".join(f"{qid} Q0 {docid} 1 {score!r} t\n" for qid, docid, score in expected).encode())
    assert rows(read_run(path)) == expected


@settings(max_examples=100)
@given(
    pairs=st.lists(
        st.tuples(st.sampled_from(["q", "r"]), st.text("ab", min_size=1, max_size=18)), min_size=1, max_size=30
    )
)
def test_duplicates_are_found_and_nothing_else(
    pairs: list[tuple[str, str]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "twice.run"
    path.write_text("".join(f"{qid} Q0 {docid} 1 1 t\n" for qid, docid in pairs))
    seconds = [index for index, pair in enumerate(pairs) if pair in pairs[:index]]
    if not seconds:
        assert len(rows(read_run(path))) == len(pairs)
        return
    line = seconds[0] + 1
    with pytest.raises(ValueError, match=rf":{line}: .* is on line {pairs.index(pairs[seconds[0]]) + 1} already"):
        read_run(path)


def test_equal_hashes_are_no_duplicates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("eval.columns._hashes", lambda docids: np.zeros(len(docids), np.uint64))
    (tmp_path / "run").write_text(SIX)
    assert rows(read_run(tmp_path / "run")) == ROWS


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ([3.0, 2.0, 1.0], [3.0, 2.0, 1.0]),
        ([2.0, 2.0, 2.0], [2.0, 2.0 - 2.0**-23, 2.0 - 2.0**-22]),
        ([1.0, 5.0], [1.0, 1.0 - 2.0**-24]),
        ([0.0, -0.0, 0.0], [0.0, -(2.0**-149), -(2.0**-148)]),
        ([-1.0, -1.0], [-1.0, -1.0 - 2.0**-23]),
        ([1.0, 1.0 - 1e-12, 0.5], [1.0, 1.0 - 2.0**-24, 0.5]),
        ([], []),
    ],
)
def test_scores_are_lowered_by_the_least_step(scores: list[float], expected: list[float]) -> None:
    assert decreasing(scores).tolist() == expected


@settings(max_examples=150)
@given(
    scores=st.lists(st.sampled_from([0.0, 1.0, 7.25, 1e-40, -2.5]) | st.floats(-1e30, 1e30), min_size=1, max_size=40)
)
def test_trec_eval_sees_the_order_that_was_written(
    scores: list[float], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Docids ascend, so that every tie would turn the order round: each passage must be found at its own rank."""
    path = tmp_path_factory.getbasetemp() / "order.trec"
    scores = sorted(scores, reverse=True)
    write_run(path, [("q", [(f"d{index:03}", score) for index, score in enumerate(scores)])], "t")
    written = {line.split()[2]: float(line.split()[4]) for line in path.read_text().splitlines()}
    for index in {0, len(scores) // 2, len(scores) - 1}:
        docid = f"d{index:03}"
        result = pytrec_eval.RelevanceEvaluator({"q": {docid: 1}}, {"recip_rank"}).evaluate({"q": written})
        assert result["q"]["recip_rank"] == 1 / (index + 1)
    assert read_run(path).docids.to_pylist() == sorted(written)
    values = list(written.values())
    assert all(a > b for a, b in pairwise(values))


def test_written_lines(tmp_path: Path) -> None:
    path = tmp_path / "new" / "run.trec"
    assert write_run(path, [("q1", [("d2", 12.5), ("d1", 12.5)]), ("q2", []), ("q3", [("d1", 0.1)])], "bm25") == 3
    assert path.read_text() == "q1 Q0 d2 1 12.5 bm25\nq1 Q0 d1 2 12.499999 bm25\nq3 Q0 d1 1 0.100000001 bm25\n"


@pytest.mark.parametrize(
    ("results", "words"),
    [
        ([("q 1", [("d1", 1.0)])], "a qid in a run must be one word without white space, got 'q 1'"),
        ([("q1", [("", 1.0)])], "a docid in a run must be one word"),
        ([("q1", [("d1", 1.0), ("d1", 0.5)])], "query 'q1' has the same passage twice"),
        ([("q1", []), ("q1", [])], "query 'q1' occurs twice"),
        ([("q1", [("d1", float("nan"))])], "query 'q1': the score must be a finite number"),
    ],
)
def test_what_cannot_be_written_leaves_the_old_file(
    results: list[tuple[str, list[tuple[str, float]]]], words: str, tmp_path: Path
) -> None:
    path = tmp_path / "run.trec"
    path.write_text("old")
    with pytest.raises(ValueError, match=words):
        write_run(path, results, "t")
    assert path.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["run.trec"]


def test_mapping_faults_name_the_place() -> None:
    with pytest.raises(ValueError, match=r"^here: query 'q1' must be an object"):
        from_mapping({"q1": 3}, name="here")  # type: ignore[dict-item]
