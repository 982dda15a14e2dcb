"""MTRAG (Katsis et al., TACL 2025): its files and its queries.

Two layouts of the input are known: three files (queries.jsonl, corpus.jsonl, qrels.trec, each gzipped or not), and
IBM's repository (data_preprocess/mtrag_ibm.py). MTRAG has no split of its own: ours is by conversation, by a seeded
hash. ``all.json`` and ``all.trec`` have every query, for baselines that need no training.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_preprocess import mtrag_ibm
from data_preprocess.mtrag_ibm import Task, without_marker
from data_preprocess.options import PromptOptions
from data_preprocess.sources import BadRecords, RecordError, Source, read_records
from data_preprocess.splits import partition
from data_preprocess.writers import OutputFolder, Row, split_files, write_splits

ALL = "all"
_QID = re.compile(r"(?P<conversation>.+)<::>(?P<turn>\d+)")


@dataclass(frozen=True, slots=True)
class Layout:
    """The files of an input folder, and the functions that read them."""

    inputs: list[Source]
    read_tasks: Callable[[BadRecords], Iterator[Task]]
    read_qrels: Callable[[BadRecords], dict[str, list[str]]]
    read_passages: Callable[[BadRecords], Iterator[tuple[str, str]]]


def _file(folder: Path, name: str) -> Source | None:
    paths = folder / name, folder / f"{name}.gz"
    return next((Source(path) for path in paths if path.is_file()), None)


def find_layout(folder: Path) -> Layout:
    """Recognises the layout of an input folder.

    Raises:
        ValueError: it has neither layout; says what is missing.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder")
    repository = mtrag_ibm.find_repository(folder)
    if repository is not None:
        return Layout(repository.inputs(), repository.tasks, repository.qrels, repository.passages)
    queries, corpus, qrels = _file(folder, "queries.jsonl"), _file(folder, "corpus.jsonl"), _file(folder, "qrels.trec")
    if queries is None or corpus is None or qrels is None:
        found = {"queries.jsonl": queries, "corpus.jsonl": corpus, "qrels.trec": qrels}
        missing = ", ".join(name for name, source in found.items() if source is None)
        problem = f"lacks {missing} (gzipped or not), and has no retrieval_tasks folder of IBM's repository either"
        raise ValueError(f"{folder}: {problem}: get it from {mtrag_ibm.REPOSITORY_URL}")
    return Layout(
        [queries, qrels, corpus],
        lambda bad: flat_tasks(queries, bad),
        lambda bad: flat_qrels(qrels, bad),
        lambda bad: mtrag_ibm.corpus_passages([corpus], bad),
    )


def flat_tasks(queries: Source, bad: BadRecords) -> Iterator[Task]:
    """The lines of queries.jsonl: _id ("<conversation><::><turn>"), domain, history, query, response, rewrite."""
    for line in read_records(queries, bad, "mtrag queries"):
        with bad.tolerate():
            qid = line.text("_id")
            match = _QID.fullmatch(qid)
            if match is None:
                raise line.error("_id", f"must look like <conversation><::><turn>, got {qid!r}")
            context = [without_marker(text) for text in line.texts("history")]
            if len(context) % 2:
                raise line.error("history", f"must alternate question and answer, got {len(context)} strings")
            rewrite = without_marker(line.optional_text("rewrite") or "")
            yield Task(
                qid=qid,
                conv_id=match["conversation"],
                turn_id=int(match["turn"]),
                domain=line.text("domain"),
                context=context,
                question=without_marker(line.text("query")),
                answer=line.text("response", blank=True),
                rewrite=rewrite or None,
                where=line.where,
            )


def flat_qrels(qrels: Source, bad: BadRecords) -> dict[str, list[str]]:
    """TREC qrels as {query id: relevant passages}, in the order of the file."""
    golds: dict[str, list[str]] = {}
    with open(qrels.path, encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, start=1):
            parts = line.split()
            if not parts:
                continue
            if len(parts) != 4 or not parts[3].lstrip("-").isdecimal():
                bad.add(RecordError(f"{qrels}:{number}: expected 'qid 0 docid grade', got {line.strip()!r}"))
            elif int(parts[3]) > 0:
                golds.setdefault(parts[0], []).append(parts[2])
    return golds


def rows(tasks: list[Task], golds: dict[str, list[str]], placed: dict[str, str]) -> Iterator[Row]:
    """Each query twice: in its split and in ``all``."""
    for task in tasks:
        record: dict[str, Any] = {
            "qid": task.qid,
            "conv_id": task.conv_id,
            "turn_id": task.turn_id,
            "question": task.question,
            "context": task.context,
            "answer": task.answer,
            "gold_docids": list(dict.fromkeys(golds[task.qid])),
            "domain": task.domain,
        }
        if task.rewrite is not None:
            record["rewrite"] = task.rewrite
        yield Row(placed[task.conv_id], record, task.where)
        yield Row(ALL, record, task.where)


def convert(
    folder_in: Path, folder: OutputFolder, prompt: PromptOptions, fractions: dict[str, float], seed: int
) -> None:
    """Writes the splits whose fraction is above 0, ``all``, and the collection."""
    layout = find_layout(folder_in)
    splits = [split for split, fraction in fractions.items() if fraction > 0]

    def make_splits(bad: BadRecords) -> dict[str, Any]:
        golds = layout.read_qrels(bad)
        tasks = list(layout.read_tasks(bad))
        judged = [task for task in tasks if task.qid in golds]
        unknown = sorted(set(golds) - {task.qid for task in tasks})
        if unknown:
            found = f"{len(unknown)} queries that are not among the queries, the first {unknown[0]!r}"
            bad.add(RecordError(f"{folder_in}: the qrels judge {found}"))
        placed = partition({task.conv_id for task in judged}, {split: fractions[split] for split in splits}, seed)
        turns = rows(judged, golds, placed)
        counts = write_splits(folder.path, [*splits, ALL], turns, "mtrag", prompt, bad, without_parquet=[ALL])
        counts["queries_without_gold"] = len(tasks) - len(judged)
        counts["queries_whose_history_lacks_answers"] = sum("" in task.context for task in judged)
        return counts

    files = [*split_files(*splits), *split_files(ALL, with_parquet=False)]
    options = prompt.as_dict() | {"fractions": fractions, "seed": seed}
    folder.step("splits", files, layout.inputs, options, make_splits)
    folder.collection_step(layout.inputs, {}, layout.read_passages, [ALL])
