"""Reads a run's files as a page needs them: only some columns, one step's dump at a time, never all the text."""

import json
import os
import re
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from tokenizers import Tokenizer

from convsearch.parquet import open_parquet
from convsearch.parsing import thinking

Record = dict[str, Any]
SHOWN = ("qid", "text", "rewrite", "error", "rank", "reward", "advantage", "finish_reason")
RANKS = {"1": (1, 1), "2-10": (2, 10), "11-100": (11, 2**31 - 1)}  # and "none"
SCAN_ROWS = 250_000  # the most rollouts that one request scans; the page continues from there
LAST_STEPS = 5  # whose mean is the end of a curve


@dataclass(frozen=True, slots=True)
class Step:
    """A step's dump: its number (from 0) and how many rollouts it holds."""

    number: int
    rows: int


@dataclass(frozen=True, slots=True)
class Filter:
    """Which rollouts to show; None or empty means any. ``text``: words, or "a phrase in quotes", that all occur."""

    text: str = ""
    qid: str = ""
    error: str = ""  # "any", "none" or an error of the parser
    rank: str = ""  # a key of RANKS, or "none"
    reward_min: float | None = None
    reward_max: float | None = None
    step_min: int = 0
    step_max: int = 2**31 - 1

    def __post_init__(self) -> None:
        if self.rank not in ("", "none", *RANKS):
            raise ValueError(f"rank {self.rank!r} is not one of {', '.join(RANKS)}, none")

    def columns(self) -> list[str]:
        """The columns that the filter needs."""
        wanted = {"text": self.text, "qid": self.qid, "error": self.error, "rank": self.rank}
        bounded = self.reward_min is not None or self.reward_max is not None
        return [name for name, value in wanted.items() if value] + (["reward"] if bounded else [])

    def mask(self, table: pa.Table) -> Any:
        """[rows] of booleans, or None for every row."""
        parts = [pc.match_substring(table["text"], phrase, ignore_case=True) for phrase in phrases(self.text)]
        if self.qid:
            parts.append(pc.match_substring(table["qid"], self.qid, ignore_case=True))
        if self.error:
            broken = pc.is_valid(table["error"])
            named = {"any": broken, "none": pc.invert(broken)}
            parts.append(named[self.error] if self.error in named else pc.equal(table["error"], self.error))
        if self.rank == "none":
            parts.append(pc.is_null(table["rank"]))
        elif self.rank:
            low, high = RANKS[self.rank]
            parts.append(pc.and_(pc.greater_equal(table["rank"], low), pc.less_equal(table["rank"], high)))
        if self.reward_min is not None:
            parts.append(pc.greater_equal(table["reward"], self.reward_min))
        if self.reward_max is not None:
            parts.append(pc.less_equal(table["reward"], self.reward_max))
        return pc.fill_null(reduce(pc.and_, parts), False) if parts else None


def phrases(text: str) -> list[str]:
    """``phrases('tall "the tower')`` is ``["tall", "the tower"]``: a quote that is not closed extends to the end."""
    return [quoted or word for quoted, word in re.findall(r'"([^"]+)"?|([^\s"]+)', text)]


