"""Files that are either complete or absent, and JSON lines whose errors have a line number."""

import gzip
import json
import os
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any


@contextmanager
def named_errors(path: str | Path) -> Iterator[None]:
    """Adds the file name to an OSError of the block, because a failed write has none."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


@contextmanager
def atomic_write(path: str | Path, mode: str = "w") -> Iterator[IO[Any]]:
    """Opens ``<path>.tmp-<pid>`` and renames it to ``path`` at the end of the block; removes it after an exception."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    try:
        with named_errors(path), open(temporary, mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_jsonl(path: str | Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields (line number from 1, object) of a JSON-lines file, gzipped or not; blank lines are skipped.

    Raises:
        ValueError: a line is not UTF-8 or not a JSON object, or a gzipped file is damaged; names file and line.
    """
    path = Path(path)
    for number, line in _numbered_lines(path):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}:{number}: not a line of JSON ({error})") from error
        if not isinstance(record, dict):
            raise ValueError(f"{path}:{number}: expected a JSON object, got {type(record).__name__}")
        yield number, record


_DAMAGED = (EOFError, gzip.BadGzipFile, zlib.error)


def _numbered_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    number = 0
    with _open_binary(path) as file:
        try:
            for number, line in enumerate(file, start=1):
                yield number, line
        except _DAMAGED as error:
            raise _damaged(path, number + 1, error) from error


def line_blocks(path: Path, size: int) -> Iterator[tuple[int, bytes]]:
    """Yields (number of the first line, whole lines of about ``size`` bytes in total) of a text file, gzipped or not.

    Raises:
        ValueError: a gzipped file is damaged or cut off; names the file and the first line that could not be read.
    """
    line = 1
    with _open_binary(path) as file:
        try:
            while block := file.read(size):
                if not block.endswith(b"\n"):
                    block += file.readline()
                yield line, block
                line += block.count(b"\n")
        except _DAMAGED as error:
            raise _damaged(path, line, error) from error


def _damaged(path: Path, line: int, error: Exception) -> ValueError:
    return ValueError(f"{path}:{line}: the gzipped file is damaged or cut off ({error}); download it again")


def _open_binary(path: Path) -> Any:
    return gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb")


def write_jsonl(path: str | Path, records: Iterable[dict[str, Any]]) -> int:
    """Writes JSON lines atomically and returns their number."""
    count = 0
    with atomic_write(path) as file:
        for record in records:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
            count += 1
    return count
