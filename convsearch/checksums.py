"""Checksums of the files of a folder, in ``checksums.json`` beside them: they find damage that keeps the size."""

import json
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import xxhash

from convsearch.files import atomic_write, read_json

NAME = "checksums.json"
_THREADS = 8  # xxh3 reads faster than one thread is fed by a disk


def seal(folder: Path) -> None:
    """Writes ``checksums.json`` for all files under ``folder``, the last file of a complete folder."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / NAME)
    with ThreadPoolExecutor(_THREADS) as pool:
        digests = list(pool.map(xxh3, paths))
    sealed = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "xxh3": digest}
        for path, digest in zip(paths, digests, strict=True)
    }
    with atomic_write(folder / NAME) as file:
        json.dump(sealed, file, indent=1)


def check(folder: Path, remedy: str, largest: int | None = None) -> None:
    """Compares the files of a folder with its ``checksums.json``; a folder without one is not checked.

    Args:
        remedy: the end of the error's sentence.
        largest: of files with more bytes only the size is compared; None: all are read.

    Raises:
        ValueError: a file is missing or has other bytes than were written; names it.
    """
    sealed = _read(folder, remedy)
    read = {}
    for name, expected in sealed.items():
        path = folder / name
        size = path.stat().st_size if path.is_file() else 0
        if size != expected["bytes"]:
            fault = f"{name} has {size} bytes where {expected['bytes']} were written"
            raise ValueError(f"{folder} is damaged: {fault}; {remedy}")
        if largest is None or size <= largest:
            read[path] = expected["xxh3"]
    with ThreadPoolExecutor(_THREADS) as pool:
        for (path, expected), found in zip(read.items(), pool.map(xxh3, read), strict=True):
            if found != expected:
                fault = f"{path.relative_to(folder)} has the checksum {found} where {expected} was written"
                raise ValueError(f"{folder} is damaged: {fault}; {remedy}")


def _read(folder: Path, remedy: str) -> Mapping[str, dict[str, Any]]:
    path = folder / NAME
    if not path.is_file():
        return {}
    try:
        sealed = json.loads(path.read_bytes())
        if all(isinstance(entry["bytes"], int) and isinstance(entry["xxh3"], str) for entry in sealed.values()):
            return sealed  # type: ignore[no-any-return]
        reason = "not sizes and checksums"
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        reason = str(error)
    raise ValueError(f"{path} is damaged ({reason}); {remedy}")


def xxh3(path: Path, size: int = sys.maxsize) -> str:
    """The XXH3 checksum of a file (of its first ``size`` bytes), 64 bits in hexadecimal."""
    digest = xxhash.xxh3_64()
    with open(path, "rb") as file:
        while size > 0 and (block := file.read(min(size, 1 << 20))):
            digest.update(block)
            size -= len(block)
    return digest.hexdigest()


def settings_of(lines: Path) -> Path:
    """The settings file beside an output of JSON lines."""
    return lines.with_name(f"{lines.name}.settings.json")


def written(lines: Path) -> dict[str, Any]:
    """What ``settings_of(lines)`` records of a whole output; lines may follow it later."""
    size = lines.stat().st_size
    return {"bytes": size, "xxh3": xxh3(lines, size)}


def check_lines(lines: Path) -> None:
    """Compares an output of JSON lines with what its settings file records; without a record it is not checked.

    Raises:
        ValueError: it has other bytes than were written.
    """
    beside = settings_of(lines)
    record = read_json(beside, "delete it together with its output").get("written") if beside.is_file() else None
    if record and (lines.stat().st_size < record["bytes"] or xxh3(lines, record["bytes"]) != record["xxh3"]):
        fault = f"its first {record['bytes']} bytes are not those that were written"
        raise ValueError(f"{lines} is damaged: {fault}; make it again, or delete {beside} if you have changed it")