class Run:
    """A run folder. Thread-safe; it keeps only the sizes of the dumps."""

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise ValueError(f"there is no run folder {folder}")
        inner = folder / "grpo"
        self.folder = inner if inner.is_dir() else folder
        self.name = folder.resolve().name
        self._rows: dict[Path, tuple[int, int, int]] = {}  # dump -> (mtime in ns, size, rows)
        self._lock = threading.Lock()

    def metrics(self, version: str = "", offset: int = 0) -> Record:
        """The lines of metrics.jsonl from byte ``offset``; all of them, with ``reset``, if ``version`` is another file.

        A run that resumes replaces the file, so its inode changes.
        """
        path = self.folder / "metrics.jsonl"
        try:
            with path.open("rb") as file:
                about = os.fstat(file.fileno())
                inode = f"{about.st_dev}-{about.st_ino}"
                reset = version != inode or offset > about.st_size
                file.seek(0 if reset else offset)
                whole, _, _ = file.read().rpartition(b"\n")
        except FileNotFoundError:
            return {"version": "", "offset": 0, "reset": version != "", "records": []}
        start = 0 if reset else offset
        try:
            records = [json.loads(line, parse_constant=lambda _: None) for line in whole.split(b"\n") if line]
        except ValueError as error:
            raise ValueError(f"{path}: a line after byte {start} is not JSON ({error})") from error
        return {"version": inode, "offset": start + len(whole) + bool(whole), "reset": reset, "records": records}

    def steps(self) -> list[Step]:
        """The existing dumps, by number."""
        dumps = sorted((self.folder / "rollouts").glob("*.parquet"))
        with self._lock:
            return [Step(int(path.stem), self._size(path)) for path in dumps]

    def _size(self, path: Path) -> int:
        about = path.stat()
        known = self._rows.get(path)
        if known is None or known[:2] != (about.st_mtime_ns, about.st_size):
            with open_parquet(path, "the other steps can be shown") as file:
                known = self._rows[path] = (about.st_mtime_ns, about.st_size, file.metadata.num_rows)
        return known[2]

    def etag(self) -> str:
        """Changes whenever a dump or a line of metrics is added or replaced."""
        paths = [self.folder / "metrics.jsonl", *(self.folder / "rollouts").glob("*.parquet")]
        about = [path.stat() for path in paths if path.is_file()]
        newest = max((a.st_mtime_ns for a in about), default=0)
        return f'"{len(about)}-{newest}-{sum(a.st_size for a in about)}"'

    def _read(self, step: int, columns: Sequence[str]) -> pa.Table:
        path = self.folder / "rollouts" / f"{step:06d}.parquet"
        if not path.is_file():
            raise LookupError(f"{self.name} has no rollouts of step {step}")
        with open_parquet(path, "the other steps can be shown") as file:
            return file.read(columns=list(columns), use_threads=False)

    def groups(self, step: int, start: int, count: int) -> Record:
        """``count`` groups of a step from the ``start``-th on: the samples of one prompt are consecutive in a dump."""
        table = self._read(step, SHOWN)
        qids = table["qid"].to_pylist()
        firsts = [row for row, qid in enumerate(qids) if row == 0 or qid != qids[row - 1]]
        ends = [*firsts[1:], len(qids)]
        groups = []
        for first, end in list(zip(firsts, ends, strict=True))[start : start + count]:
            records = table.slice(first, end - first).to_pylist()
            samples = [_sample(step, row, record) for row, record in enumerate(records, start=first)]
            reward = sum(sample["reward"] for sample in samples) / len(samples)
            groups.append({"qid": qids[first], "reward": reward, "samples": samples})
        return {"step": step, "start": start, "total": len(firsts), "groups": groups}

    def find(self, wanted: Filter, cursor: str = "", size: int = 50) -> Record:
        """A page of rollouts, newest steps first: "rollouts", "cursor" (where to continue, or None), "scanned" (rows).

        One call scans at most SCAN_ROWS rows and the rest of their dump, so a page may be short or empty, with a
        cursor.
        """
        step_from, row_from = _position(cursor)
        found: list[Record] = []
        scanned = 0
        for step in reversed(self.steps()):
            if not wanted.step_min <= step.number <= min(wanted.step_max, step_from):
                continue
            first = row_from if step.number == step_from else 0
            if len(found) == size or scanned >= SCAN_ROWS:
                return {"rollouts": found, "cursor": f"{step.number}:{first}", "scanned": scanned}
            rows = [row for row in self._matches(step, wanted) if row >= first]
            scanned += step.rows - first
            taken = rows[: size - len(found)]
            if taken:
                records = self._read(step.number, SHOWN).take(pa.array(taken)).to_pylist()
                found += [_sample(step.number, row, record) for row, record in zip(taken, records, strict=True)]
            if len(rows) > len(taken):
                return {"rollouts": found, "cursor": f"{step.number}:{rows[len(taken)]}", "scanned": scanned}
        return {"rollouts": found, "cursor": None, "scanned": scanned}

    def _matches(self, step: Step, wanted: Filter) -> Sequence[int]:
        columns = wanted.columns()
        mask = wanted.mask(self._read(step.number, columns)) if columns else None
        if mask is None:
            return range(step.rows)
        rows: list[int] = pc.indices_nonzero(mask).to_pylist()
        return rows

    def rollout(self, step: int, row: int) -> Record:
        """One rollout with prompt and tokens, as text if the run has a tokenizer."""
        columns = [*SHOWN, "prompt_ids", "token_ids", "logprobs", "weights_version"]
        table = self._read(step, columns)
        if not 0 <= row < table.num_rows:
            raise LookupError(f"step {step} of {self.name} has {table.num_rows} rollouts, there is no row {row}")
        record = table.slice(row, 1).to_pylist()[0]
        prompt_ids, token_ids, logprobs = record.pop("prompt_ids"), record.pop("token_ids"), record.pop("logprobs")
        qids = table["qid"].to_pylist()
        record["group"] = [i for i, qid in enumerate(qids) if qid == record["qid"]]
        prompt, pieces, tokenizer = None, [f"#{i}" for i in token_ids], self._tokenizer()
        if tokenizer is not None:
            prompt = tokenizer.decode(prompt_ids, skip_special_tokens=False)
            pieces = [tokenizer.decode([i], skip_special_tokens=False) for i in token_ids]
        tokens = [list(pair) for pair in zip(pieces, logprobs, strict=True)]
        return _sample(step, row, record | {"prompt": prompt, "prompt_tokens": len(prompt_ids), "tokens": tokens})

    def _tokenizer(self) -> Any:
        paths = [*sorted(self.folder.glob("global_step_*/tokenizer.json")), self.folder / "model" / "tokenizer.json"]
        path = next((path for path in paths if path.is_file()), None)
        return Tokenizer.from_file(str(path)) if path else None

    def rewards(self) -> Mapping[str, tuple[int, float]]:
        """query id -> (rollouts, mean reward), of two columns of every dump."""
        tables = [self._read(step.number, ("qid", "reward")) for step in self.steps()]
        if not tables:
            return {}
        by_query = pa.concat_tables(tables).group_by("qid")
        means = by_query.aggregate([("reward", "count"), ("reward", "mean")]).to_pylist()
        return {row["qid"]: (row["reward_count"], row["reward_mean"]) for row in means}


