"""What every data set is turned into, written in one pass, whole or not at all, and not again where nothing has changed.

A split is three files: ``<split>.json`` (conversations, one turn a line), ``<split>.trec`` (qrels: ``qid 0 docid 1``) and
``<split>.parquet`` (the rows of GRPO). A collection is ``collection.jsonl``: {"id", "contents"}. ``manifest.json`` notes from which inputs
and options each file was made.
"""

import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from convsearch.files import atomic_write
from convsearch.prompts import PromptStyle, render
from convsearch.types import Conversation
from data_preprocess.sources import BadRecords, RecordError, Source

if TYPE_CHECKING:
    import pyarrow as pa

ROW_GROUP_ROWS = 1000
FORMAT = 1  # raise it when the same input gives other output: older files are then made anew
UNANSWERABLE = "UNANSWERABLE"


@dataclass(frozen=True, slots=True)
class Row:
    """One line of a conversations file on its way to a split; ``where`` names its origin."""

    split: str
    record: dict[str, Any]
    where: str


@dataclass(frozen=True, slots=True)
class PromptOptions:
    """How the prompt column is rendered; ``max_history_turns`` None keeps the whole history."""

    style: PromptStyle = "paper"
    max_history_turns: int | None = None

    def as_dict(self) -> dict[str, Any]:
        return {"prompt_style": self.style, "max_history_turns": self.max_history_turns}


def parquet_schema(with_positives: bool = False) -> "pa.Schema":
    """The columns that GRPO training reads, those of the reference plus ``context``, and ``positives`` (texts) where similarities are paid for."""
    import pyarrow as pa

    text = pa.string()
    return pa.schema(
        [
            ("data_source", text),
            ("prompt", pa.list_(pa.struct([("role", text), ("content", text)]))),
            ("ability", text),
            ("reward_model", pa.struct([("style", text), ("ground_truth", pa.list_(text))])),
            (
                "extra_info",
                pa.struct(
                    [
                        ("split", text),
                        ("index", pa.int64()),
                        ("answer", text),
                        ("question", text),
                        ("query_id", text),
                        ("context", pa.list_(text)),
                        *([("positives", pa.list_(text))] if with_positives else []),
                    ]
                ),
            ),
        ]
    )


def grpo_row(record: dict[str, Any], data_source: str, split: str, index: int, prompt: PromptOptions) -> dict[str, Any]:
    """One row of the parquet. The human rewrite, where there is one, has no place in it."""
    messages = render(Conversation.from_record(record), prompt.style, prompt.max_history_turns)
    return {
        "data_source": data_source,
        "prompt": list(messages),
        "ability": "rewrite",
        "reward_model": {"style": "rule", "ground_truth": record["gold_docids"]},
        "extra_info": {
            "split": split,
            "index": index,
            "answer": record["answer"],
            "question": record["question"],
            "query_id": record["qid"],
            "context": record["context"],
            **({"positives": record["positives"]} if "positives" in record else {}),
        },
    }


class _ParquetRows:
    """Rows into row groups of a parquet file, so that memory holds one group."""

    def __init__(self, file: IO[bytes], with_positives: bool) -> None:
        import pyarrow.parquet as pq

        self._schema = parquet_schema(with_positives)
        self._writer = pq.ParquetWriter(file, self._schema)
        self._rows: list[dict[str, Any]] = []

    def add(self, row: dict[str, Any]) -> None:
        self._rows.append(row)
        if len(self._rows) == ROW_GROUP_ROWS:
            self._flush()

    def _flush(self) -> None:
        import pyarrow as pa

        self._writer.write_table(pa.Table.from_pylist(self._rows, schema=self._schema))
        self._rows = []

    def close(self) -> None:
        """Writes what is left, and the footer."""
        if self._rows:
            self._flush()
        self.release()

    def release(self) -> None:
        """Lets go of the file; nothing to do after ``close``."""
        self._writer.close()


