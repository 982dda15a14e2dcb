"""BRIGHT (Su et al., ICLR 2025) -> collection, topics, qrels and excluded ids of each task.

    python -m data_preprocess.download bright --output data/raw/bright
    python -m data_preprocess.bright --input data/raw/bright --output data/bright [--long] [--task biology ...]

The input holds documents/, long_documents/ and examples/ as released (parquet, or JSON lines, gzipped or not). ``<task>/`` gets collection.jsonl
({"id", "contents"}),
topics.jsonl ({"id", "query", "excluded_ids"}), qrels.trec and excluded.json; with --long the same under ``<task>_long/`` from the unsplit documents.
"""

import argparse
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from convsearch import cli
from convsearch.files import atomic_write, write_jsonl
from data_preprocess.options import count
from data_preprocess.sources import BadRecords, Record, Source, read_records
from data_preprocess.tables import read_parquet_records
from data_preprocess.writers import OutputFolder, write_collection

TASKS = (
    "biology",
    "earth_science",
    "economics",
    "psychology",
    "robotics",
    "stackoverflow",
    "sustainable_living",
    "leetcode",
    "pony",
    "aops",
    "theoremqa_theorems",
    "theoremqa_questions",
)
NOTHING = "N/A"  # how the data set says that a list is empty
ENDINGS = ("-00000-of-00001.parquet", ".parquet", ".jsonl", ".jsonl.gz", ".json")


def find(folder: Path, kind: str, task: str) -> Source:
    """The file of a task in ``<folder>/<kind>``.

    Raises:
        ValueError: there is none; names where it was looked for.
    """
    for ending in ENDINGS:
        path = folder / kind / f"{task}{ending}"
        if path.is_file():
            return Source(path)
    raise ValueError(
        f"{folder / kind} has no {task} (as {', '.join(ENDINGS)}): fetch it with data_preprocess.download bright"
    )


def records(source: Source, bad: BadRecords) -> Iterator[Record]:
    return (
        read_parquet_records(source)
        if source.path.suffix == ".parquet"
        else read_records(source, bad, source.path.name)
    )


def ids(record: Record, name: str) -> list[str]:
    """The ids under ``name``, without the word for none and without repetitions."""
    return [docid for docid in dict.fromkeys(record.texts(name)) if docid != NOTHING]


def documents(source: Source, bad: BadRecords) -> Iterator[tuple[str, str]]:
    """(id, text); the same document twice is passed over, another text under one id is a fault."""
    seen: dict[str, bytes] = {}
    for record in records(source, bad):
        with bad.tolerate():
            docid, text = record.text("id"), record.text("content", blank=True)
            digest = hashlib.sha256(text.encode()).digest()
            if docid in seen and seen[docid] != digest:
                raise record.error("id", f"stands for another text before: {docid!r}")
            if docid not in seen:
                seen[docid] = digest
                yield docid, text


def convert(folder_in: Path, folder_out: Path, task: str, long: bool, skip_bad: int) -> None:
    """Writes the four files of a task."""
    kind, golds_name = ("long_documents", "gold_ids_long") if long else ("documents", "gold_ids")
    passages, examples = find(folder_in, kind, task), find(folder_in, "examples", task)
    folder = OutputFolder(folder_out / (f"{task}_long" if long else task), skip_bad)
    golds: set[str] = set()

    def make_topics(bad: BadRecords) -> dict[str, Any]:
        topics, excluded, qrels = [], {}, []
        for record in records(examples, bad):
            with bad.tolerate():
                qid, query, hidden, relevant = (
                    record.docid("id"),
                    record.text("query"),
                    ids(record, "excluded_ids"),
                    ids(record, golds_name),
                )
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

    def make_collection(bad: BadRecords) -> dict[str, Any]:
        golds.update(line.split()[2] for line in (folder.path / "qrels.trec").read_text(encoding="utf-8").splitlines())
        return write_collection(folder.path / "collection.jsonl", documents(passages, bad), golds, bad)

    folder.step("topics", ["topics.jsonl", "excluded.json", "qrels.trec"], [examples], {"long": long}, make_topics)
    folder.step("collection", ["collection.jsonl"], [passages, examples], {"long": long}, make_collection)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m data_preprocess.bright",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--input", type=Path, required=True, metavar="DIR", help="folder with documents/, long_documents/, examples/"
    )
    parser.add_argument(
        "--output",
        type=Path,
        required=True,
        metavar="DIR",
        help="folder to write to; what is up to date in it is reused",
    )
    parser.add_argument(
        "--task",
        nargs="+",
        choices=TASKS,
        default=list(TASKS),
        metavar="TASK",
        help="some of the 12 tasks (default: all)",
    )
    parser.add_argument("--long", action="store_true", help="the unsplit documents")
    parser.add_argument(
        "--skip-bad",
        type=count,
        default=0,
        metavar="N",
        help="leave out and list at most N malformed records (default: 0)",
    )
    return parser


def main() -> None:
    arguments = build_parser().parse_args()
    for task in arguments.task:
        convert(arguments.input, arguments.output, task, arguments.long, arguments.skip_bad)


if __name__ == "__main__":
    cli.run(main)
