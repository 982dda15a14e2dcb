"""Columns out of TREC files without a Python loop a line: pyarrow reads what is well formed, a plain loop finds what is not."""

import gzip
import re
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

LINE_LIMIT, ID_LIMIT = 1 << 20, 4096  # bytes
_BLOCK = 1 << 18
GRADE_LIMIT = 1 << 31
_LINE = re.compile(rb"[^\r\n]+")  # carriage returns end lines too, as they do for pyarrow
_TEXT = re.compile(rb"\S")


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
    query_of_row: npt.NDArray[np.int64]  # [rows]
    docids: Any  # pyarrow.LargeStringArray, [rows]
    values: npt.NDArray[Any]  # [rows], float64 scores or int64 grades


def load(path: str | Path) -> Any:
    """The file's bytes as a pyarrow buffer: memory-mapped, or unpacked where it is gzipped (whatever its name).

    Raises:
        ValueError: the file is empty or its gzip stream is damaged.
    """
    import pyarrow as pa

    path = Path(path)
    mappable = path.is_file() and path.stat().st_size > 0  # neither empty nor a pipe
    raw = pa.memory_map(str(path)).read_buffer() if mappable else pa.py_buffer(path.read_bytes())
    if raw.size >= 2 and raw[:2].to_pybytes() == b"\x1f\x8b":
        try:
            raw = pa.py_buffer(gzip.decompress(raw))
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise ValueError(f"{path}: the gzip stream is damaged or cut short ({error}): write the file again") from error
    if not _TEXT.search(raw):
        raise ValueError(f"{path} is empty: it has no line")
    return raw[3:] if raw[:3].to_pybytes() == b"\xef\xbb\xbf" else raw


