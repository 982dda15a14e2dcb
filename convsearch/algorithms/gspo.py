"""GSPO (arXiv 2507.18071): one length-normalised ratio per sequence, clipped per sequence."""

import torch
from torch import Tensor

from convsearch.algorithms.clip import clip


def gspo_loss(
    logprobs_R: Tensor,
    old_logprobs_R: Tensor,
    advantages_R: Tensor,
    clip_low: float,
    clip_high: float,
    sequence_R: Tensor,
) -> tuple[Tensor, Tensor]:
    """The policy loss of each token under the ratio of its sequence, and where the clip is active [R] bool.

    The value is that of s = exp(mean over the sequence of log-ratios). The gradient flows through each token's own
    log-probability (equation 14, GSPO-token; with one advantage per sequence it equals the gradient of the sequence).
    log s is clamped to at most 10, as in verl.

    Args:
        sequence_R: number of the sequence that each token belongs to, from 0; a micro-batch has whole sequences.
    """
    log_ratio_R = (logprobs_R - old_logprobs_R).detach()
    mean_R = sequence_sums(log_ratio_R, sequence_R) / sequence_sums(torch.ones_like(log_ratio_R), sequence_R)
    return clip((logprobs_R - logprobs_R.detach() + mean_R).clamp(max=10).exp(), advantages_R, clip_low, clip_high)


def sequence_sums(values_R: Tensor, sequence_R: Tensor) -> Tensor:
    """For each token the sum of the values over its sequence [R]."""
    sums_S = values_R.new_zeros(int(sequence_R.max()) + 1 if len(sequence_R) else 0).index_add(0, sequence_R, values_R)
    return sums_S[sequence_R]
