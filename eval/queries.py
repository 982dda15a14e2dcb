"""Which text of a rewrites or conversations file is searched for."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from convsearch.files import read_jsonl

Record = dict[str, Any]


def _rewrite(record: Record) -> Any:
    return record.get("rewrite")


def _question(record: Record) -> Any:
    return record.get("question")


def _previous(record: Record) -> Any:
    context = record.get("context", [])
    return " ".join([*context[-2:], record["question"]])


def _all_history(record: Record) -> Any:
    return " ".join([*record.get("context", []), record["question"]])


QUERY_TYPES: dict[str, Callable[[Record], Any]] = {
    "rewrite": _rewrite,
    "question": _question,
    "previous": _previous,
    "all_history": _all_history,
}


def read_queries(path: str | Path, query_type: str) -> tuple[dict[str, str], int]:
    """Query id -> text to search for, and how many lines carry a rewrite that fell back to the raw question.

    Raises:
        ValueError: a line has no qid or not the text, or a qid stands twice; names file and line.
    """
    queries: dict[str, str] = {}
    fallbacks = 0
    for number, record in read_jsonl(path):
        qid = record.get("qid")
        if not isinstance(qid, str) or not qid:
            raise ValueError(f"{path}:{number}: field 'qid' must be a non-empty string, got {qid!r}")
        if qid in queries:
            raise ValueError(f"{path}:{number}: query {qid!r} stands twice")
        if query_type != "rewrite" and not isinstance(record.get("question"), str):
            raise ValueError(f"{path}:{number}: query {qid!r} has no field 'question'")
        text = QUERY_TYPES[query_type](record)
        if not isinstance(text, str):
            raise ValueError(
                f"{path}:{number}: query {qid!r} has no field 'rewrite'; write one with convsearch.infer, or choose another --query_type"
            )
        queries[qid] = text
        fallbacks += query_type == "rewrite" and record.get("fallback") is True
    if not queries:
        raise ValueError(f"{path}: no queries")
    return queries, fallbacks
