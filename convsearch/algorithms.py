"""GRPO's arithmetic: group advantages, the clipped loss, KL estimators, and the weight of each token in the loss.

Everything is per token and flat: ``_R`` counts the response tokens of a micro-batch, prompts and padding never appear. How a loss is averaged is
a matter of token weights alone (``token_weights``), so packing, micro-batches and ranks cannot change it.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

KlEstimator = Literal["low_var_kl", "kl", "abs", "mse"]
LossAggregation = Literal["token-mean", "micro-batch-mean"]


def group_advantages(rewards_N: Sequence[float], group_size: int, *, by_std: bool = True, eps: float = 1e-6) -> list[float]:
    """(reward - group mean) / (unbiased group std + eps); a group of one keeps its reward, as in verl.

    Args:
        by_std: False leaves the division out (Dr. GRPO).

    Raises:
        ValueError: the rewards do not fill whole groups.
    """
    if group_size < 1 or len(rewards_N) % group_size:
        raise ValueError(f"{len(rewards_N)} rewards do not make whole groups of {group_size}")
    rewards_PG = torch.tensor(list(rewards_N), dtype=torch.float64).view(-1, group_size)
    if group_size == 1:
        advantages_PG = rewards_PG / (1 + eps) if by_std else rewards_PG
    else:
        advantages_PG = rewards_PG - rewards_PG.mean(dim=1, keepdim=True)
        if by_std:
            advantages_PG = advantages_PG / (rewards_PG.std(dim=1, keepdim=True) + eps)
    flat: list[float] = advantages_PG.flatten().tolist()
    return flat


def clipped_loss(
    logprobs_R: Tensor, old_logprobs_R: Tensor, advantages_R: Tensor, clip_low: float, clip_high: float
) -> tuple[Tensor, Tensor]:
    """The clipped policy loss of each token (PPO, equation 7; GRPO, equation 3), and where the clip was active [R] bool.

    The log of the ratio is held to +-20, as in verl: beyond exp(88) float32 is infinite, and its gradient is not a number even where the clip
    is active.
    """
    ratio_R = (logprobs_R - old_logprobs_R).clamp(-20, 20).exp()
    unclipped_R = -advantages_R * ratio_R
    clipped_R = -advantages_R * ratio_R.clamp(1 - clip_low, 1 + clip_high)
    return torch.maximum(unclipped_R, clipped_R), clipped_R > unclipped_R


def kl_penalty(logprobs_R: Tensor, ref_logprobs_R: Tensor, estimator: KlEstimator = "low_var_kl") -> Tensor:
    """A per-token estimate of KL(policy || reference), after Schulman's note "Approximating KL divergence".

    ``low_var_kl`` is k3 = e^d - d - 1 with d = ref - policy, its value clamped to +-10 as the reference's trainer does (d itself to +-20).
    """
    difference_R = logprobs_R - ref_logprobs_R
    if estimator == "kl":
        return difference_R
    if estimator == "abs":
        return difference_R.abs()
    if estimator == "mse":
        return 0.5 * difference_R.square()
    if estimator != "low_var_kl":
        raise ValueError(f"KL estimator {estimator!r} is not one of low_var_kl, kl, abs, mse")
    d_R = (-difference_R).clamp(-20, 20)
    return (d_R.exp() - d_R - 1).clamp(-10, 10)


def token_weights(lengths_N: Sequence[int], aggregation: LossAggregation, micro_batch_size: int = 8) -> list[float]:
    """The weight of every token of each sequence, so that ``sum(weight x loss)`` over all tokens is the loss.

    ``token-mean``: one over the tokens of the whole mini-batch. ``micro-batch-mean`` (the paper's): the token mean of each run of
    ``micro_batch_size`` sequences, then the mean of those means; short micro-batches count as much as long ones.
    """
    if aggregation == "token-mean":
        return [1 / max(1, sum(lengths_N))] * len(lengths_N)
    if aggregation != "micro-batch-mean":
        raise ValueError(f"loss aggregation {aggregation!r} is not one of token-mean, micro-batch-mean")
    chunks = [lengths_N[i : i + micro_batch_size] for i in range(0, len(lengths_N), micro_batch_size)]
    return [1 / (len(chunks) * max(1, sum(chunk))) for chunk in chunks for _ in chunk]
