"""Columns of TREC files without a Python loop over lines.

pyarrow reads what is well formed; a plain loop reads the rest and finds the faults.
"""

import gzip
import re
import zlib
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import csv

LINE_LIMIT, ID_LIMIT = 1 << 20, 4096  # bytes
_ROWS = 1 << 14
_KEEP = np.array([(1 << (8 * count)) - 1 for count in range(9)], np.uint64)  # masks of a word's first 0 to 8 bytes
GRADE_LIMIT = 1 << 31
_LINE = re.compile(rb"[^\r\n]+")  # carriage returns end lines too, as they do for pyarrow
_PLAIN = bytes.maketrans(b"\t\v\f\r", b"   \n")
_TEXT = re.compile(rb"\S")
_WHOLE = re.compile(rb"-?\d+")


@dataclass(frozen=True, slots=True)
class Format:
    """The shape of one kind of file: which column counts it may have, and which column holds the value."""

    noun: str
    columns: tuple[int, ...]
    value_column: int
    value_name: str
    integer: bool
    expected: str


RUN = Format("run", (6, 7), 4, "score", False, "6 (qid Q0 docid rank score tag), or the reference's 7")
QRELS = Format("qrels", (4,), 3, "grade", True, "4 (qid 0 docid grade)")


@dataclass(frozen=True, slots=True)
class Columns:
    """Rows (qid, docid, value) in file order; ``query_of_row`` points into the distinct ``qids``.

    ``Columns(qids=["q1", "q2"], query_of_row=[0, 0, 1], docids=["d1", "d2", "d1"], values=[2.5, 1.0, 7.0])``
    """

    qids: Any  # pyarrow.LargeStringArray, [queries], in order of first appearance
    query_of_row: npt.NDArray[np.int32]  # [rows]
    docids: Any  # pyarrow.LargeStringArray, [rows]
    docid_hashes: npt.NDArray[np.uint64]  # [rows]; equal docids have equal hashes, others hardly ever
    values: npt.NDArray[Any]  # [rows], float64 scores or int64 grades


def columns_of(qids: Iterable[str], rows: Sequence[int], docids: Sequence[str], values: Any, form: Format) -> Columns:
    """The columns of plain lists; ``rows`` is ``query_of_row``."""
    texts, numbers = pa.array(docids, pa.large_string()), np.array(values, np.int64 if form.integer else np.float64)
    return Columns(pa.array(list(qids), pa.large_string()), np.asarray(rows, np.int32), texts, _hashes(texts), numbers)


def _hashes(texts: Any) -> npt.NDArray[np.uint64]:
    """A 64-bit hash of each string of a pyarrow.LargeStringArray, eight bytes of all of them at a time."""
    offsets = np.frombuffer(texts.buffers()[1], np.int64)[texts.offset : texts.offset + len(texts) + 1]
    text = np.frombuffer(texts.buffers()[2] or b"", np.uint8)
    padded = np.zeros(len(text) + 8, np.uint8)
    padded[: len(text)] = text
    words = np.ndarray((len(text) + 1,), "<u8", padded, strides=(1,))  # the eight bytes from each byte on
    hashes = np.diff(offsets).view(np.uint64)
    for first in range(0, len(texts), _ROWS):  # few enough rows at a time to stay in the cache
        block, starts = hashes[first : first + _ROWS], offsets[:-1][first : first + _ROWS]
        lengths = block.astype(np.int64)
        for done in range(0, int(lengths.max()), 8):
            live = np.flatnonzero(lengths > done) if done else slice(None)
            mixed = block[live] ^ (words[starts[live] + done] & _KEEP[np.minimum(lengths[live] - done, 8)])
            mixed *= np.uint64(0xFF51_AFD7_ED55_8CCD)
            block[live] = mixed ^ (mixed >> np.uint64(32))
    return hashes


