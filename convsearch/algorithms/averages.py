"""How token losses become one number: one weight per token; the loss is ``sum(weight x loss)`` over all tokens."""

from collections.abc import Sequence
from typing import Literal, get_args

LossAggregation = Literal["token-mean", "micro-batch-mean", "seq-mean-token-mean", "seq-mean-token-sum-norm"]


def token_weights(
    lengths_N: Sequence[int], aggregation: LossAggregation, micro_batch_size: int = 8, scale: float = 1.0
) -> list[float]:
    """The weight of every token of each sequence of a mini-batch.

    * ``token-mean`` (DAPO): 1 / number of tokens of the mini-batch.
    * ``micro-batch-mean`` (the paper's code): the token mean of each ``micro_batch_size`` consecutive sequences, then
      the
      mean of those means; short micro-batches count as much as long ones.
    * ``seq-mean-token-mean`` (GRPO as published, GSPO): the token mean of each sequence, then their mean.
    * ``seq-mean-token-sum-norm`` (Dr. GRPO): the token sum of each sequence / the constant ``scale``, then their mean.
    """
    count = max(1, len(lengths_N))
    if aggregation == "token-mean":
        return [1 / max(1, sum(lengths_N))] * len(lengths_N)
    if aggregation == "seq-mean-token-mean":
        return [1 / (count * max(1, length)) for length in lengths_N]
    if aggregation == "seq-mean-token-sum-norm":
        return [1 / (count * scale)] * len(lengths_N)
    if aggregation != "micro-batch-mean":
        raise ValueError(f"loss aggregation {aggregation!r} is not one of {', '.join(get_args(LossAggregation))}")
    chunks = [lengths_N[i : i + micro_batch_size] for i in range(0, len(lengths_N), micro_batch_size)]
    return [1 / (len(chunks) * max(1, sum(chunk))) for chunk in chunks for _ in chunk]
