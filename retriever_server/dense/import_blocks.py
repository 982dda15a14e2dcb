"""The reference's pickled embeddings -> an index folder of ours, without running code from a pickle.

Its pickles hold numpy arrays: ``passage__emb_p__data_obj_{i}.pb`` (vectors) with ``passage__embid_p__data_obj_{i}.pb``
(docids), or ``doc_emb_cat.pkl`` with ``doc_embid_cat.pkl``. The reader below accepts the few names that numpy writes,
replaces them by stand-ins, and refuses every other name before anything is called. Large arrays are memory-mapped, not
read.
"""

import hashlib
import pickle
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from convsearch.files import read_jsonl, sole_writer
from retriever_server.dense import folder as folders
from retriever_server.dense.manifest import FORMAT, FORMAT_VERSION, Manifest
from retriever_server.storage import NpyAppender, StringTableWriter, load_dictionary, load_strings

MAPPED = 1 << 16  # bytes from which on an array is memory-mapped
ROWS = 1 << 14  # rows that are copied at a time
# what reading a damaged pickle may raise
_DAMAGED = (pickle.UnpicklingError, EOFError, LookupError, TypeError, AttributeError, ValueError, AssertionError)
_KNOWN_DTYPE = re.compile(r"[<>=|]?(f[248]|[iu][1248]|U\d+|S\d+|O8?)")


class _Dtype:
    def __init__(self, *args: Any) -> None:
        if not args or not isinstance(args[0], str) or not _KNOWN_DTYPE.fullmatch(args[0]):
            raise ValueError(f"arrays of type {args[:1]} are not read")
        self.code, self.order = args[0].lstrip("<>=|"), ""

    def state(self, state: Any) -> None:
        if state[1] in ("<", ">"):
            self.order = state[1]
        if self.code[0] in "US" and isinstance(state[5], int):  # the state has the size
            self.code = f"{self.code[0]}{state[5] // (4 if self.code[0] == 'U' else 1)}"

    def real(self) -> np.dtype[Any]:
        return np.dtype("O" if self.code[0] == "O" else self.order + self.code)


class _Ndarray:
    """Stands for an array while it is read; then ``value`` is the array."""

    value: Any = None

    def state(self, state: Any) -> None:
        _, shape, dtype, fortran, data = state
        self.fill(data, dtype, shape, "F" if fortran else "C")

    def fill(self, data: Any, dtype: _Dtype, shape: tuple[int, ...], order: Any) -> None:
        if dtype.code[0] == "O":
            self.value = [_plain(item) for item in data]
        elif isinstance(data, bytes | bytearray | np.ndarray):
            self.value = np.frombuffer(data, dtype.real()).reshape(shape, order=order)
        else:
            raise ValueError("an array without its bytes")


def _reconstruct(*_: Any) -> _Ndarray:
    return _Ndarray()


def _frombuffer(data: Any, dtype: Any, shape: Any, order: Any) -> _Ndarray:
    array = _Ndarray()
    array.fill(data, dtype, shape, order)
    return array


def _scalar(dtype: Any, data: Any) -> Any:
    return np.frombuffer(data, dtype.real())[0].item()


def _latin1(text: Any, encoding: Any) -> bytes:
    """How pickles before protocol 3 write bytes."""
    if not isinstance(text, str) or encoding != "latin1":
        raise ValueError("bytes in an unknown encoding")
    return text.encode("latin1")


class _Marker:
    """Stands for numpy.ndarray, which a pickle names and never calls."""


_NAMES: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): _Marker,
    ("numpy", "dtype"): _Dtype,
    ("_codecs", "encode"): _latin1,
}
for _package in ("numpy.core", "numpy._core"):  # numpy 1 and 2
    _NAMES[f"{_package}.multiarray", "_reconstruct"] = _reconstruct
    _NAMES[f"{_package}.multiarray", "scalar"] = _scalar
    _NAMES[f"{_package}.numeric", "_frombuffer"] = _frombuffer


_PythonUnpickler: Any = pickle._Unpickler  # the interpreter's reader in Python, whose steps can be replaced


