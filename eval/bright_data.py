"""BRIGHT's files as people have them: documents, topics, excluded ids, reasoned queries.

Each may be parquet, JSON lines (gzipped or not) or one JSON value.
"""

import gzip
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from convsearch.files import read_jsonl
from convsearch.parquet import read_rows

NOT_EXCLUDED = "N/A"  # how the data set says that a query excludes nothing
Record = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Topic:
    """``Topic("0", "why are insects attracted to light?", ())``"""

    qid: str
    query: str
    excluded: tuple[str, ...]


def records(path: str | Path) -> Iterator[tuple[str, Record]]:
    """Yields (where, record) of a parquet file, JSON lines or a JSON list.

    Raises:
        ValueError: there is no such file, or it is of none of these forms; names file and line.
    """
    path = _existing(path)
    if path.suffix == ".parquet":
        yield from _parquet(path)
    elif _first_character(path) == "[":
        listed = _json(path)
        for number, record in enumerate(listed):
            if not isinstance(record, dict):
                raise ValueError(f"{path}: entry {number} must be an object, got {type(record).__name__}")
            yield f"{path}: entry {number}", record
    else:
        for number, record in read_jsonl(path):
            yield f"{path}:{number}", record


def _existing(path: str | Path) -> Path:
    if not Path(path).is_file():
        raise ValueError(f"there is no file {path}")
    return Path(path)


def _parquet(path: Path) -> Iterator[tuple[str, Record]]:
    for number, record in enumerate(read_rows(path, remedy="download it again")):
        yield f"{path}: row {number}", record


def _open(path: Path) -> Any:
    return gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else open(path, encoding="utf-8")


def _first_character(path: Path) -> str:
    try:
        with _open(path) as file:
            return next((line.lstrip()[0] for line in file if line.strip()), "")
    except (UnicodeDecodeError, EOFError, gzip.BadGzipFile) as error:
        raise ValueError(f"{path}: cannot be read as text ({error})") from error


def _json(path: Path) -> Any:
    try:
        with _open(path) as file:
            return json.load(file)
    except (ValueError, EOFError, gzip.BadGzipFile) as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from error


def _field(where: str, record: Record, *names: str) -> str:
    for name in names:
        value = record.get(name)
        if isinstance(value, str) or (isinstance(value, int) and not isinstance(value, bool)):
            return str(value)
    raise ValueError(f"{where}: none of the fields {', '.join(names)} is a text; it has {', '.join(record)}")


def read_documents(path: str | Path) -> dict[str, str]:
    """docid -> text, in the file's order; of TheoremQA's own file, its questions are the documents.

    Raises:
        ValueError: a record has no id or text, an id has two texts, or there is none.
    """
    documents: dict[str, str] = {}
    for where, record in records(path):
        if "Question" in record:
            docid, text = "TheoremQA_" + _field(where, record, "id"), _field(where, record, "Question")
        else:
            docid, text = _id(where, record, "docid"), _field(where, record, "contents", "content", "text")
        if documents.setdefault(docid, text) != text:
            raise ValueError(f"{where}: the id {docid!r} had another text before: keep one of the two")
    if not documents:
        raise ValueError(f"{path}: no documents")
    return documents


def _id(where: str, record: Record, name: str) -> str:
    return _field(where, record, "id", name, "_id")


def read_topics(path: str | Path) -> list[Topic]:
    """Queries with their excluded ids, if the file has them.

    Raises:
        ValueError: a record has no id or text, an id occurs twice, or there is none.
    """
    topics: dict[str, Topic] = {}
    for where, record in records(path):
        qid = _id(where, record, "qid")
        if qid in topics:
            raise ValueError(f"{where}: query {qid!r} occurs twice")
        query, excluded = _field(where, record, "query", "question", "text"), record.get("excluded_ids") or []
        topics[qid] = Topic(qid, query, _ids(where, excluded))
    if not topics:
        raise ValueError(f"{path}: no topics")
    return list(topics.values())


def _ids(where: str, value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(docid, str) for docid in value):
        raise ValueError(f"{where}: excluded_ids must be a list of document ids, got {str(value)[:60]}")
    return tuple(docid for docid in value if docid != NOT_EXCLUDED)


def read_excluded(path: str | Path) -> dict[str, tuple[str, ...]]:
    """Query id -> ids that it must not find, of one JSON object {qid: [ids]} or records {id, excluded_ids}."""
    if Path(path).suffix == ".json" and _first_character(Path(path)) == "{":
        return {qid: _ids(f"{path}: query {qid!r}", ids) for qid, ids in _json(Path(path)).items()}
    found = records(path)
    return {_id(where, record, "qid"): _ids(where, record.get("excluded_ids") or []) for where, record in found}


@dataclass(frozen=True, slots=True)
class Reasoned:
    """Reasoned queries by the original text (the released form), by query id (``convsearch.infer``), or both."""

    by_text: Mapping[str, str]
    by_qid: Mapping[str, str]

    def of(self, topic: Topic) -> str | None:
        """The reasoned query of a topic; None if there is none, or a blank one."""
        found = self.by_qid.get(topic.qid) or self.by_text.get(topic.query) or self.by_text.get(topic.query.strip())
        return found if found and found.strip() else None


def read_reasoned(path: str | Path) -> Reasoned:
    """One JSON object {query: reasoned query}, or the lines of ``convsearch.infer --task rqr``.

    Raises:
        ValueError: it is neither; names file and line.
    """
    path = _existing(path)
    if path.name.removesuffix(".gz").endswith(".json") and _first_character(path) == "{":
        found = _json(path)
        if not all(isinstance(text, str) for text in found.values()):
            form = "{query: reasoned query}; files of JSON lines end in .jsonl"
            raise ValueError(f"{path}: must be one object of texts, {form}")
        return Reasoned({query.strip(): text for query, text in found.items()} | found, {})
    by_qid = {}
    for where, record in records(path):
        if record.get("fallback") is not True:
            by_qid[_field(where, record, "qid", "id")] = _field(where, record, "rewrite", "output")
    return Reasoned({}, by_qid)
