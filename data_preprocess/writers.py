"""Writes what every data set becomes: in one pass, atomically, and not again if nothing has changed.

A split is three files: ``<split>.json`` (conversations, one turn per line), ``<split>.trec`` (qrels: ``qid 0 docid 1``)
and ``<split>.parquet`` (the rows of GRPO). A collection is ``collection.jsonl``: {"id", "contents"}. ``manifest.json``
records the inputs, options and checksum of each file.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from convsearch import checksums
from convsearch.files import atomic_write, sole_writer
from convsearch.prompts import render
from convsearch.types import Conversation
from data_preprocess.options import DEFAULT_PROMPT, PromptOptions
from data_preprocess.sources import BadRecords, RecordError, Source

ROW_GROUP_ROWS = 1000
FORMAT = 2  # raise it if the same input gives other output: older files are then made again
UNANSWERABLE = "UNANSWERABLE"
COLLECTION = "collection.jsonl"
Counts = dict[str, Any]
Passages = Iterable[tuple[str, str]]  # (id, contents)
Make = Callable[[BadRecords], Counts]  # makes the files of a step; gets the budget of malformed records


@dataclass(frozen=True, slots=True)
class Row:
    """One line of a conversations file on its way to a split; ``where`` names its origin."""

    split: str
    record: dict[str, Any]
    where: str


Rows = Callable[[BadRecords], Iterable[Row]]


def parquet_schema(with_positives: bool = False) -> Any:
    """The columns that GRPO training reads: the reference's, ``context``, and ``positives`` for similarity rewards."""
    text, texts = pa.string(), pa.list_(pa.string())
    extra = [("split", text), ("index", pa.int64()), ("answer", text), ("question", text), ("query_id", text)]
    extra += [("context", texts)] + ([("positives", texts)] if with_positives else [])
    return pa.schema(
        [
            ("data_source", text),
            ("prompt", pa.list_(pa.struct([("role", text), ("content", text)]))),
            ("ability", text),
            ("reward_model", pa.struct([("style", text), ("ground_truth", texts)])),
            ("extra_info", pa.struct(extra)),
        ]
    )


def grpo_row(record: dict[str, Any], data_source: str, split: str, index: int, prompt: PromptOptions) -> dict[str, Any]:
    """One row of the parquet, without the human rewrite."""
    messages = render(Conversation.from_record(record), prompt.style, prompt.max_history_turns)
    extra = {"split": split, "index": index, "query_id": record["qid"]}
    copied = ("answer", "question", "context", "positives")
    return {
        "data_source": data_source,
        "prompt": list(messages),
        "ability": "rewrite",
        "reward_model": {"style": "rule", "ground_truth": record["gold_docids"]},
        "extra_info": extra | {name: record[name] for name in copied if name in record},
    }


@dataclass
class SplitFiles:
    """The open files of one split and the counts of what went into them; memory holds one row group of the parquet."""

    name: str
    conversations: IO[str]
    qrels: IO[str]
    parquet: Any  # pq.ParquetWriter, or None
    rows: list[dict[str, Any]] = field(default_factory=list)
    seen_qids: set[str] = field(default_factory=set)
    conv_ids: set[str] = field(default_factory=set)
    golds: int = 0

    def add(self, row: Row, data_source: str, prompt: PromptOptions) -> None:
        """Writes a turn to all files of the split.

        Raises:
            RecordError: the query id is no TREC id, or came before; a field has the wrong form.
        """
        record, qid = row.record, row.record["qid"]
        if any(character.isspace() for docid in (qid, *record["gold_docids"]) for character in docid):
            problem = "has white space, which a TREC file cannot hold"
            raise RecordError(f"{row.where}: field 'qid' or 'gold_docids' {problem}: {qid!r}")
        if qid in self.seen_qids:
            raise RecordError(f"{row.where}: field 'qid' repeats {qid!r}")
        try:
            Conversation.from_record(record)
        except ValueError as error:
            raise RecordError(f"{row.where}: {error}") from error
        if self.parquet is not None:
            self.rows.append(grpo_row(record, data_source, self.name, len(self.seen_qids), prompt))
            if len(self.rows) == ROW_GROUP_ROWS:
                self.flush()
        kept = {key: value for key, value in record.items() if not (key == "rewrite" and self.name == "train")}
        self.conversations.write(json.dumps(kept, ensure_ascii=False) + "\n")
        self.qrels.writelines(f"{qid} 0 {docid} 1\n" for docid in record["gold_docids"])
        self.golds += len(record["gold_docids"])
        self.seen_qids.add(qid)
        self.conv_ids.add(str(record["conv_id"]))

    def flush(self) -> None:
        """Writes the rows so far as a row group."""
        if self.rows:
            self.parquet.write_table(pa.Table.from_pylist(self.rows, schema=self.parquet.schema))
            self.rows = []

    def counts(self) -> dict[str, int]:
        return {"queries": len(self.seen_qids), "conversations": len(self.conv_ids), "qrels": self.golds}


