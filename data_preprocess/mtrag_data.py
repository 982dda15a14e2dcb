"""MTRAG (Katsis et al., TACL 2025): its files and its queries.

Two layouts of the input are known: three files (queries.jsonl, corpus.jsonl, qrels.trec, each gzipped or not), and
IBM's repository (data_preprocess/mtrag_ibm.py). MTRAG has no split of its own: ours is by conversation, by a seeded
hash. ``all.json`` and ``all.trec`` have every query, for baselines that need no training.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from data_preprocess import mtrag_ibm
from data_preprocess.mtrag_ibm import Task, without_marker
from data_preprocess.sources import BadRecords, RecordError, Source, read_records
from data_preprocess.splits import partition
from data_preprocess.writers import OutputFolder, Row, split_files, write_splits

ALL = "all"
FLAT = ("queries.jsonl", "corpus.jsonl", "qrels.trec")
_QID = re.compile(r"(?P<conversation>.+)<::>(?P<turn>\d+)")


class Layout(Protocol):
    """The files of an input folder, and what they contain."""

    def inputs(self) -> list[Source]: ...
    def tasks(self, bad: BadRecords) -> Iterator[Task]: ...
    def qrels(self, bad: BadRecords) -> dict[str, list[str]]: ...
    def passages(self, bad: BadRecords) -> Iterator[tuple[str, str]]: ...


def find_layout(folder: Path) -> Layout:
    """Recognises the layout of an input folder.

    Raises:
        ValueError: it has neither layout; says what is missing.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder")
    if (repository := mtrag_ibm.find_repository(folder)) is not None:
        return repository
    queries, corpus, qrels = (_file(folder, name) for name in FLAT)
    if queries is None or corpus is None or qrels is None:
        missing = ", ".join(name for name in FLAT if _file(folder, name) is None)
        problem = f"lacks {missing} (gzipped or not), and has no retrieval_tasks folder of IBM's repository either"
        raise ValueError(f"{folder}: {problem}: get it from {mtrag_ibm.REPOSITORY_URL}")
    return FlatFiles(queries, qrels, corpus)


def _file(folder: Path, name: str) -> Source | None:
    paths = folder / name, folder / f"{name}.gz"
    return next((Source(path) for path in paths if path.is_file()), None)


@dataclass(frozen=True, slots=True)
class FlatFiles:
    """queries.jsonl, qrels.trec, corpus.jsonl."""

    queries: Source
    judgements: Source
    corpus: Source

    def inputs(self) -> list[Source]:
        return [self.queries, self.judgements, self.corpus]

    def tasks(self, bad: BadRecords) -> Iterator[Task]:
        """The lines of queries.jsonl: _id ("<conversation><::><turn>"), domain, history, query, response, rewrite."""
        for line in read_records(self.queries, bad, "mtrag queries"):
            with bad.tolerate():
                qid = line.text("_id")
                if (match := _QID.fullmatch(qid)) is None:
                    raise line.error("_id", f"must look like <conversation><::><turn>, got {qid!r}")
                context = [without_marker(text) for text in line.texts("history")]
                if len(context) % 2:
                    raise line.error("history", f"must alternate question and answer, got {len(context)} strings")
                place = qid, match["conversation"], int(match["turn"]), line.text("domain")
                question, answer = without_marker(line.text("query")), line.text("response", blank=True)
                rewrite = without_marker(line.optional_text("rewrite") or "") or None
                yield Task(*place, context, question, answer, rewrite, line.where)

    def qrels(self, bad: BadRecords) -> dict[str, list[str]]:
        """TREC qrels as {query id: relevant passages}, in the order of the file."""
        golds: dict[str, list[str]] = {}
        with open(self.judgements.path, encoding="utf-8", errors="replace") as file:
            for number, line in enumerate(file, start=1):
                parts = line.split()
                if not parts:
                    continue
                if len(parts) != 4 or not parts[3].lstrip("-").isdecimal():
                    problem = f"expected 'qid 0 docid grade', got {line.strip()!r}"
                    bad.add(RecordError(f"{self.judgements}:{number}: {problem}"))
                elif int(parts[3]) > 0:
                    golds.setdefault(parts[0], []).append(parts[2])
        return golds

    def passages(self, bad: BadRecords) -> Iterator[tuple[str, str]]:
        return mtrag_ibm.corpus_passages([self.corpus], bad)


def rows(tasks: list[Task], golds: dict[str, list[str]], placed: dict[str, str]) -> Iterator[Row]:
    """Each query twice: in its split and in ``all``."""
    for task in tasks:
        names = ("qid", "conv_id", "turn_id", "question", "context", "answer")
        record: dict[str, Any] = {name: getattr(task, name) for name in names}
        record |= {"gold_docids": list(dict.fromkeys(golds[task.qid])), "domain": task.domain}
        record |= {"rewrite": task.rewrite} if task.rewrite is not None else {}
        yield Row(placed[task.conv_id], record, task.where)
        yield Row(ALL, record, task.where)


def convert(folder_in: Path, folder: OutputFolder, fractions: dict[str, float], seed: int) -> None:
    """Writes the splits whose fraction is above 0, ``all``, and the collection."""
    layout = find_layout(folder_in)
    splits = [split for split, fraction in fractions.items() if fraction > 0]

    def make_splits(bad: BadRecords) -> dict[str, Any]:
        golds = layout.qrels(bad)
        tasks = list(layout.tasks(bad))
        judged = [task for task in tasks if task.qid in golds]
        if unknown := sorted(set(golds) - {task.qid for task in tasks}):
            found = f"{len(unknown)} queries that are not among the queries, the first {unknown[0]!r}"
            bad.add(RecordError(f"{folder_in}: the qrels judge {found}"))
        placed = partition({task.conv_id for task in judged}, {split: fractions[split] for split in splits}, seed)
        turns = rows(judged, golds, placed)
        counts = write_splits(folder.path, [*splits, ALL], turns, "mtrag", folder.prompt, bad, without_parquet=[ALL])
        counts["queries_without_gold"] = len(tasks) - len(judged)
        counts["queries_whose_history_lacks_answers"] = sum("" in task.context for task in judged)
        return counts

    files = [*split_files(*splits), *split_files(ALL, with_parquet=False)]
    options = folder.prompt.as_dict() | {"fractions": fractions, "seed": seed}
    folder.step("splits", files, layout.inputs(), options, make_splits)
    folder.collection_step(layout.inputs(), {}, layout.passages, [ALL])
