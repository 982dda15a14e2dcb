"""The files of BRIGHT's tasks, and what they become."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from convsearch.files import atomic_write, write_jsonl
from data_preprocess.sources import BadRecords, Record, Source, read_parquet_records, read_records
from data_preprocess.writers import OutputFolder

NOTHING = "N/A"  # how the data set says that a list is empty
ENDINGS = ("-00000-of-00001.parquet", ".parquet", ".jsonl", ".jsonl.gz", ".json")


def find(folder: Path, kind: str, task: str) -> Source:
    """The file of a task in ``<folder>/<kind>``.

    Raises:
        ValueError: there is none; names the folder and the endings.
    """
    paths = (folder / kind / f"{task}{ending}" for ending in ENDINGS)
    path = next((path for path in paths if path.is_file()), None)
    if path is None:
        remedy = "fetch it with data_preprocess.download bright"
        raise ValueError(f"{folder / kind} has no {task} (as {', '.join(ENDINGS)}): {remedy}")
    return Source(path)


def records(source: Source, bad: BadRecords) -> Iterator[Record]:
    is_parquet = source.path.suffix == ".parquet"
    return read_parquet_records(source) if is_parquet else read_records(source, bad, source.path.name)


def ids(record: Record, name: str) -> list[str]:
    """The ids under ``name``, without the word for none and without repetitions."""
    return [docid for docid in dict.fromkeys(record.texts(name)) if docid != NOTHING]


def documents(source: Source, bad: BadRecords) -> Iterator[tuple[str, str]]:
    """(id, text); skips a repeated document, but another text under the same id is an error."""
    seen: dict[str, bytes] = {}
    for record in records(source, bad):
        with bad.tolerate():
            docid, text = record.text("id"), record.text("content", blank=True)
            digest = hashlib.sha256(text.encode()).digest()
            if docid in seen and seen[docid] != digest:
                raise record.error("id", f"had another text before: {docid!r}")
            if docid not in seen:
                seen[docid] = digest
                yield docid, text


def convert(folder_in: Path, folder_out: Path, task: str, long: bool, skip_bad: int) -> None:
    """Writes the four files of a task."""
    kind, golds_name = ("long_documents", "gold_ids_long") if long else ("documents", "gold_ids")
    passages, examples = find(folder_in, kind, task), find(folder_in, "examples", task)
    folder = OutputFolder(folder_out / (f"{task}_long" if long else task), skip_bad)

    def make_topics(bad: BadRecords) -> dict[str, Any]:
        topics, excluded, qrels = [], {}, []
        for record in records(examples, bad):
            with bad.tolerate():
                qid, query = record.docid("id"), record.text("query")
                hidden, relevant = ids(record, "excluded_ids"), ids(record, golds_name)
                if overlap := sorted(set(hidden) & set(relevant)):
                    raise record.error("excluded_ids", f"excludes a gold document: {overlap[0]!r}")
                topics.append({"id": qid, "query": query, "excluded_ids": hidden})
                excluded[qid] = hidden
                qrels += [f"{qid} 0 {docid} 1\n" for docid in relevant]
        write_jsonl(folder.path / "topics.jsonl", topics)
        with atomic_write(folder.path / "excluded.json") as file:
            json.dump(excluded, file, ensure_ascii=False)
        with atomic_write(folder.path / "qrels.trec") as file:
            file.writelines(qrels)
        return {"queries": len(topics), "qrels": len(qrels), "excluded": sum(map(len, excluded.values()))}

    folder.step("topics", ["topics.jsonl", "excluded.json", "qrels.trec"], [examples], {"long": long}, make_topics)
    folder.collection_step([passages, examples], {"long": long}, lambda bad: documents(passages, bad), ["qrels"])
