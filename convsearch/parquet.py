"""Reading parquet files, of which ours have a checksum in each page."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq


@contextmanager
def open_parquet(path: str | Path, remedy: str) -> Iterator[pq.ParquetFile]:
    """The file, for a block that reads from it; pages that have a checksum are compared with it.

    Args:
        remedy: the end of the error's sentence.

    Raises:
        ValueError: the file is missing, not parquet, or damaged; names it.
    """
    if not Path(path).is_file():
        raise ValueError(f"{path}: no such file; {remedy}")
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            yield file
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not a parquet file, or damaged ({error}); {remedy}") from error


def read_rows(path: str | Path, columns: Sequence[str] = (), *, remedy: str) -> Iterator[dict[str, Any]]:
    """The rows, block by block; only the named columns if any are named. Raises as ``open_parquet``, or without one."""
    with open_parquet(path, remedy) as file:
        names = file.schema_arrow.names
        for column in columns:
            if column not in names:
                raise ValueError(f"{path}: column {column!r} is missing; it has {', '.join(names)}")
        for field in file.schema_arrow:
            if _has_bytes(field.type):
                raise ValueError(f"{path}: column {field.name!r} has bytes instead of text; {remedy}")
        for block in file.iter_batches(batch_size=1024, columns=[*columns] or None):
            yield from block.to_pylist()


def _has_bytes(kind: pa.DataType) -> bool:
    inner = [kind.field(number).type for number in range(kind.num_fields)]
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or any(map(_has_bytes, inner))
