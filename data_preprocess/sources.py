"""Raw files as streams of records: plain, gzipped, or inside a zip; memory does not grow with their size.

Whatever is wrong with a record is a ``RecordError`` that names file, record and field; ``BadRecords`` tolerates a stated number of them.
"""

import csv
import gzip
import io
import json
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from tqdm import tqdm

MAX_CELL_CHARS = (
    1 << 20
)  # a longer cell of a .tsv file means an unclosed quote, which would swallow the rest of the file
_TICK_RECORDS = 256


class RecordError(ValueError):
    """One record is malformed; ``--skip-bad`` may tolerate it."""


@dataclass
class BadRecords:
    """Counts malformed records and stops at the one too many. ``BadRecords(limit=2)`` lets two pass."""

    limit: int = 0
    messages: list[str] = field(default_factory=list)

    def add(self, error: RecordError) -> None:
        """Notes the error.

        Raises:
            ValueError: more than ``limit`` records are malformed.
        """
        self.messages.append(str(error))
        if self.limit == 0:
            raise ValueError(f"{error}; mend it, or pass --skip-bad N to leave out at most N such records") from error
        if len(self.messages) > self.limit:
            raise ValueError(
                f"{len(self.messages)} malformed records, but --skip-bad allows {self.limit}; the last one is {error}"
            ) from error

    @contextmanager
    def tolerate(self) -> Iterator[None]:
        """A RecordError inside the block is noted, and the block is left."""
        try:
            yield
        except RecordError as error:
            self.add(error)


@dataclass(frozen=True, slots=True)
class Record:
    """A JSON object and where it stands. ``Record({"a": "x"}, "train.json: record 3").text("a")`` is ``"x"``."""

    data: dict[str, Any]
    where: str

    def error(self, name: str, problem: str) -> RecordError:
        return RecordError(f"{self.where}: field '{name}' {problem}")

    def text(self, name: str, *, blank: bool = False) -> str:
        """The string under ``name``, stripped; ``blank`` allows one without a visible character."""
        value = self.data.get(name)
        if not isinstance(value, str):
            raise self.error(name, "is missing" if name not in self.data else f"must be a string, got {_short(value)}")
        if not blank and not value.strip():
            raise self.error(name, "is blank")
        return value.strip()

    def optional_text(self, name: str) -> str | None:
        """The string under ``name``, stripped; None where there is none or a blank one."""
        return self.text(name, blank=True) or None if self.data.get(name) is not None else None

    def docid(self, name: str) -> str:
        """A passage id: a string without white space, which TREC files could not hold."""
        docid = self.text(name)
        if len(docid.split()) != 1:
            raise self.error(name, f"holds white space: {docid!r}")
        return docid

    def number(self, name: str) -> int:
        value = self.data.get(name)
        if isinstance(value, str) and value.isdecimal():
            return int(value)
        if not isinstance(value, int) or isinstance(value, bool):
            raise self.error(
                name, "is missing" if name not in self.data else f"must be a whole number, got {_short(value)}"
            )
        return value

    def texts(self, name: str) -> list[str]:
        value = self.data.get(name)
        if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
            raise self.error(
                name, "is missing" if name not in self.data else f"must be a list of strings, got {_short(value)}"
            )
        return [text.strip() for text in value]

    def objects(self, name: str) -> list["Record"]:
        value = self.data.get(name)
        if not isinstance(value, list) or not all(isinstance(entry, dict) for entry in value):
            raise self.error(
                name, "is missing" if name not in self.data else f"must be a list of objects, got {_short(value)}"
            )
        return [Record(entry, f"{self.where}, {name}[{number}]") for number, entry in enumerate(value)]


@dataclass(frozen=True, slots=True)
class Source:
    """A file, or a member of a zip file. ``str(Source(Path("a.zip"), "b.json"))`` is ``"a.zip!b.json"``."""

    path: Path
    member: str | None = None

    def __str__(self) -> str:
        return f"{self.path}!{self.member}" if self.member else str(self.path)

    @property
    def suffix_path(self) -> str:
        """The path by which a data set's files are recognised, with forward slashes."""
        return self.member or self.path.as_posix()

    def stamp(self) -> dict[str, Any]:
        """What tells this file from another version of it: name, bytes and time of change (hashing 27 GB would take minutes)."""
        stat = self.path.stat()
        return {
            "name": f"{self.path.name}!{self.member}" if self.member else self.path.name,
            "bytes": stat.st_size,
            "mtime_ns": stat.st_mtime_ns,
        }


@dataclass(frozen=True, slots=True)
class Stream:
    """An open source with what a progress bar needs: its bytes, and how many of them have been read."""

    file: io.BufferedReader
    total_bytes: int
    position: Callable[[], int]


