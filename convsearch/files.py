"""Files that are either complete or absent, and JSON lines whose errors have a line number."""

import errno
import fcntl
import gzip
import json
import os
import socket
import sys
import time
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


@contextmanager
def sole_writer(output: str | Path, *, inside: bool = False) -> Iterator[None]:
    """Holds a lock for the block, so that two commands never write the same file or folder at the same time.

    The kernel frees the lock when the process ends, however it ends.

    Args:
        inside: the lock is ``<output>/.lock``, in a folder that is made if it is missing; else ``.<name>.lock`` beside
            the output, which may be replaced.

    Raises:
        ValueError: another process holds it; names its host, its number and its start.
    """
    output = Path(output)
    path = output / ".lock" if inside else output.with_name(f".{output.absolute().name}.lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    with _locked(path, output) as file:
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()} since {time.strftime('%Y-%m-%d %H:%M:%S')}")
        file.flush()
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def _locked(path: Path, output: Path) -> IO[str]:
    while True:
        file = open(path, "a+", encoding="utf-8")  # noqa: SIM115 (closed by the caller)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            with file:
                file.seek(0)
                holder = file.read() or "another process"
            remedy = "wait until it ends, stop it, or name another output"
            raise ValueError(f"{output} is being written by {holder}: {remedy}") from None
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                raise
            what = f"the file system of {output} has no locks ({error.strerror})"
            print(f"warning: {what}: make sure that no other command writes there", file=sys.stderr)
        if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
            return file
        file.close()  # the process before has just removed it


def read_json(path: str | Path, remedy: str) -> dict[str, Any]:
    """The object in a JSON file.

    Args:
        remedy: the end of the error's sentence.

    Raises:
        ValueError: the file is missing or does not hold a JSON object; names it.
    """
    try:
        found = json.loads(Path(path).read_bytes())
    except FileNotFoundError as error:
        raise ValueError(f"there is no {path}: {remedy}") from error
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}): {remedy}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} is damaged (not a JSON object): {remedy}")
    return found


def read_jsonl(path: str | Path, *, growing: bool = False) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields (line number from 1, object) of a JSON-lines file, gzipped or not; blank lines are skipped.

    Args:
        growing: leave out a last line without a line break, which a process is writing or was killed in.

    Raises:
        ValueError: a line is not UTF-8 or not a JSON object, or a gzipped file is damaged; names file and line.
    """
    path = Path(path)
    for number, line in _numbered_lines(path):
        if not line.strip() or (growing and not line.endswith(b"\n")):
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