@dataclass
class SplitFiles:
    """The open files of one split and the counts of what went into them."""

    name: str
    conversations: IO[str]
    qrels: IO[str]
    parquet: _ParquetRows | None
    seen_qids: set[str] = field(default_factory=set)
    conv_ids: set[str] = field(default_factory=set)
    golds: int = 0

    def add(self, row: Row, data_source: str, prompt: PromptOptions) -> None:
        """Writes a turn to all files of the split.

        Raises:
            RecordError: the query id is no TREC id, or came before; a field has the wrong form.
        """
        record = row.record
        if any(character.isspace() for docid in (record["qid"], *record["gold_docids"]) for character in docid):
            raise RecordError(
                f"{row.where}: field 'qid' or 'gold_docids' holds white space, which a TREC file cannot: {record['qid']!r}"
            )
        if record["qid"] in self.seen_qids:
            raise RecordError(f"{row.where}: field 'qid' repeats {record['qid']!r}")
        try:
            Conversation.from_record(record)
        except ValueError as error:
            raise RecordError(f"{row.where}: {error}") from error
        if self.parquet is not None:
            self.parquet.add(grpo_row(record, data_source, self.name, len(self.seen_qids), prompt))
        kept = {key: value for key, value in record.items() if not (key == "rewrite" and self.name == "train")}
        self.conversations.write(json.dumps(kept, ensure_ascii=False) + "\n")
        for docid in record["gold_docids"]:
            self.qrels.write(f"{record['qid']} 0 {docid} 1\n")
        self.golds += len(record["gold_docids"])
        self.seen_qids.add(record["qid"])
        self.conv_ids.add(str(record["conv_id"]))

    def counts(self) -> dict[str, int]:
        return {"queries": len(self.seen_qids), "conversations": len(self.conv_ids), "qrels": self.golds}


@contextmanager
def _open_split(folder: Path, name: str, with_parquet: bool, with_positives: bool) -> Iterator[SplitFiles]:
    with ExitStack() as stack:
        conversations = stack.enter_context(atomic_write(folder / f"{name}.json"))
        qrels = stack.enter_context(atomic_write(folder / f"{name}.trec"))
        parquet = None
        if with_parquet:
            parquet = _ParquetRows(stack.enter_context(atomic_write(folder / f"{name}.parquet", "wb")), with_positives)
            stack.callback(parquet.release)
        yield SplitFiles(name, conversations, qrels, parquet)
        if parquet is not None:
            parquet.close()


def split_files(split: str, with_parquet: bool = True) -> list[str]:
    return [f"{split}.json", f"{split}.trec"] + ([f"{split}.parquet"] if with_parquet else [])


def write_splits(
    folder: Path,
    splits: Sequence[str],
    rows: Iterable[Row],
    *,
    data_source: str,
    prompt: PromptOptions,
    bad: BadRecords,
    without_parquet: Sequence[str] = (),
    with_positives: bool = False,
) -> dict[str, Any]:
    """Sends each row to its split's files; returns {split: {"queries", "conversations", "qrels"}}.

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
                raise ValueError(
                    f"no turn with a gold passage for split '{name}' of {data_source}: is this the right input?"
                )
        return {name: files.counts() for name, files in opened.items()}


def read_golds(folder: Path, splits: Iterable[str]) -> set[str]:
    """The gold passage ids of the given splits' qrels."""
    golds: set[str] = set()
    for split in splits:
        with open(folder / f"{split}.trec", encoding="utf-8") as file:
            golds.update(line.split()[2] for line in file)
    return golds


