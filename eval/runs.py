"""TREC runs and qrels: read into columns, checked; written so that trec_eval sees the order of the list."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from convsearch.files import atomic_write
from eval.columns import QRELS, RUN, Columns, Format, checked_value, columns_of, line_of_row, load, parse

Results = Iterable[tuple[str, Sequence[tuple[str, float]]]]  # (qid, [(docid, score), best first])


def read_run(path: str | Path) -> Columns:
    """Reads a run: six TREC columns, the reference's seven (qid Q0 docid rank ORDER score tag), or JSON.

    JSON is {qid: {docid: score}}. The file is plain or gzipped, its columns separated by spaces or tabs, with any line
    ends. Of the seven columns the fifth counts, as in the reference's evaluation.

    Raises:
        ValueError: the file is empty, binary or malformed, a score is not finite, or a passage occurs twice under one
            query; names file and line (JSON: the key).
    """
    run, check = read_unchecked_run(path)
    check()
    return run


def read_unchecked_run(path: str | Path) -> tuple[Columns, Callable[[], None]]:
    """As ``read_run``; the second value checks that no passage occurs twice, for another thread to call."""
    return _read(path, RUN)


def read_qrels(path: str | Path) -> Columns:
    """Reads qrels, "qid 0 docid grade" or JSON {qid: {docid: grade}}; the rest as ``read_run``.

    Raises:
        ValueError: as ``read_run``; a grade is no whole number.
    """
    qrels, check = _read(path, QRELS)
    check()
    return qrels


def from_mapping(mapping: Mapping[str, Mapping[str, float]], form: Format = RUN, name: str = "run") -> Columns:
    """Columns of {qid: {docid: value}}; ``name`` opens the error messages.

    Raises:
        ValueError: something is no object, no number or not finite.
    """
    query_of_row: list[int] = []
    docids: list[str] = []
    values: list[float] = []
    expected = "a whole number" if form.integer else "a number"
    for number, (qid, scored) in enumerate(mapping.items()):
        where = f"{name}: query {qid!r}"
        if not isinstance(scored, Mapping):
            found = type(scored).__name__
            raise ValueError(f"{where} must be an object {{docid: {form.value_name}}}, got {found}")
        for docid, value in scored.items():
            cell = f"{where}, passage {docid!r}"
            if isinstance(value, bool) or not isinstance(value, int if form.integer else int | float):
                raise ValueError(f"{cell}: the {form.value_name} must be {expected}, got {value!r}")
            values.append(checked_value(cell, value, form))
        query_of_row += [number] * len(scored)
        docids += scored
    return columns_of(mapping, query_of_row, docids, values, form)


def _read(path: str | Path, form: Format) -> tuple[Columns, Callable[[], None]]:
    raw = load(path)
    if raw[:1].to_pybytes() == b"{":
        return _from_json(path, raw, form), lambda: None
    columns = parse(path, raw, form)
    return columns, lambda: _refuse_duplicates(path, raw, columns)


def _refuse_duplicates(path: str | Path, raw: Any, columns: Columns) -> None:
    twice = _first_duplicate(columns)
    if twice is not None:
        first, second = line_of_row(raw, twice[0]), line_of_row(raw, twice[1])
        qid, docid = columns.qids[columns.query_of_row[twice[0]]].as_py(), columns.docids[twice[0]].as_py()
        remedy = f"is on line {first} already: keep one of the two lines"
        raise ValueError(f"{path}:{second}: passage {docid!r} of query {qid!r} {remedy}")


def _from_json(path: str | Path, raw: Any, form: Format) -> Columns:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        known: dict[str, Any] = {}
        for key, value in pairs:
            if key in known:
                raise ValueError(f"{path}: the key {key!r} occurs twice in one object: keep one of the two")
            known[key] = value
        return known

    try:
        mapping = json.loads(raw.to_pybytes(), object_pairs_hook=unique)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}:{error.lineno}: not valid JSON ({error.msg}, column {error.colno})") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 at byte {error.start} ({error.reason})") from error
    columns = from_mapping(mapping, form, str(path))
    if not len(columns.docids):
        raise ValueError(f"{path} is empty: it names no passage")
    return columns


def _first_duplicate(columns: Columns) -> tuple[int, int] | None:
    """The first two rows of the same query and passage; None if all rows differ."""
    ordered = _row_hashes(columns)
    ordered.sort()
    repeated = np.unique(ordered[1:][ordered[1:] == ordered[:-1]])
    if not len(repeated):
        return None
    seen: dict[tuple[int, str], int] = {}
    for row in np.flatnonzero(np.isin(_row_hashes(columns), repeated)).tolist():  # equal hashes need not be equal rows
        first = seen.setdefault((int(columns.query_of_row[row]), columns.docids[row].as_py()), row)
        if first != row:
            return first, row
    return None


def _row_hashes(columns: Columns) -> npt.NDArray[np.uint64]:
    hashes = columns.query_of_row.astype(np.uint64)
    hashes *= np.uint64(0x9E37_79B9_7F4A_7C15)
    hashes ^= columns.docid_hashes
    return hashes


def write_run(path: str | Path, results: Results, tag: str) -> int:
    """Writes the six TREC columns atomically and returns the number of lines.

    The order of the list is the ranking. Scores that tie or rise, or differ by less than float32 can tell (trec_eval
    would then order by docid), are lowered by the smallest step: written scores strictly decrease, even as float32.

    Raises:
        ValueError: an id is empty or contains white space, a query or passage occurs twice, or a score is not finite.
    """
    _checked_id("tag", tag)
    lines, seen = 0, set()
    with atomic_write(path) as file:
        for qid, hits in results:
            if _checked_id("qid", qid) in seen:
                raise ValueError(f"{path}: query {qid!r} occurs twice in the results: search each query once")
            seen.add(qid)
            if len({_checked_id("docid", docid) for docid, _ in hits}) != len(hits):
                raise ValueError(f"{path}: query {qid!r} has the same passage twice in its results")
            for _, score in hits:
                checked_value(f"{path}: query {qid!r}", score, RUN)
            scores = decreasing([score for _, score in hits])
            ranked = enumerate(zip(hits, scores.tolist(), strict=True), start=1)
            file.writelines(f"{qid} Q0 {docid} {rank} {score:.9g} {tag}\n" for rank, ((docid, _), score) in ranked)
            lines += len(hits)
    return lines


def _checked_id(kind: str, text: str) -> str:
    if text.split() != [text]:
        raise ValueError(f"a {kind} in a run must be one word without white space, got {text!r}")
    return text


def decreasing(scores: Sequence[float]) -> npt.NDArray[np.float32]:
    """The largest float32 scores that strictly decrease and are nowhere above ``scores``.

    ``[2, 2, 1]`` -> ``[2, 1.9999999, 1]``.

    The bits of a float32, read as an integer with the sign mirrored, count the numbers in order; so the k-th result is
    the least of (j-th number's count + j) for j <= k, minus k.
    """
    bits = np.asarray(scores, np.float32).view(np.int32).astype(np.int64)
    count = np.where(bits >= 0, bits, -(1 << 31) - bits)
    steps = np.arange(len(bits))
    count = np.minimum.accumulate(count + steps) - steps
    return np.where(count >= 0, count, -(1 << 31) - count).astype(np.int32).view(np.float32)
