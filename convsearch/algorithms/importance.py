"""Truncated importance sampling: a correction for samples that another policy drew than the one that learns from them.

A sampler's weights may be one step old (one-step-off-policy), and another engine's arithmetic differs from the
trainer's even with equal weights. The loss of each token is multiplied by its probability under the policy before the
update / its probability under the sampler (Yao et al. 2025, "Your efficient RL framework secretly brings you off-policy
RL training"; verl's ``rollout_correction``).
"""

from typing import Literal

from torch import Tensor

from convsearch.algorithms.gspo import sequence_sums

Level = Literal["token", "sequence"]


def importance_weights(
    old_logprobs_R: Tensor, sampler_logprobs_R: Tensor, sequence_R: Tensor, level: Level, cap: float
) -> Tensor:
    """min(pi_old / pi_sampler, cap) per token or sequence, without gradient. The log is clamped to +-20, as in verl."""
    log_ratio_R = (old_logprobs_R - sampler_logprobs_R).detach()
    if level == "sequence":
        log_ratio_R = sequence_sums(log_ratio_R, sequence_R)
    return log_ratio_R.clamp(-20, 20).exp().clamp(max=cap)