def parse(path: str | Path, raw: Any, form: Format) -> Columns:
    """Reads the lines of a run or of qrels.

    Raises:
        ValueError: a line has a wrong number of columns, is not UTF-8, too long, or its value is no finite number; names file and line.
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
    """The columns by pyarrow, or None where something is wrong or unusual, which the slow reader then names or reads."""
    import pyarrow as pa
    from pyarrow import csv

    if not _is_plain(np.frombuffer(raw, np.uint8)):
        raw = pa.py_buffer(_normalised(raw))
    first = _LINE.search(raw)
    width = len(first[0].split(b" ")) if first else 0
    if width not in form.columns:
        return None
    names = [str(number) for number in range(width)]
    value = names[form.value_column]
    try:
        table = csv.read_csv(
            pa.BufferReader(raw),
            read_options=csv.ReadOptions(column_names=names),
            parse_options=csv.ParseOptions(delimiter=" ", quote_char=False, double_quote=False, escape_char=False),
            convert_options=csv.ConvertOptions(
                include_columns=["0", "2", value],
                column_types={
                    "0": pa.dictionary(pa.int32(), pa.string()),
                    "2": pa.large_string(),
                    value: pa.int64() if form.integer else pa.float64(),
                },
                null_values=[],
            ),
        )
    except pa.ArrowInvalid:
        return None
    queries = table["0"].unify_dictionaries().combine_chunks()
    qids = queries.dictionary.cast(pa.large_string())
    docids, values = table["2"].combine_chunks(), table[value].combine_chunks()
    if not _ids_are_sane(qids) or not _ids_are_sane(docids) or values.null_count or not _in_range(values.to_numpy()):
        return None
    return Columns(qids, queries.indices.to_numpy().astype(np.int64), docids, values.to_numpy())


def _is_plain(data: npt.NDArray[np.uint8]) -> bool:
    """Whether single spaces part the columns and single newlines the lines, with no other control characters."""
    if data[0] <= 32:
        return False
    for start in range(0, len(data), _BLOCK):
        block = data[start : start + _BLOCK + 1]
        blank = block <= 32
        if (blank[1:] & blank[:-1]).any() or ((block < 32) & (block != 10)).any():
            return False
    return True


def _normalised(raw: Any) -> bytes:
    """The same rows in plain form. Line numbers are lost: errors are told from the original."""
    data = re.sub(rb"[ \t\v\f]+", b" ", raw)
    return re.sub(rb" ?[\r\n][ \r\n]*", b"\n", data).strip(b" \n") + b"\n"


def _ids_are_sane(ids: Any) -> bool:
    import pyarrow.compute as pc

    longest, shortest = pc.max(pc.binary_length(ids)).as_py(), pc.min(pc.binary_length(ids)).as_py()
    return bool(longest <= ID_LIMIT and shortest > 0)


def _in_range(values: npt.NDArray[Any]) -> bool:
    """Whether all scores are finite in float32, the precision in which trec_eval compares them, or all grades are small."""
    if values.dtype.kind == "i":
        return bool(((values > -GRADE_LIMIT) & (values < GRADE_LIMIT)).all())
    with np.errstate(over="ignore"):
        return bool(np.isfinite(values.astype(np.float32)).all())


def _slow(path: str | Path, raw: Any, form: Format) -> Columns:
    """Line by line: raises at the first fault, else returns what pyarrow was too strict for (a score written +1.5)."""
    import pyarrow as pa

    queries: dict[str, int] = {}
    rows, docids, values = [], [], []
    width, first = 0, 0
    for number, line in enumerate(raw.to_pybytes().splitlines(), start=1):
        where = f"{path}:{number}"
        if len(line) > LINE_LIMIT:
            raise ValueError(f"{where}: a line of {len(line):,} bytes, where at most {LINE_LIMIT:,} are read: this is no {form.noun} file")
        fields = _fields(where, line, form)
        if not fields:
            continue
        if len(fields) not in form.columns:
            raise ValueError(f"{where}: found {_count(len(fields))} where a line of a {form.noun} file has {form.expected}")
        width, first = width or len(fields), first or number
        if len(fields) != width:
            raise ValueError(f"{where}: found {_count(len(fields))} where line {first} has {width}: give all lines the same form")
        for name, text in (("qid", fields[0]), ("docid", fields[2])):
            if len(text.encode()) > ID_LIMIT:
                raise ValueError(f"{where}: a {name} of {len(text.encode()):,} bytes, where at most {ID_LIMIT:,} are read")
        rows.append(queries.setdefault(fields[0], len(queries)))
        docids.append(fields[2])
        values.append(_value(where, fields[form.value_column], form))
    return Columns(
        pa.array(queries, pa.large_string()),
        np.array(rows, np.int64),
        pa.array(docids, pa.large_string()),
        np.array(values, np.int64 if form.integer else np.float64),
    )


def _fields(where: str, line: bytes, form: Format) -> list[str]:
    if b"\0" in line:
        raise ValueError(f"{where}: holds a NUL byte: this is a binary file (or UTF-16), not the text of a {form.noun} file")
    try:
        return [field.decode() for field in line.split()]
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: not UTF-8 ({error.reason}): this is a binary file, or needs to be converted") from error


def _count(columns: int) -> str:
    return f"{columns} column" if columns == 1 else f"{columns} columns"


def _value(where: str, text: str, form: Format) -> float | int:
    try:
        value = int(text) if form.integer else float(text)
    except ValueError as error:
        kind = "a whole number" if form.integer else "a number"
        raise ValueError(f"{where}: the {form.value_name} must be {kind}, got {text[:40]!r}") from error
    return checked_value(where, value, form)


def checked_value(where: str, value: float | int, form: Format) -> float | int:
    """``value`` itself; ValueError where a score is not finite in float32, or a grade is out of all proportion."""
    if form.integer and abs(value) >= GRADE_LIMIT:
        raise ValueError(f"{where}: the grade must lie within +-{GRADE_LIMIT - 1:,}, got {value}")
    if not form.integer and not _in_range(np.array([value], np.float64)):
        raise ValueError(f"{where}: the score must be a finite number within the range of float32, got {value!r}")
    return value