@contextmanager
def _open_split(folder: Path, name: str, with_parquet: bool, with_positives: bool) -> Iterator[SplitFiles]:
    with ExitStack() as stack:
        conversations = stack.enter_context(atomic_write(folder / f"{name}.json"))
        qrels = stack.enter_context(atomic_write(folder / f"{name}.trec"))
        parquet = None
        if with_parquet:
            file = stack.enter_context(atomic_write(folder / f"{name}.parquet", "wb"))
            schema = parquet_schema(with_positives)
            parquet = stack.enter_context(pq.ParquetWriter(file, schema, write_page_checksum=True))
        files = SplitFiles(name, conversations, qrels, parquet)
        yield files
        files.flush()


def split_files(*splits: str, with_parquet: bool = True) -> list[str]:
    endings = ("json", "trec", "parquet") if with_parquet else ("json", "trec")
    return [f"{split}.{ending}" for split in splits for ending in endings]


def write_splits(
    folder: Path,
    splits: Sequence[str],
    rows: Iterable[Row],
    data_source: str,
    prompt: PromptOptions,
    bad: BadRecords,
    *,
    passages: Passages | None = None,
    without_parquet: Sequence[str] = (),
    with_positives: bool = False,
) -> Counts:
    """Writes each row to its split's files, then ``passages`` as the collection.

    Returns:
        {split: {"queries", "conversations", "qrels"}}, and the counts of ``write_collection`` under "collection".

    Raises:
        ValueError: more malformed rows than ``bad`` tolerates, or a split that stays empty.
    """
    with ExitStack() as stack:
        opened = {
            name: stack.enter_context(_open_split(folder, name, name not in without_parquet, with_positives))
            for name in splits
        }
        for row in rows:
            with bad.tolerate():
                opened[row.split].add(row, data_source, prompt)
        for name, files in opened.items():
            if not files.seen_qids:
                problem = f"no turn with a gold passage for split '{name}' of {data_source}"
                raise ValueError(f"{problem}: is this the right input?")
        counts: Counts = {name: files.counts() for name, files in opened.items()}
    if passages is not None:
        counts["collection"] = write_collection(folder / COLLECTION, passages, read_golds(folder, splits), bad)
    return counts


def read_golds(folder: Path, splits: Iterable[str]) -> set[str]:
    """The gold passage ids of the qrels ``<split>.trec``."""
    golds: set[str] = set()
    for split in splits:
        with open(folder / f"{split}.trec", encoding="utf-8") as file:
            golds.update(line.split()[2] for line in file)
    return golds


def write_collection(path: Path, passages: Passages, golds: set[str], bad: BadRecords) -> Counts:
    """Writes the passages; returns the counts of passages and blank passages. Memory holds one passage.

    Raises:
        ValueError: gold passages are missing from the collection (each counts as a malformed record), or it is empty.
    """
    missing = set(golds)
    count = blank = 0
    with atomic_write(path) as file:
        for docid, contents in passages:
            file.write(json.dumps({"id": docid, "contents": contents}, ensure_ascii=False) + "\n")
            missing.discard(docid)
            count += 1
            blank += not contents.strip()
        if count == 0:
            raise ValueError(f"the collection for {path} has no passage: is this the right input?")
        share = f"{len(missing):,} of {len(golds):,} golds are not"
        for docid in sorted(missing):
            bad.add(RecordError(f"{path.name}: gold passage {docid!r} is not in the collection ({share})"))
    return {"passages": count, "blank": blank, "missing_golds": len(missing)}