def compare(one: Run, other: Run, most: int = 25) -> Record:
    """The mean of the last steps of two runs, per metric, and their shared queries with the largest reward
    differences."""
    ends = [_ends(run.metrics()["records"]) for run in (one, other)]
    names = [name for name in ends[0] if name in ends[1] and name != "step"]
    a, b = one.rewards(), other.rewards()
    shared = sorted((qid for qid in a if qid in b), key=lambda qid: (-abs(b[qid][1] - a[qid][1]), qid))
    pairs = [(qid, zip(a[qid], b[qid], strict=True)) for qid in shared[:most]]
    queries = [{"qid": qid, "rollouts": list(counts), "reward": list(means)} for qid, (counts, means) in pairs]
    metrics = [{"name": name, "values": [end[name] for end in ends]} for name in names]
    return {"metrics": metrics, "shared": len(shared), "queries": queries}


def _ends(records: Sequence[Record]) -> dict[str, float]:
    ends: dict[str, float] = {}
    for name in dict.fromkeys(name for record in records for name in record):
        values = [record[name] for record in records if isinstance(record.get(name), int | float)][-LAST_STEPS:]
        if values:
            ends[name] = sum(values) / len(values)
    return ends


def _sample(step: int, row: int, record: Record) -> Record:
    return {"step": step, "row": row, "thinking": thinking(record["text"]), **record}


def _position(cursor: str) -> tuple[int, int]:
    if not cursor:
        return 2**31 - 1, 0
    if not re.fullmatch(r"\d{1,9}:\d{1,9}", cursor):
        raise ValueError(f"cursor {cursor!r} is not STEP:ROW")
    step, row = cursor.split(":")
    return int(step), int(row)
