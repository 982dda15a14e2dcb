"""Raw files as streams of records: plain, gzipped, in a zip, or parquet; memory does not grow with their size.

Any fault of a record is a ``RecordError`` that names file, record and field; ``BadRecords`` tolerates a given number of
them.
"""

import csv
import gzip
import io
import json
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import ijson
from tqdm import tqdm

from convsearch.parquet import read_rows

MAX_CELL_CHARS = 1 << 20  # a longer cell of a .tsv file means an unclosed quote, which takes in the rest of the file
_TICK_RECORDS = 256


class RecordError(ValueError):
    """One record is malformed; ``--skip-bad`` can tolerate it."""


@dataclass
class BadRecords:
    """Counts malformed records and stops above the limit. ``BadRecords(limit=2)`` tolerates two."""

    limit: int = 0
    messages: list[str] = field(default_factory=list)

    def add(self, error: RecordError) -> None:
        """Records the error.

        Raises:
            ValueError: more than ``limit`` records are malformed.
        """
        self.messages.append(str(error))
        if self.limit == 0:
            raise ValueError(f"{error}; correct it, or leave out at most N such records with --skip-bad N") from error
        count = len(self.messages)
        if count > self.limit:
            allowed = f"--skip-bad allows {self.limit}"
            raise ValueError(f"{count} malformed records, but {allowed}; the last one is {error}") from error

    @contextmanager
    def tolerate(self) -> Iterator[None]:
        """Records a RecordError of the block, whose rest is skipped."""
        try:
            yield
        except RecordError as error:
            self.add(error)


@dataclass(frozen=True, slots=True)
class Record:
    """A JSON object and its place. ``Record({"a": "x"}, "train.json: record 3").text("a")`` is ``"x"``."""

    data: dict[str, Any]
    where: str

    def error(self, name: str, problem: str) -> RecordError:
        return RecordError(f"{self.where}: field '{name}' {problem}")

    def _wrong(self, name: str, expected: str) -> RecordError:
        missing = name not in self.data
        return self.error(name, "is missing" if missing else f"must be {expected}, got {_short(self.data[name])}")

    def text(self, name: str, *, blank: bool = False) -> str:
        """The string under ``name``, stripped; ``blank`` allows one without a visible character."""
        value = self.data.get(name)
        if not isinstance(value, str):
            raise self._wrong(name, "a string")
        if not blank and not value.strip():
            raise self.error(name, "is blank")
        return value.strip()

    def optional_text(self, name: str) -> str | None:
        """The string under ``name``, stripped; None if there is none or a blank one."""
        return self.text(name, blank=True) or None if self.data.get(name) is not None else None

    def docid(self, name: str) -> str:
        """A passage id: a string without white space, which TREC files could not hold."""
        docid = self.text(name)
        if len(docid.split()) != 1:
            raise self.error(name, f"has white space: {docid!r}")
        return docid

    def number(self, name: str) -> int:
        value = self.data.get(name)
        if isinstance(value, str) and value.isdecimal():
            return int(value)
        if not isinstance(value, int) or isinstance(value, bool):
            raise self._wrong(name, "a whole number")
        return value

    def _items(self, name: str, kind: type, expected: str) -> list[Any]:
        value = self.data.get(name)
        if not isinstance(value, list) or not all(isinstance(item, kind) for item in value):
            raise self._wrong(name, expected)
        return value

    def texts(self, name: str) -> list[str]:
        return [text.strip() for text in self._items(name, str, "a list of strings")]

    def objects(self, name: str) -> list["Record"]:
        entries = enumerate(self._items(name, dict, "a list of objects"))
        return [Record(entry, f"{self.where}, {name}[{number}]") for number, entry in entries]


