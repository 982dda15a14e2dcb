"""The clipped policy loss per token: that of PPO and GRPO; with a higher upper clip that of DAPO (arXiv 2503.14476)."""

import torch
from torch import Tensor


def clipped_loss(
    logprobs_R: Tensor,
    old_logprobs_R: Tensor,
    advantages_R: Tensor,
    clip_low: float,
    clip_high: float,
    sequence_R: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The clipped policy loss of each token (PPO, equation 7; GRPO, equation 3), and where the clip is active [R] bool.

    The log of the ratio is clamped to +-20, as in verl: exp(x) is infinite in float32 for x > 88, and its gradient is
    NaN even where the clip is active. ``sequence_R`` is not used: all policy losses have the same arguments.
    """
    return clip((logprobs_R - old_logprobs_R).clamp(-20, 20).exp(), advantages_R, clip_low, clip_high)


def clip(ratio_R: Tensor, advantages_R: Tensor, clip_low: float, clip_high: float) -> tuple[Tensor, Tensor]:
    """The larger of the losses with and without the clip, and where the one with the clip is larger [R] bool."""
    unclipped_R = -advantages_R * ratio_R
    clipped_R = -advantages_R * ratio_R.clamp(1 - clip_low, 1 + clip_high)
    return torch.maximum(unclipped_R, clipped_R), clipped_R > unclipped_R