def write_collection(
    path: Path, passages: Iterable[tuple[str, str]], golds: set[str], bad: BadRecords
) -> dict[str, Any]:
    """Writes (id, contents) pairs; returns the counts of passages and blank passages. Memory holds no passage but the current one.

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
        for docid in sorted(missing):
            bad.add(
                RecordError(
                    f"{path.name}: gold passage {docid!r} is not in the collection ({len(missing):,} of {len(golds):,} golds are not)"
                )
            )
    return {"passages": count, "blank": blank, "missing_golds": len(missing)}


class OutputFolder:
    """A data set's output folder. Each step makes some of its files, and is passed over when the same inputs and options made them."""

    def __init__(self, path: Path, skip_bad: int = 0) -> None:
        self.path = path
        self.skip_bad = skip_bad
        self._manifest_path = path / "manifest.json"

    def _steps(self) -> dict[str, Any]:
        if not self._manifest_path.exists():
            return {}
        try:
            manifest = json.loads(self._manifest_path.read_text(encoding="utf-8"))
        except ValueError:
            print(f"{self._manifest_path} is damaged: everything is made anew", file=sys.stderr)
            return {}
        steps = manifest.get("steps", {})
        return steps if isinstance(steps, dict) and manifest.get("format") == FORMAT else {}

    def _save(self, steps: dict[str, Any]) -> None:
        with atomic_write(self._manifest_path) as file:
            json.dump({"format": FORMAT, "steps": steps}, file, indent=1, ensure_ascii=False)
            file.write("\n")

    def _is_whole(self, entry: dict[str, Any]) -> bool:
        return all(
            (self.path / name).is_file() and (self.path / name).stat().st_size == size
            for name, size in entry["files"].items()
        )

    def _sweep(self, files: Sequence[str]) -> None:
        """Removes the temporary files of runs that were killed: those whose process is no more."""
        for name in files:
            for leftover in self.path.glob(f"{name}.tmp-*"):
                pid = leftover.name.rpartition("-")[2]
                if pid.isdecimal() and not Path(f"/proc/{pid}").exists():
                    leftover.unlink(missing_ok=True)

    def _forget(self, steps: dict[str, Any], name: str, files: Sequence[str]) -> None:
        """Takes from the manifest this step and whatever else made a file of the same name; removes files that will not be made again."""
        outdated = [step for step, entry in steps.items() if step == name or set(files) & set(entry["files"])]
        for step in outdated:
            for file in set(steps.pop(step)["files"]) - set(files):
                (self.path / file).unlink(missing_ok=True)
        if outdated:
            self._save(steps)

    def step(
        self,
        name: str,
        files: Sequence[str],
        inputs: Iterable[Source],
        options: dict[str, Any],
        make: Callable[[BadRecords], dict[str, Any]],
    ) -> dict[str, Any]:
        """Runs ``make`` or reuses its files, says which, and returns its counts.

        ``make`` gets the budget of malformed records. The manifest's entry goes before the files are touched and comes back when all are
        whole, so that a broken run is never taken for a finished one.
        """
        key = json.loads(json.dumps({"inputs": [source.stamp() for source in inputs], "options": options}))
        steps = self._steps()
        entry: dict[str, Any] = steps.get(name, {"key": None, "files": {}, "counts": {}, "skipped": []})
        same = entry["key"] == key and set(entry["files"]) == set(files)
        if same and self._is_whole(entry) and len(entry["skipped"]) <= self.skip_bad:
            verb = "reused"
        else:
            self._forget(steps, name, files)
            self._sweep(files)
            bad = BadRecords(self.skip_bad)
            counts = make(bad)
            sizes = {file: (self.path / file).stat().st_size for file in files}
            entry = steps[name] = {"key": key, "files": sizes, "counts": counts, "skipped": bad.messages}
            self._save(steps)
            verb = "wrote"
        print(f"{verb} {', '.join(files)} in {self.path}: {_shown(entry['counts'])}", flush=True)
        for message in entry["skipped"]:
            print(f"skipped a malformed record: {message}", file=sys.stderr)
        result: dict[str, Any] = entry["counts"]
        return result


def _shown(counts: dict[str, Any]) -> str:
    return "; ".join(
        f"{name}: {', '.join(f'{number:,} {what}' for what, number in value.items())}"
        if isinstance(value, dict)
        else f"{value:,} {name}"
        for name, value in counts.items()
    ).replace("_", " ")
