"""The clipped policy loss of a token: PPO's and GRPO's; with a higher upper clip DAPO's (arXiv 2503.14476)."""

import torch
from torch import Tensor


def clipped_loss(
    logprobs_R: Tensor, old_logprobs_R: Tensor, advantages_R: Tensor, clip_low: float, clip_high: float
) -> tuple[Tensor, Tensor]:
    """The clipped policy loss of each token (PPO, equation 7; GRPO, equation 3), and where the clip was active [R] bool.

    The log of the ratio is held to +-20, as in verl: beyond exp(88) float32 is infinite, and its gradient is not a number even where the clip
    is active.
    """
    return clip((logprobs_R - old_logprobs_R).clamp(-20, 20).exp(), advantages_R, clip_low, clip_high)


def clip(ratio_R: Tensor, advantages_R: Tensor, clip_low: float, clip_high: float) -> tuple[Tensor, Tensor]:
    """The worse of the losses with and without the clip, and where the clip's is worse [R] bool."""
    unclipped_R = -advantages_R * ratio_R
    clipped_R = -advantages_R * ratio_R.clamp(1 - clip_low, 1 + clip_high)
    return torch.maximum(unclipped_R, clipped_R), clipped_R > unclipped_R
