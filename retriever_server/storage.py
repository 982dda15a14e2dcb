"""Index folders on disk: arrays that grow by appending, tables of strings, manifests, and checked loading."""

import hashlib
import io
import json
import os
import shutil
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from convsearch import checksums
from convsearch.files import atomic_write, read_json

Array = npt.NDArray[Any]
M = TypeVar("M")
LARGEST = 256 << 20  # bytes of the files whose checksums are compared whenever an index is opened
AGAIN = "build the index again with --overwrite"


def collection_paths(collections: str | Path | Sequence[str | Path]) -> list[Path]:
    """One collection file or several as paths.

    Raises:
        ValueError: a file is missing.
    """
    paths = [Path(path) for path in ([collections] if isinstance(collections, str | Path) else collections)]
    for path in paths:
        if not path.is_file():
            raise ValueError(f'there is no collection file {path}: give JSON lines of {{"id", "contents"}}')
    return paths


def bar(progress: bool, **options: Any) -> Any:
    """A tqdm progress bar, shown if ``progress``."""
    return tqdm(disable=not progress, leave=False, mininterval=0.5, **options)


def hash_files(paths: Sequence[Path], progress: bool) -> str:
    """sha256 of the files' sha256 digests, one after the other."""
    digests, size = hashlib.sha256(), sum(path.stat().st_size for path in paths)
    with bar(progress, desc="hash collection", unit="B", unit_scale=True, total=size) as shown:
        for path in paths:
            digest = hashlib.sha256()
            with open(path, "rb") as file:
                while block := file.read(1 << 22):
                    digest.update(block)
                    shown.update(len(block))
            digests.update(digest.digest())
    return digests.hexdigest()


class NpyAppender:
    """Writes a one-dimensional .npy file whose length is not known at the start; ``close`` writes the header."""

    def __init__(self, path: Path, dtype: str) -> None:
        self._file = open(path, "wb")  # noqa: SIM115 (closed by close())
        self._dtype = np.dtype(dtype)
        self._count = 0
        self._file.write(self._header())

    def _header(self) -> bytes:
        # numpy pads the header so that a first axis of any length fits: its size does not depend on the count
        header = io.BytesIO()
        fields = {"descr": self._dtype.str, "fortran_order": False, "shape": (self._count,)}
        np.lib.format.write_array_header_1_0(header, fields)  # type: ignore[no-untyped-call]
        return header.getvalue()

    def append(self, values: bytes | Array) -> None:
        data = values if isinstance(values, bytes) else np.ascontiguousarray(values, self._dtype).tobytes()
        self._file.write(data)
        self._count += len(data) // self._dtype.itemsize

    def close(self) -> None:
        end, header = self._file.tell(), self._header()
        self._file.seek(0)
        self._file.write(header)
        assert end == len(header) + self._count * self._dtype.itemsize, (end, self._count)
        self._file.close()


class StringTableWriter:
    """Writes ``<name>.npy`` (UTF-8, all strings joined) and ``<name>_offsets.npy`` (int64, one more than strings)."""

    def __init__(self, folder: Path, name: str) -> None:
        self._bytes = NpyAppender(folder / f"{name}.npy", "uint8")
        self._offsets_path = folder / f"{name}_offsets.npy"
        self._offsets = array("q", [0])

    def append(self, value: bytes) -> None:
        self._bytes.append(value)
        self._offsets.append(self._offsets[-1] + len(value))

    def extend(self, joined: bytes, lengths: Array) -> None:
        """Many strings at once: their joined bytes, and the length of each."""
        self._bytes.append(joined)
        self._offsets.frombytes((self._offsets[-1] + np.cumsum(lengths, dtype=np.int64)).tobytes())

    def close(self) -> None:
        self._bytes.close()
        np.save(self._offsets_path, np.frombuffer(self._offsets, dtype=np.int64))


class StringTable:
    """Strings in index order, read from memory-mapped bytes only when they are needed."""

    def __init__(self, blob: Array, offsets: Array) -> None:
        self._blob, self._offsets = blob, offsets

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def bytes_at(self, index: int) -> bytes:
        return bytes(self._blob[self._offsets[index] : self._offsets[index + 1]].data)

    def __getitem__(self, index: int) -> str:
        return self.bytes_at(index).decode("utf-8")


class Dictionary:
    """Finds a string's index by its hash: 12 bytes per string on disk, two or three page reads per look-up."""

    def __init__(self, strings: StringTable, hashes: Array, order: Array) -> None:
        """``hashes``: the strings' uint64 hashes, ascending. ``order``: the index of the string of each hash."""
        self._strings, self._hashes, self._order = strings, hashes, order

    def find(self, value: str) -> int | None:
        """The index of a string, None if it is absent."""
        key = value.encode("utf-8", "surrogatepass")
        wanted = string_hash(key)
        at = int(np.searchsorted(self._hashes, np.uint64(wanted)))
        while at < len(self._hashes) and self._hashes[at] == wanted:
            index = int(self._order[at])
            if self._strings.bytes_at(index) == key:
                return index
            at += 1
        return None


def string_hash(value: bytes) -> int:
    """64 bits of BLAKE2b, the same on every machine."""
    return int.from_bytes(hashlib.blake2b(value, digest_size=8).digest(), "little")


def write_dictionary(folder: Path, name: str, hashes: Array, strings: StringTable) -> tuple[int, int] | None:
    """Writes ``<name>_hashes.npy`` and ``<name>_order.npy``; returns the indices of two equal strings, or None."""
    order = np.argsort(hashes, kind="stable").astype(np.int32)
    ascending = hashes[order]
    for at in np.flatnonzero(ascending[1:] == ascending[:-1]):
        first, second = int(order[at]), int(order[at + 1])
        if strings.bytes_at(first) == strings.bytes_at(second):
            return first, second
    np.save(folder / f"{name}_hashes.npy", ascending)
    np.save(folder / f"{name}_order.npy", order)
    return None