@dataclass(frozen=True, slots=True)
class Source:
    """A file, or a member of a zip file. ``str(Source(Path("a.zip"), "b.json"))`` is ``"a.zip!b.json"``."""

    path: Path
    member: str | None = None

    def __str__(self) -> str:
        return f"{self.path}!{self.member}" if self.member else str(self.path)

    @property
    def suffix_path(self) -> str:
        """The path that identifies a data set's file, with forward slashes."""
        return self.member or self.path.as_posix()

    def stamp(self) -> dict[str, Any]:
        """What distinguishes versions of this file: name, bytes, time of change (hashing 27 GB takes minutes)."""
        stat = self.path.stat()
        name = f"{self.path.name}!{self.member}" if self.member else self.path.name
        return {"name": name, "bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns}


@dataclass(frozen=True, slots=True)
class Stream:
    """An open source with what a progress bar needs: how many bytes it has, and how many have been read."""

    file: io.BufferedReader
    total_bytes: int
    position: Callable[[], int]


@contextmanager
def open_source(source: Source) -> Iterator[Stream]:
    """Opens a source for reading bytes; unpacks gzip and zip.

    Raises:
        ValueError: the file is missing, or the archive is damaged.
    """
    if not source.path.is_file():
        raise ValueError(f"{source.path}: no such file")
    try:
        if source.member is not None:
            with zipfile.ZipFile(source.path) as archive, archive.open(source.member) as member:
                total = archive.getinfo(source.member).file_size
                yield Stream(io.BufferedReader(cast(io.RawIOBase, member)), total, member.tell)
        else:
            with open(source.path, "rb") as raw:
                unpacked = cast(io.RawIOBase, gzip.GzipFile(fileobj=raw) if source.path.suffix == ".gz" else raw)
                yield Stream(io.BufferedReader(unpacked), source.path.stat().st_size, raw.tell)
    except (zipfile.BadZipFile, zlib.error, EOFError, gzip.BadGzipFile) as error:
        raise ValueError(f"{source}: the archive is damaged ({error}); fetch it again") from error


@contextmanager
def _progress(stream: Stream, description: str | None) -> Iterator[Callable[[int], None]]:
    """A bar over the stream's bytes, none without ``description``. The yielded function takes the count of records."""
    total, hidden = stream.total_bytes, description is None
    with tqdm(desc=description, total=total, unit="B", unit_scale=True, mininterval=1.0, disable=hidden) as bar:

        def tick(count: int) -> None:
            if count % _TICK_RECORDS == 0:
                bar.set_postfix_str(f"{count:,} records", refresh=False)
                bar.update(stream.position() - bar.n)

        yield tick
        bar.update(total - bar.n)


def read_records(source: Source, bad: BadRecords, description: str | None = None) -> Iterator[Record]:
    """Yields the objects of a JSON array or of JSON lines; a malformed line goes to ``bad``.

    Raises:
        ValueError: the file is neither, or its array is not JSON from some record on.
    """
    with open_source(source) as stream, _progress(stream, description) as tick:
        start = stream.file.peek(64).lstrip()[:1]
        if start not in (b"[", b"{", b""):
            found = f"it starts with {stream.file.peek(16)[:16]!r}"
            raise ValueError(f"{source}: expected a JSON array or JSON lines, but {found}")
        records = _array(source, stream) if start == b"[" else _lines(source, stream, bad)
        for count, (where, value) in enumerate(records, start=1):
            tick(count)
            if isinstance(value, dict):
                yield Record(value, where)
            else:
                bad.add(RecordError(f"{where}: expected a JSON object, got {_short(value)}"))


def _array(source: Source, stream: Stream) -> Iterator[tuple[str, Any]]:
    number = 0
    try:
        for number, value in enumerate(ijson.items(stream.file, "item", use_float=True), start=1):
            yield f"{source}: record {number}", value
    except ijson.JSONError as error:
        problem = f"not JSON ({' '.join(str(error).split())}); the file is cut off or damaged"
        raise ValueError(f"{source}: record {number + 1}: {problem}") from error


def _lines(source: Source, stream: Stream, bad: BadRecords) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(stream.file, start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except ValueError as error:
            bad.add(RecordError(f"{source}:{number}: not a line of JSON ({error})"))
            continue
        yield f"{source}:{number}", value


def read_table(
    source: Source, columns: tuple[str, ...], bad: BadRecords, description: str | None = None
) -> Iterator[Record]:
    """Yields the rows of a tab-separated file as records of ``columns``; skips a first row of these names."""
    with open_source(source) as stream, _progress(stream, description) as tick:
        previous_limit = csv.field_size_limit(MAX_CELL_CHARS)
        rows = csv.reader(io.TextIOWrapper(stream.file, encoding="utf-8", newline=""), delimiter="\t")
        try:
            for count, row in enumerate(rows, start=1):
                tick(count)
                if count == 1 and row == list(columns):
                    continue
                where = f"{source}:{rows.line_num}"
                if len(row) == len(columns):
                    yield Record(dict(zip(columns, row, strict=True)), where)
                else:
                    expected = f"{len(columns)} columns ({', '.join(columns)})"
                    bad.add(RecordError(f"{where}: expected {expected}, got {len(row)}"))
        except (csv.Error, UnicodeDecodeError) as error:
            raise ValueError(f"{source}:{rows.line_num + 1}: not a row of tab-separated UTF-8 ({error})") from error
        finally:
            csv.field_size_limit(previous_limit)


def read_parquet_records(source: Source, columns: Sequence[str] = ()) -> Iterator[Record]:
    """Yields the rows of a parquet file, block by block; only the named columns if any are named.

    Raises:
        ValueError: it is no parquet file, or lacks a column; names it.
    """
    for number, row in enumerate(read_rows(source.path, columns, remedy="download it again"), start=1):
        yield Record(row, f"{source}: row {number}")


def find_sources(place: Path) -> list[Source]:
    """Every file of a folder or zip file, then those of the zip files in the folder, in the order of their names.

    Raises:
        ValueError: there is no such folder or zip file, or a zip file is damaged.
    """
    if not place.exists():
        raise ValueError(f"{place}: no such file or folder")
    paths = sorted(path for path in place.rglob("*") if path.is_file()) if place.is_dir() else [place]
    inside = [Source(path, name) for path in paths if path.suffix == ".zip" for name in zip_members(path)]
    return [*map(Source, paths), *inside]


def zip_members(path: Path) -> list[str]:
    """The names of the files in a zip file, in their order there.

    Raises:
        ValueError: the file is missing or a damaged zip file.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    try:
        with zipfile.ZipFile(path) as archive:
            return [info.filename for info in archive.infolist() if not info.is_dir()]
    except zipfile.BadZipFile as error:
        raise ValueError(f"{path}: the archive is damaged ({error}); fetch it again") from error


def locate(
    place: Path | None, given: Mapping[str, Path | None], names: Mapping[str, Sequence[str]]
) -> dict[str, Source]:
    """The ``given`` files; the others by their public names in the folder (and its zip files) or zip file ``place``.

    Args:
        names: what a file is -> the endings of its path, as ``pick`` takes them. A file that is not found is left out.
    """
    sources = find_sources(place) if place else []
    found = {key: Source(path) if (path := given.get(key)) else pick(sources, *names[key]) for key in names}
    return {key: source for key, source in found.items() if source is not None}


def pick(sources: list[Source], *endings: str) -> Source | None:
    """The first source whose path ends with one of ``endings``, on a folder boundary; earlier endings win."""
    pairs = ((source, ending) for ending in endings for source in sources)
    return next((source for source, ending in pairs if f"/{source.suffix_path}".endswith(f"/{ending}")), None)


def _short(value: object) -> str:
    shown = repr(value)
    return shown if len(shown) <= 60 else f"{shown[:57]}..."
