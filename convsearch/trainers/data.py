"""Parquet -> training rows, in an order that depends on nothing but the seed and the epoch."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from convsearch.files import read_jsonl
from convsearch.types import Conversation, Example, Message


def read_conversations(path: str | Path) -> list[Conversation]:
    """Reads a conversations file (JSON lines); faults are ValueErrors with file and line."""
    conversations = []
    for number, record in read_jsonl(path):
        try:
            conversations.append(Conversation.from_record(record))
        except ValueError as error:
            raise ValueError(f"{path}:{number}: {error}") from error
    return conversations


def read_parquet(path: str | Path, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Rows of a parquet file.

    Raises:
        ValueError: there is no such file, it is not parquet, or a column is missing; names file and column.
    """
    if not Path(path).is_file():
        raise ValueError(f"{path}: no such file; write it with data_preprocess (GRPO) or convsearch.distill (SFT)")
    try:
        table = pq.ParquetFile(path)
    except (OSError, pa.ArrowInvalid) as error:
        raise ValueError(f"{path}: not a parquet file ({error})") from error
    names = table.schema_arrow.names
    for column in columns:
        if column not in names:
            raise ValueError(f"{path}: column {column!r} is missing; it has {', '.join(names)}")
    for batch in table.iter_batches(columns=list(columns)):
        yield from batch.to_pylist()


def read_examples(paths: Sequence[str], prompt_key: str = "prompt") -> list[Example]:
    """GRPO rows: ``prompt`` (chat messages), ``reward_model.ground_truth`` (gold id or ids), ``extra_info.query_id`` and ``.question``, and,
    where similarities are paid for, ``extra_info.positives`` (texts)."""
    examples = []
    for path in paths:
        for number, row in enumerate(read_parquet(path, [prompt_key, "reward_model", "extra_info"])):
            try:
                examples.append(_example(row, prompt_key))
            except (KeyError, TypeError) as error:
                raise ValueError(
                    f"{path}: row {number} is not of the GRPO form: field {error} is missing, empty or of the wrong type"
                ) from error
    if not examples:
        raise ValueError(f"{', '.join(map(str, paths))}: no rows")
    return examples


def _example(row: dict[str, Any], prompt_key: str) -> Example:
    truth = _field(row["reward_model"], "ground_truth")
    golds = (truth,) if isinstance(truth, str) else tuple(str(docid) for docid in truth)
    chat = _field(row, prompt_key)
    if isinstance(chat, str):
        raise TypeError(repr(prompt_key))
    if not truth or not chat:
        raise KeyError(prompt_key if truth else "ground_truth")
    messages: tuple[Message, ...] = tuple(
        {"role": str(_field(m, "role")), "content": str(_field(m, "content"))} for m in chat
    )
    info = row["extra_info"]
    positives = info.get("positives") or () if isinstance(info, dict) else ()
    return Example(
        str(_field(info, "query_id")), messages, str(_field(info, "question")), golds, tuple(map(str, positives))
    )


def _field(record: Any, key: str) -> Any:
    """The value under ``key``; KeyError where it is missing or null, or ``record`` is no object."""
    value = record.get(key) if isinstance(record, dict) else None
    if value is None:
        raise KeyError(key)
    return value


def fit_length(lengths: Sequence[int], limit: int, filter_overlong: bool, truncation: str) -> list[int]:
    """Indices of the rows to keep under ``limit`` prompt tokens.

    Raises:
        ValueError: a row is longer, ``filter_overlong`` is off and ``truncation`` is "error"; or none is left.
    """
    overlong = [i for i, length in enumerate(lengths) if length > limit]
    if overlong and not filter_overlong and truncation == "error":
        raise ValueError(
            f"row {overlong[0]} has {lengths[overlong[0]]} prompt tokens, above data.max_prompt_length={limit}: "
            "raise it, set data.filter_overlong_prompts=True, or choose data.truncation=left or right"
        )
    dropped = set(overlong) if filter_overlong else set()
    kept = [i for i in range(len(lengths)) if i not in dropped]
    if not kept:
        raise ValueError(
            f"all {len(lengths)} prompts are longer than data.max_prompt_length={limit}; the shortest has {min(lengths)} tokens"
        )
    return kept


def truncate(ids: tuple[int, ...], limit: int, side: str) -> tuple[int, ...]:
    """Cuts at the named end: ``left`` keeps the last ``limit`` tokens, ``right`` the first."""
    return ids if len(ids) <= limit else ids[len(ids) - limit :] if side == "left" else ids[:limit]


def batch_indices(num_items: int, batch_size: int, step: int, seed: int, shuffle: bool = True) -> list[int]:
    """The rows of optimiser step ``step`` (from 0); an epoch is a fresh permutation and drops its incomplete last batch.

    Raises:
        ValueError: there are fewer rows than one batch holds.
    """
    per_epoch = num_items // batch_size
    if per_epoch == 0:
        raise ValueError(f"{num_items} rows do not fill one batch of data.train_batch_size={batch_size}; lower it")
    epoch, position = divmod(step, per_epoch)
    order = np.random.default_rng([seed, epoch]).permutation(num_items) if shuffle else np.arange(num_items)
    return [int(i) for i in order[position * batch_size : (position + 1) * batch_size]]