@contextmanager
def whole_folder(folder: Path, replace: bool) -> Iterator[Path]:
    """A temporary folder beside ``folder``: it gets that name when the block ends well, else it is removed.

    Removes the temporary folders of killed builds first.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    for left in folder.parent.glob(f"{folder.name}.tmp-*"):
        pid = left.name.rpartition("-")[2]
        if pid.isdigit() and not _is_running(int(pid)):
            shutil.rmtree(left)
    temporary = folder.with_name(f"{folder.name}.tmp-{os.getpid()}")
    temporary.mkdir()
    try:
        yield temporary
        publish(temporary, folder, replace)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def publish(temporary: Path, folder: Path, replace: bool) -> None:
    """Seals a finished folder, writes it to the disk for good and gives it its name; ``replace`` removes an old one."""
    checksums.seal(temporary)
    for path in temporary.iterdir():
        with open(path, "rb") as file:
            os.fsync(file.fileno())
    old = folder.with_name(f"{folder.name}.tmp-old-{os.getpid()}")
    if replace and folder.exists():
        os.replace(folder, old)
    os.replace(temporary, folder)
    if old.exists():
        shutil.rmtree(old)


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of an index folder.

    Raises:
        ValueError: there is none, or it is not JSON.
    """
    remedy = f"build the index with `python -m retriever_server.index bm25 --collection FILE --output {folder}`"
    if not folder.is_dir():
        raise ValueError(f"there is no index folder {folder}: {remedy}")
    path = folder / "manifest.json"
    if not path.is_file():
        raise ValueError(f"{folder} has no manifest.json, so it is not a finished index folder: {remedy}")
    return read_json(path, f"{remedy} --overwrite")


def load_manifest(kind: type[M], folder: Path, **expected: object) -> M:
    """manifest.json as the dataclass ``kind``; ``expected``: the fields of which this program reads a single value.

    Raises:
        ValueError: absent, damaged, or written by another kind or version of program.
    """
    found, path = read_manifest(folder), folder / "manifest.json"
    for key, value in expected.items():
        if found.get(key) != value:
            raise ValueError(f"{path} has {key} {found.get(key)!r}, this program reads {value!r}: {AGAIN}")
    for key, of_type in kind.__annotations__.items():
        if type(found.get(key)) is not of_type:
            raise ValueError(f"{path}: field {key!r} must be {of_type.__name__}, got {found.get(key)!r}: {AGAIN}")
    if not (folder / checksums.NAME).is_file():
        raise ValueError(f"{folder} has no {checksums.NAME}: {AGAIN}")
    checksums.check(folder, AGAIN, LARGEST)
    return kind(**{key: found[key] for key in kind.__annotations__})


def already_built(folder: Path, differences: Callable[[], Sequence[str]], overwrite: bool) -> bool:
    """True if ``folder`` can be used as it is, False if it may be written.

    ``differences`` returns what differs from the index to build, and raises ValueError if the folder is damaged.

    Raises:
        ValueError: the folder is something else, or is damaged or differs and ``overwrite`` is off.
    """
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    if not (folder / "manifest.json").is_file():
        raise ValueError(f"{folder} exists and is not an index folder, so it is kept: choose another --output")
    try:
        found = ", ".join(differences())
    except ValueError:
        if overwrite:
            return False
        raise
    if found and not overwrite:
        raise ValueError(f"{folder} holds an index with {found}: choose another --output or add --overwrite")
    return not found


def write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    with atomic_write(folder / "manifest.json") as file:
        json.dump(manifest, file, indent=2)
        file.write("\n")


def load_array(path: Path, dtype: str, length: int | None) -> Array:
    """A memory-mapped one-dimensional array.

    Raises:
        ValueError: the file is absent, cut short, or not of this type and length; names file, expectation and finding.
    """
    try:
        # a plain view: slices of numpy's memmap class are ten times slower to make
        found = np.asarray(np.load(path, mmap_mode="r", allow_pickle=False))
    except FileNotFoundError as error:
        raise ValueError(f"{path} is missing, so the index is incomplete: {AGAIN}") from error
    except (ValueError, EOFError) as error:
        raise ValueError(f"{path} is cut short or damaged ({error}): {AGAIN}") from error
    if found.dtype != np.dtype(dtype) or found.ndim != 1 or (length is not None and len(found) != length):
        expected = f"{dtype}[{'any' if length is None else length}]"
        shape = ",".join(map(str, found.shape))
        raise ValueError(f"{path} holds {found.dtype}[{shape}], the manifest counts {expected}: {AGAIN}")
    return found


def load_strings(folder: Path, name: str, count: int) -> StringTable:
    """The table of ``count`` strings that StringTableWriter wrote.

    Raises:
        ValueError: as load_array, or the offsets do not fit the bytes.
    """
    offsets = load_array(folder / f"{name}_offsets.npy", "int64", count + 1)
    return StringTable(load_array(folder / f"{name}.npy", "uint8", int(offsets[-1])), offsets)


def load_dictionary(folder: Path, name: str, strings: StringTable) -> Dictionary:
    """What write_dictionary wrote for a table of strings; ValueError as load_array."""
    hashes = load_array(folder / f"{name}_hashes.npy", "uint64", len(strings))
    return Dictionary(strings, hashes, load_array(folder / f"{name}_order.npy", "int32", len(strings)))
