"""Training rows: parquet files -> examples with encoded prompts, and the order in which the trainers draw them."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
from tqdm import tqdm

from convsearch.files import read_jsonl
from convsearch.model.loading import encode_chat
from convsearch.parquet import read_rows
from convsearch.types import Example, Message

T = TypeVar("T")
REMEDY = "write it with data_preprocess (GRPO) or convsearch.distill (SFT)"


def read_examples(paths: Sequence[str], prompt_key: str = "prompt") -> list[Example]:
    """GRPO rows: ``prompt`` (chat messages), ``reward_model.ground_truth`` (gold id or ids), ``extra_info.query_id``
    and ``.question``; for similarity rewards ``extra_info.positives`` (texts), too."""
    examples = []
    for path in paths:
        for number, row in enumerate(read_rows(path, [prompt_key, "reward_model", "extra_info"], remedy=REMEDY)):
            try:
                examples.append(_example(row, prompt_key))
            except (KeyError, TypeError) as error:
                problem = f"field {error} is missing, empty or of the wrong type"
                raise ValueError(f"{path}: row {number} is not of the GRPO form: {problem}") from error
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
    messages: list[Message] = [{key: str(_field(message, key)) for key in ("role", "content")} for message in chat]
    info = row["extra_info"]
    qid, question = str(_field(info, "query_id")), str(_field(info, "question"))
    return Example(qid, tuple(messages), question, golds, tuple(map(str, info.get("positives") or ())))


def _field(record: Any, key: str) -> Any:
    """The value of ``key``; KeyError if it is missing or null, or ``record`` is not an object."""
    value = record.get(key) if isinstance(record, dict) else None
    if value is None:
        raise KeyError(key)
    return value


def encode(
    tokenizer: Any,
    examples: Sequence[Example],
    limit: int,
    *,
    filter_overlong: bool = True,
    truncation: Literal["error", "left", "right"] = "error",
) -> list[Example]:
    """The examples with their ``prompt_ids``, without those above ``limit`` tokens.

    Args:
        filter_overlong: leave longer prompts out; else cut them as ``truncation`` says ("left" keeps the end).

    Raises:
        ValueError: a prompt is longer under truncation "error", or none is left.
    """
    encoded = [
        replace(example, prompt_ids=encode_chat(tokenizer, example.messages))
        for example in tqdm(examples, desc="encoding prompts", unit="prompt", leave=False)
    ]
    kept = fit_length(encoded, limit, filter_overlong, truncation)
    if len(kept) < len(examples):
        dropped = f"{len(examples) - len(kept)} of {len(examples)} prompts"
        print(f"{dropped} are longer than {limit} tokens and are left out")
    return kept


def fit_length(examples: Sequence[Example], limit: int, filter_overlong: bool, truncation: str) -> list[Example]:
    """The length rule of ``encode``."""
    lengths = [len(example.prompt_ids) for example in examples]
    first = next((i for i, length in enumerate(lengths) if length > limit), None)
    if first is None:
        return list(examples)
    if filter_overlong:
        kept = [example for example in examples if len(example.prompt_ids) <= limit]
        if not kept:
            above = f"all {len(examples)} prompts are longer than data.max_prompt_length={limit}"
            raise ValueError(f"{above}; the shortest has {min(lengths)} tokens")
        return kept
    if truncation == "error":
        raise ValueError(
            f"row {first} has {lengths[first]} prompt tokens, above data.max_prompt_length={limit}: "
            "raise it, set data.filter_overlong_prompts=True, or choose data.truncation=left or right"
        )
    cut = slice(-limit, None) if truncation == "left" else slice(limit)
    return [replace(example, prompt_ids=example.prompt_ids[cut]) for example in examples]


def batch_of(rows: Sequence[T], batch_size: int, step: int, seed: int, shuffle: bool = True) -> list[T]:
    """The rows of step ``step`` (from 0). Each epoch is a new permutation and drops its incomplete last batch.

    Raises:
        ValueError: the rows do not fill one batch.
    """
    per_epoch = len(rows) // batch_size
    if per_epoch == 0:
        raise ValueError(f"{len(rows)} rows do not fill one batch of data.train_batch_size={batch_size}; lower it")
    epoch, position = divmod(step, per_epoch)
    order = np.random.default_rng([seed, epoch]).permutation(len(rows)) if shuffle else np.arange(len(rows))
    return [rows[i] for i in order[position * batch_size : (position + 1) * batch_size]]


def middling_first(examples: Sequence[Example], samples: str | Path, seed: int) -> list[Example]:
    """The examples whose warm-up samples have a mean reciprocal rank near 1/2 first; ties in random order.

    Without samples of a model (``--k 0``), the rank is that of the rewrite of ``--names``.

    An example without samples counts like one at 1/4, which is as far from 1/2 as an even spread is on average.

    Args:
        samples: the samples.jsonl of ``convsearch.distill``.

    Raises:
        ValueError: a line has another form, or the file has none of the examples.
    """
    means: dict[str, float] = {}
    for number, record in read_jsonl(samples):
        try:
            ranks = [sample["rank"] for sample in record["samples"] or [record["named"]]]
            means[record["qid"]] = sum(1 / rank for rank in ranks if rank) / len(ranks)
        except (KeyError, TypeError, ZeroDivisionError) as error:
            raise ValueError(
                f"{samples}:{number}: not a line of samples.jsonl, as convsearch.distill writes it"
            ) from error
    if means.keys().isdisjoint(example.qid for example in examples):
        raise ValueError(
            f"data.samples_file={samples} has none of the training prompts: give that of their own warm-up"
        )
    shuffled = batch_of(examples, len(examples), 0, seed)
    return sorted(shuffled, key=lambda example: abs(means.get(example.qid, 0.25) - 0.5))


def stream_of(rows: Sequence[T], batch_size: int, step: int, seed: int, shuffle: bool = True) -> Iterator[T]:
    """The batch of step ``step``, then all other rows in an order that depends only on ``seed`` and ``step``."""

    def others() -> Iterator[T]:
        drawn = set(batch_of(range(len(rows)), batch_size, step, seed, shuffle))
        order = np.random.default_rng([seed, step, 1]).permutation(len(rows))
        yield from (rows[i] for i in order if i not in drawn)

    return chain(batch_of(rows, batch_size, step, seed, shuffle), others())