class _ArraysOnly(_PythonUnpickler):  # type: ignore[misc]
    """Reads a pickle that names only numpy's names, and sets attributes only on the stand-ins."""

    dispatch: ClassVar[dict[int, Any]] = dict(_PythonUnpickler.dispatch)

    def __init__(self, path: Path, file: Any) -> None:
        super().__init__(file)
        self._path, self._handle = path, file

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _NAMES:
            raise pickle.UnpicklingError(f"it names {module}.{name}")
        return _NAMES[module, name]

    def persistent_load(self, pid: Any) -> Any:
        raise pickle.UnpicklingError("it names a persistent object")

    def build(self) -> None:
        state = self.stack.pop()
        target = self.stack[-1]
        if not isinstance(target, _Dtype | _Ndarray):
            raise pickle.UnpicklingError(f"it sets the state of a {type(target).__name__}")
        target.state(state)

    def long_bytes(self) -> None:
        self.take(int.from_bytes(self.read(8), "little"))

    def bytes_(self) -> None:
        self.take(int.from_bytes(self.read(4), "little"))

    def take(self, size: int) -> None:
        """Bytes of an array; a view of the file if they are many, so that an array need not fit in memory."""
        inside_frame = getattr(self._unframer, "current_frame", None)
        if size < MAPPED or inside_frame:
            self.append(self.read(size))
            return
        start = self._handle.tell()
        if start + size > self._path.stat().st_size:
            raise EOFError("it is cut short")
        self._handle.seek(start + size)
        self.append(np.memmap(self._path, np.uint8, "r", start, (size,)))


_ArraysOnly.dispatch[pickle.BUILD[0]] = _ArraysOnly.build
_ArraysOnly.dispatch[pickle.BINBYTES8[0]] = _ArraysOnly.long_bytes
_ArraysOnly.dispatch[pickle.BYTEARRAY8[0]] = _ArraysOnly.long_bytes
_ArraysOnly.dispatch[pickle.BINBYTES[0]] = _ArraysOnly.bytes_


def _plain(value: Any) -> Any:
    if isinstance(value, _Ndarray):
        return value.value
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, str | int | bytes):
        return value
    raise pickle.UnpicklingError(f"it holds a {type(value).__name__}")


