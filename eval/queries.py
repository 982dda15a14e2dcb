"""The queries of a rewrites or conversations file, and the type of the functions that search for them."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from convsearch.checksums import check_lines
from convsearch.files import read_jsonl

Record = dict[str, Any]
Hits = list[tuple[str, float]]  # (docid, score) of one query, best first
FUSIONS = ("none", "rrf")
Search = Callable[[Sequence[str], int], list[Hits]]  # (queries, k) -> the best k passages of each

QUERY_TYPES: dict[str, Callable[[Record], Any]] = {
    "rewrite": lambda record: record.get("rewrite"),
    "question": lambda record: record.get("question"),
    "previous": lambda record: " ".join([*record.get("context", [])[-2:], record["question"]]),
    "previous_question": lambda record: " ".join([*record.get("context", [])[-2:-1], record["question"]]),
    "previous_answer": lambda record: " ".join([*record.get("context", [])[-1:], record["question"]]),
    "all_history": lambda record: " ".join([*record.get("context", []), record["question"]]),
}


def read_queries(path: str | Path, query_type: str, fused: bool = False) -> tuple[dict[str, list[str]], int]:
    """Query id -> texts to search for, and how many rewrites fell back to the raw question.

    A query has one text; ``fused``: those of the field ``rewrites``.

    Raises:
        ValueError: a line has no qid or no texts, or a qid occurs twice; names file and line. Or the file is not as
            convsearch.infer wrote it.
    """
    check_lines(Path(path))
    queries: dict[str, list[str]] = {}
    fallbacks = 0
    for number, record in read_jsonl(path):
        where, qid = f"{path}:{number}", record.get("qid")
        if not isinstance(qid, str) or not qid:
            raise ValueError(f"{where}: field 'qid' must be a non-empty string, got {qid!r}")
        if qid in queries:
            raise ValueError(f"{where}: query {qid!r} occurs twice")
        if query_type != "rewrite" and not isinstance(record.get("question"), str):
            raise ValueError(f"{where}: query {qid!r} has no field 'question'")
        texts = record.get("rewrites") if fused else [QUERY_TYPES[query_type](record)]
        if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
            field, remedy = "rewrite", "run convsearch.infer, or choose another --query_type"
            if fused:
                field, remedy = "rewrites", "run convsearch.infer with --n 2 or more, or leave --fuse out"
            raise ValueError(f"{where}: query {qid!r} has no field {field!r}: {remedy}")
        queries[qid] = texts
        fallbacks += query_type == "rewrite" and record.get("fallback") is True
    if not queries:
        raise ValueError(f"{path}: no queries")
    return queries, fallbacks
