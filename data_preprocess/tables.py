"""Rows of parquet files as records, a block at a time."""

from collections.abc import Iterator, Sequence

from data_preprocess.sources import Record, Source

ROWS = 1024  # a block


def read_parquet_records(source: Source, columns: Sequence[str] | None = None) -> Iterator[Record]:
    """Yields the rows, of the named columns alone where some are named.

    Raises:
        ValueError: it is no parquet file, or lacks a column; names it.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(source.path)
    except (OSError, pa.ArrowInvalid) as error:
        raise ValueError(f"{source}: not a parquet file ({error})") from error
    with file:
        names = file.schema_arrow.names
        for column in columns or ():
            if column not in names:
                raise ValueError(f"{source}: column {column!r} is missing; it has {', '.join(names)}")
        number = 0
        for batch in file.iter_batches(batch_size=ROWS, columns=list(columns) if columns else None):
            for row in batch.to_pylist():
                number += 1
                yield Record(row, f"{source}: row {number}")