def load(path: str | Path) -> Any:
    """The file's bytes as a pyarrow buffer: memory-mapped, or unpacked if it is gzipped (whatever its name).

    Raises:
        ValueError: the file is empty or its gzip stream is damaged.
    """
    path = Path(path)
    mappable = path.is_file() and path.stat().st_size > 0  # neither empty nor a pipe
    raw = pa.memory_map(str(path)).read_buffer() if mappable else pa.py_buffer(path.read_bytes())
    if raw.size >= 2 and raw[:2].to_pybytes() == b"\x1f\x8b":
        try:
            raw = pa.py_buffer(gzip.decompress(raw))
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            problem = "the gzip stream is damaged or cut short"
            raise ValueError(f"{path}: {problem} ({error}): write the file again") from error
    if not _TEXT.search(raw):
        raise ValueError(f"{path} is empty: it has no line")
    return raw[3:] if raw[:3].to_pybytes() == b"\xef\xbb\xbf" else raw


def parse(path: str | Path, raw: Any, form: Format) -> Columns:
    """Reads the lines of a run or of qrels.

    Raises:
        ValueError: a line has a wrong number of columns, is not UTF-8, too long, or its value is no finite number;
            names file and line.
    """
    columns = _fast(raw, form)
    return columns if columns is not None else _slow(path, raw, form)


def line_of_row(raw: Any, row: int) -> int:
    """The number, from 1, of the line that holds row ``row`` (from 0); blank lines are no rows."""
    rows = -1
    for number, line in enumerate(raw.to_pybytes().splitlines(), start=1):
        rows += bool(line.split())
        if rows == row:
            return number
    raise AssertionError(f"no row {row} among {rows + 1}")


def _fast(raw: Any, form: Format) -> Columns | None:
    """The columns by pyarrow, or None if something is wrong or unusual, which the slow reader then names or reads."""
    columns = _by_arrow(raw, form)
    return columns if columns is not None else _by_arrow(pa.py_buffer(_normalised(raw)), form)


def _by_arrow(raw: Any, form: Format) -> Columns | None:
    """The columns if single spaces separate them; None if anything is wrong."""
    first = _LINE.search(raw)
    fields = first[0].split(b" ") if first else []
    if len(fields) not in form.columns:
        return None
    names = [str(number) for number in range(len(fields))]
    value = names[form.value_column]
    # the reference's seven columns have whole numbers, which are read faster
    kinds = [pa.int64()] if form.integer or _WHOLE.fullmatch(fields[form.value_column]) else []
    kinds += [] if form.integer else [pa.float64()]
    table = None
    for kind in kinds:
        types = dict.fromkeys(names[: form.value_column], pa.binary())
        types |= {"0": pa.dictionary(pa.int32(), pa.string()), "2": pa.large_string(), value: kind}
        with suppress(pa.ArrowInvalid):
            table = csv.read_csv(
                pa.BufferReader(raw),
                csv.ReadOptions(column_names=names),
                csv.ParseOptions(delimiter=" ", quote_char=False, double_quote=False, escape_char=False),
                csv.ConvertOptions(include_columns=[*types], column_types=types, null_values=[], check_utf8=False),
            )
            break
    if table is None:
        return None
    queries = table["0"].unify_dictionaries().combine_chunks()
    qids, docids = queries.dictionary.cast(pa.large_string()), table["2"].combine_chunks()
    values = table[value].combine_chunks().to_numpy().astype(np.int64 if form.integer else np.float64, copy=False)
    with ThreadPoolExecutor(1) as pool:  # while this thread checks
        hashes = pool.submit(_hashes, docids)
        shifted = any(_shortest(table[name]) == 0 for name in ("1", "3") if name != value)  # two spaces in a row
        sound = not shifted and _are_words(qids) and _are_words(docids) and _in_range(values)
    return Columns(qids, queries.indices.to_numpy(), docids, hashes.result(), values) if sound else None


def _shortest(texts: Any) -> int:
    """The least length of a binary column, in bytes."""
    length: int = pc.min(pc.binary_length(texts)).as_py()
    return length


def _normalised(raw: Any) -> bytes:
    """The same rows with single spaces and newlines. Line numbers are lost: error messages use the original."""
    data: bytes = raw.to_pybytes().translate(_PLAIN)
    while b"  " in data:
        data = data.replace(b"  ", b" ")
    return data.replace(b" \n", b"\n").replace(b"\n ", b"\n").strip(b" \n")  # pyarrow passes over empty lines