def read_arrays(path: str | Path) -> Any:
    """Reads a pickle of an array, or of a list of strings or numbers; ``.npy``; or a text file of docids.

    Raises:
        ValueError: the file is missing, damaged, or holds anything else.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    if path.suffix == ".npy":
        return np.load(path, mmap_mode="r", allow_pickle=False)
    if path.suffix == ".txt":
        return path.read_text(encoding="utf-8").splitlines()
    with open(path, "rb") as file:
        try:
            found = _plain(_ArraysOnly(path, file).load())
        except _DAMAGED as error:
            raise ValueError(f"{path} is refused: it is damaged, or not only numpy arrays ({error})") from error
    return found


@dataclass(frozen=True, slots=True)
class Block:
    """A file of vectors and the docids of its rows."""

    vectors: Path
    docids: Path


def find_blocks(embeddings: Path, docid_file: Path | None) -> list[Block]:
    """The blocks of a folder by number, or one file with ``docid_file``; ValueError if a file is missing."""
    if embeddings.is_file():
        if docid_file is None:
            raise ValueError(f"{embeddings} has no docids: give --corpus_docid_path")
        return [Block(embeddings, docid_file)]
    paths = embeddings.glob("passage__emb_p__data_obj_*.pb")
    numbered = sorted((int(found[1]), path) for path in paths if (found := re.search(r"_(\d+)\.pb$", path.name)))
    blocks = [Block(path, path.with_name(f"passage__embid_p__data_obj_{number}.pb")) for number, path in numbered]
    if not blocks and (embeddings / "doc_emb_cat.pkl").is_file():
        blocks = [Block(embeddings / "doc_emb_cat.pkl", docid_file or embeddings / "doc_embid_cat.pkl")]
    if not blocks:
        raise ValueError(f"{embeddings} holds neither passage__emb_p__data_obj_*.pb nor doc_emb_cat.pkl")
    for number, (expected, _) in enumerate(numbered):
        if number != expected:
            raise ValueError(f"{embeddings}: block {number} is missing (passage__emb_p__data_obj_{number}.pb)")
    return blocks


def convert(
    embeddings: Path, docid_file: Path | None, collection: Sequence[Path], output: Path, dtype: str, overwrite: bool
) -> None:
    """Writes an index folder of imported vectors; ``collection`` has the texts, in any order, or is empty.

    Raises:
        ValueError: a block is malformed, counts differ, a docid is given twice or has no text, or the output is taken.
    """
    blocks = find_blocks(embeddings, docid_file)
    folders.check_dtype(dtype)
    if output.exists() and not overwrite:
        raise ValueError(f"{output} exists already: choose another --output or add --overwrite")
    building = output.with_name(f"{output.name}.building")
    with sole_writer(output):
        building.mkdir(exist_ok=True)
        dim, count, digest = _write_vectors(blocks, building, dtype)
        folders.write_docid_dictionary(building, count)
        if collection:
            _write_texts(building, collection, count)
        about = "dense", dim, dtype, count, bool(collection), digest
        manifest = Manifest(FORMAT, FORMAT_VERSION, *about, encoder="", encoder_sha256="", max_length=0)
        if output.exists():
            folders.already_built(output, manifest, overwrite)  # refuses a folder that is not an index
        folders.finish(building, output, manifest, progress=True)


def _write_vectors(blocks: Sequence[Block], building: Path, dtype: str) -> tuple[int, int, str]:
    """(dim, passages, sha256 of vectors and docids)."""
    table, out = StringTableWriter(building, "docids"), NpyAppender(building / "vectors.npy", dtype)
    dim, count, digest = 0, 0, hashlib.sha256()
    for block in blocks:
        vectors, ids = read_arrays(block.vectors), read_arrays(block.docids)
        if not isinstance(vectors, np.ndarray) or vectors.ndim != 2 or vectors.dtype.kind != "f":
            raise ValueError(f"{block.vectors} holds no matrix of floating-point numbers")
        if len(ids) != len(vectors) or (dim and vectors.shape[1] != dim):
            shape = f"{vectors.shape[0]} x {vectors.shape[1]} numbers (expected {dim or 'any'} per row)"
            raise ValueError(f"{block.vectors} holds {shape} for {len(ids)} docids of {block.docids}")
        dim = vectors.shape[1]
        for start in range(0, len(vectors), ROWS):
            rows = folders.check_vectors(np.ascontiguousarray(vectors[start : start + ROWS], dtype), count + start)
            out.append(rows)
            digest.update(rows.tobytes())
        for value in ids:
            docid = str(value.decode() if isinstance(value, bytes) else value).encode()
            table.append(docid)
            digest.update(docid + b"\n")
        count += len(vectors)
    table.close()
    out.close()
    if not count:
        raise ValueError("there is no vector in the blocks")
    return dim, count, digest.hexdigest()


def _write_texts(building: Path, collection: Sequence[Path], count: int) -> None:
    """The passages' texts in the order of the vectors, from a collection in any order, by way of a temporary table."""
    table = load_strings(building, "docids", count)
    find = load_dictionary(building, "docids", table).find
    place = np.full(count, -1, np.int64)
    aside, number = StringTableWriter(building, "aside"), 0
    for path in collection:
        for _, record in read_jsonl(path):
            row = find(str(record.get("id")))
            if row is not None and place[row] < 0:
                place[row] = number
                aside.append(str(record.get("contents", "")).encode("utf-8", "replace"))
                number += 1
    aside.close()
    if number < count:
        example = table[int(np.argmin(place))]
        raise ValueError(
            f"{count - number} of {count} passages, for example {example!r}, have no text in the collection"
        )
    texts, contents = load_strings(building, "aside", number), StringTableWriter(building, "contents")
    for row in range(count):
        contents.append(texts.bytes_at(int(place[row])))
    contents.close()
    for name in ("aside.npy", "aside_offsets.npy"):
        (building / name).unlink()