class OutputFolder:
    """A data set's output folder. A step makes some of its files, unless they were made from the same inputs."""

    def __init__(self, path: Path, skip_bad: int = 0, prompt: PromptOptions = DEFAULT_PROMPT) -> None:
        self.path, self.skip_bad, self.prompt = path, skip_bad, prompt
        self._manifest_path = path / "manifest.json"

    @classmethod
    def of(cls, arguments: argparse.Namespace) -> "OutputFolder":
        """The folder that the flags of ``options.conversations_parser`` describe."""
        prompt = PromptOptions(arguments.prompt_style, arguments.max_history_turns)
        return cls(arguments.output, arguments.skip_bad, prompt)

    def _steps(self) -> dict[str, Any]:
        try:
            manifest = json.loads(self._manifest_path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        except ValueError:
            print(f"{self._manifest_path} is damaged: everything is made again", file=sys.stderr)
            return {}
        steps = manifest.get("steps", {})
        return steps if isinstance(steps, dict) and manifest.get("format") == FORMAT else {}

    def _save(self, steps: dict[str, Any]) -> None:
        with atomic_write(self._manifest_path) as file:
            json.dump({"format": FORMAT, "steps": steps}, file, indent=1, ensure_ascii=False)
            file.write("\n")

    def _is_whole(self, entry: dict[str, Any]) -> bool:
        paths = {self.path / name: written for name, written in entry["files"].items()}
        return all(path.is_file() and checksums.xxh3(path) == written for path, written in paths.items())

    def _sweep(self, files: Sequence[str]) -> None:
        """Removes the temporary files of killed runs: those whose process no longer exists."""
        for name in files:
            for leftover in self.path.glob(f"{name}.tmp-*"):
                pid = leftover.name.rpartition("-")[2]
                if pid.isdecimal() and not Path(f"/proc/{pid}").exists():
                    leftover.unlink(missing_ok=True)

    def _forget(self, steps: dict[str, Any], name: str, files: Sequence[str]) -> None:
        """Takes this step and all others that made one of ``files`` from the manifest; removes their other files."""
        outdated = [step for step, entry in steps.items() if step == name or set(files) & set(entry["files"])]
        for step in outdated:
            for file in set(steps.pop(step)["files"]) - set(files):
                (self.path / file).unlink(missing_ok=True)
        if outdated:
            self._save(steps)

    def step(
        self, name: str, files: Sequence[str], inputs: Iterable[Source], options: dict[str, Any], make: Make
    ) -> None:
        """Runs ``make`` or reuses its files, and prints which, with the counts.

        The manifest loses the step's entry before the files change, and
        gets it back when all are whole, so that a broken run never passes for a finished one.

        Raises:
            ValueError: another process writes in the folder.
        """
        with sole_writer(self.path, inside=True):
            self._step(name, files, inputs, options, make)

    def _step(
        self, name: str, files: Sequence[str], inputs: Iterable[Source], options: dict[str, Any], make: Make
    ) -> None:
        key = json.loads(json.dumps({"inputs": [source.stamp() for source in inputs], "options": options}))
        steps = self._steps()
        entry: dict[str, Any] = steps.get(name, {"key": None, "files": {}, "counts": {}, "skipped": []})
        same = entry["key"] == key and set(entry["files"]) == set(files)
        verb = "reused"
        if not (same and self._is_whole(entry) and len(entry["skipped"]) <= self.skip_bad):
            self._forget(steps, name, files)
            self._sweep(files)
            bad = BadRecords(self.skip_bad)
            counts = make(bad)
            written = {file: checksums.xxh3(self.path / file) for file in files}
            entry = steps[name] = {"key": key, "files": written, "counts": counts, "skipped": bad.messages}
            self._save(steps)
            verb = "wrote"
        print(f"{verb} {', '.join(files)} in {self.path}: {_shown(entry['counts'])}", flush=True)
        for message in entry["skipped"]:
            print(f"skipped a malformed record: {message}", file=sys.stderr)

    def splits_step(
        self, name: str, splits: list[str], inputs: list[Source], options: dict[str, Any], rows: Rows, data_source: str
    ) -> None:
        """A step that writes the splits' files."""

        def make(bad: BadRecords) -> Counts:
            return write_splits(self.path, splits, rows(bad), data_source, self.prompt, bad)

        self.step(name, split_files(*splits), inputs, self.prompt.as_dict() | options, make)

    def collection_step(
        self,
        inputs: list[Source],
        options: dict[str, Any],
        passages: Callable[[BadRecords], Passages],
        splits: list[str],
    ) -> None:
        """The step "collection": ``passages``, which must contain the gold passages of the splits' qrels."""

        def make(bad: BadRecords) -> Counts:
            return write_collection(self.path / COLLECTION, passages(bad), read_golds(self.path, splits), bad)

        self.step("collection", [COLLECTION], inputs, options, make)


def _shown(counts: Counts) -> str:
    parts = []
    for name, value in counts.items():
        if isinstance(value, dict):
            parts.append(f"{name}: {', '.join(f'{number:,} {what}' for what, number in value.items())}")
        else:
            parts.append(f"{value:,} {name}")
    return "; ".join(parts).replace("_", " ")