@contextmanager
def open_source(source: Source) -> Iterator[Stream]:
    """Opens a source for reading bytes; gzip and zip are unpacked on the way.

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
    """A bar over the stream's bytes; the yielded function is called with the count of records so far. None as description: no bar."""
    with tqdm(
        total=stream.total_bytes,
        desc=description,
        unit="B",
        unit_scale=True,
        mininterval=1.0,
        disable=description is None,
    ) as bar:

        def tick(count: int) -> None:
            if count % _TICK_RECORDS == 0:
                bar.set_postfix_str(f"{count:,} records", refresh=False)
                bar.update(stream.position() - bar.n)

        yield tick
        bar.update(stream.total_bytes - bar.n)


def read_records(source: Source, bad: BadRecords, description: str | None = None) -> Iterator[Record]:
    """Yields the objects of a JSON array or of JSON lines, whichever the file holds; a malformed line goes to ``bad``.

    Raises:
        ValueError: the file holds neither, or an array that is no JSON from some record on.
    """
    with open_source(source) as stream, _progress(stream, description) as tick:
        start = stream.file.peek(64).lstrip()[:1]
        if start not in (b"[", b"{", b""):
            raise ValueError(
                f"{source}: expected a JSON array or JSON lines, but it starts with {stream.file.peek(16)[:16]!r}"
            )
        records = _array(source, stream) if start == b"[" else _lines(source, stream, bad)
        for count, (where, value) in enumerate(records, start=1):
            tick(count)
            if isinstance(value, dict):
                yield Record(value, where)
            else:
                bad.add(RecordError(f"{where}: expected a JSON object, got {_short(value)}"))


def _array(source: Source, stream: Stream) -> Iterator[tuple[str, Any]]:
    import ijson

    number = 0
    try:
        for value in ijson.items(stream.file, "item", use_float=True):
            number += 1
            yield f"{source}: record {number}", value
    except ijson.JSONError as error:
        raise ValueError(
            f"{source}: record {number + 1}: not JSON ({' '.join(str(error).split())}); the file is cut off or damaged"
        ) from error


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
    """Yields the rows of a tab-separated file as records under the names of ``columns``; a first row of these names is passed over."""
    with open_source(source) as stream, _progress(stream, description) as tick:
        previous_limit = csv.field_size_limit(MAX_CELL_CHARS)
        rows = csv.reader(io.TextIOWrapper(stream.file, encoding="utf-8", newline=""), delimiter="\t")
        count = 0
        try:
            for row in rows:
                count += 1
                tick(count)
                if count == 1 and row == list(columns):
                    continue
                if len(row) == len(columns):
                    yield Record(dict(zip(columns, row, strict=True)), f"{source}:{rows.line_num}")
                else:
                    bad.add(
                        RecordError(
                            f"{source}:{rows.line_num}: expected {len(columns)} columns ({', '.join(columns)}), got {len(row)}"
                        )
                    )
        except (csv.Error, UnicodeDecodeError) as error:
            raise ValueError(f"{source}:{rows.line_num + 1}: not a row of tab-separated UTF-8 ({error})") from error
        finally:
            csv.field_size_limit(previous_limit)


def find_sources(place: Path) -> list[Source]:
    """Every file under a folder or inside a zip file; zip files in the folder are looked into, too, in the order of their names.

    Raises:
        ValueError: there is no such folder or zip file, or a zip file is damaged.
    """
    if place.is_dir():
        paths = sorted(path for path in place.rglob("*") if path.is_file())
    elif place.is_file():
        paths = [place]
    else:
        raise ValueError(f"{place}: no such file or folder")
    sources = [Source(path) for path in paths]
    for path in paths:
        if path.suffix == ".zip":
            sources += [Source(path, name) for name in zip_members(path)]
    return sources


def zip_members(path: Path) -> list[str]:
    """The names of the files in a zip file, in their order there.

    Raises:
        ValueError: the file is missing or no whole zip file.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    try:
        with zipfile.ZipFile(path) as archive:
            return [info.filename for info in archive.infolist() if not info.is_dir()]
    except zipfile.BadZipFile as error:
        raise ValueError(f"{path}: the archive is damaged ({error}); fetch it again") from error


def pick(sources: list[Source], *endings: str) -> Source | None:
    """The first source whose path ends, from a folder boundary on, with one of ``endings``; earlier endings win."""
    for ending in endings:
        for source in sources:
            if f"/{source.suffix_path}".endswith(f"/{ending}"):
                return source
    return None


def _short(value: object) -> str:
    shown = repr(value)
    return shown if len(shown) <= 60 else f"{shown[:57]}..."