def _are_words(ids: Any) -> bool:
    """Whether no string is empty, too long, not UTF-8, or has white space or control characters."""
    lengths = pc.min_max(pc.binary_length(ids)).as_py()
    if lengths["min"] == 0 or lengths["max"] > ID_LIMIT:
        return False
    text = np.frombuffer(ids.buffers()[2], np.int8)
    if text.min() > 32:  # bytes beyond ASCII are negative here
        return True
    try:
        ids.validate(full=True)
    except pa.ArrowInvalid:
        return False
    return bool(text.view(np.uint8).min() > 32)


def _in_range(values: npt.NDArray[Any]) -> bool:
    """Whether all scores are finite in float32, in which trec_eval compares them, or all grades are small."""
    if values.dtype.kind == "i":
        return bool(((values > -GRADE_LIMIT) & (values < GRADE_LIMIT)).all())
    with np.errstate(over="ignore"):
        return bool(np.isfinite(np.array([values.min(), values.max()], np.float32)).all())  # a NaN is both


def _slow(path: str | Path, raw: Any, form: Format) -> Columns:
    """Line by line: raises at the first fault, else returns what pyarrow was too strict for (a score written +1.5)."""
    queries: dict[str, int] = {}
    rows, docids, values = [], [], []
    width, first = 0, 0
    for number, line in enumerate(raw.to_pybytes().splitlines(), start=1):
        where = f"{path}:{number}"
        if len(line) > LINE_LIMIT:
            long = f"a line of {len(line):,} bytes, where at most {LINE_LIMIT:,} are read"
            raise ValueError(f"{where}: {long}: this is no {form.noun} file")
        fields = _fields(where, line, form)
        if not fields:
            continue
        found = f"{where}: found {len(fields)} column{'s' * (len(fields) != 1)}"
        if len(fields) not in form.columns:
            raise ValueError(f"{found} where a line of a {form.noun} file has {form.expected}")
        width, first = width or len(fields), first or number
        if len(fields) != width:
            raise ValueError(f"{found} where line {first} has {width}: give all lines the same form")
        for name, text in (("qid", fields[0]), ("docid", fields[2])):
            size = len(text.encode())
            if size > ID_LIMIT:
                raise ValueError(f"{where}: a {name} of {size:,} bytes, where at most {ID_LIMIT:,} are read")
        rows.append(queries.setdefault(fields[0], len(queries)))
        docids.append(fields[2])
        values.append(_value(where, fields[form.value_column], form))
    return columns_of(queries, rows, docids, values, form)


def _fields(where: str, line: bytes, form: Format) -> list[str]:
    if b"\0" in line:
        kind = f"a binary file (or UTF-16), not the text of a {form.noun} file"
        raise ValueError(f"{where}: has a NUL byte: this is {kind}")
    try:
        return [field.decode() for field in line.split()]
    except UnicodeDecodeError as error:
        remedy = "this is a binary file, or needs to be converted"
        raise ValueError(f"{where}: not UTF-8 ({error.reason}): {remedy}") from error


def _value(where: str, text: str, form: Format) -> float | int:
    try:
        value = int(text) if form.integer else float(text)
    except ValueError as error:
        kind = "a whole number" if form.integer else "a number"
        raise ValueError(f"{where}: the {form.value_name} must be {kind}, got {text[:40]!r}") from error
    return checked_value(where, value, form)


def checked_value(where: str, value: float | int, form: Format) -> float | int:
    """``value``; ValueError if a score is not finite in float32, or a grade is far too large."""
    if form.integer and abs(value) >= GRADE_LIMIT:
        raise ValueError(f"{where}: the grade must be within +-{GRADE_LIMIT - 1:,}, got {value}")
    if not form.integer and not _in_range(np.array([value], np.float64)):
        raise ValueError(f"{where}: the score must be a finite number within the range of float32, got {value!r}")
    return value
