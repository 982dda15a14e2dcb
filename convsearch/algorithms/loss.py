"""The loss that ``algorithm.*`` and ``actor_rollout_ref.actor.*`` select."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from convsearch.algorithms.clip import clipped_loss
from convsearch.algorithms.gspo import gspo_loss
from convsearch.algorithms.importance import importance_weights
from convsearch.algorithms.kl import kl_penalty
from convsearch.config import GrpoConfig
from convsearch.model.batch import MicroBatch

if TYPE_CHECKING:
    from convsearch.policy.policy import Loss


def grpo_loss(cfg: GrpoConfig) -> "Loss":
    """Policy loss x importance weight + KL coefficient x KL - entropy coefficient x entropy, each token by its weight.

    The reported sums are weighted as the loss is: means over tokens or sequences, but for Dr. GRPO, whose weights do not sum to 1.
    """
    actor, correction, gspo = (
        cfg.actor_rollout_ref.actor,
        cfg.algorithm.rollout_correction,
        cfg.algorithm.loss_mode == "gspo",
    )
    high = actor.clip_ratio if actor.clip_ratio_high is None else actor.clip_ratio_high

    def loss(micro: MicroBatch, logprobs_R: Tensor, entropy_R: Tensor) -> tuple[Tensor, dict[str, float]]:
        old_R = (
            logprobs_R.detach() if micro.old_logprobs_R is None else micro.old_logprobs_R
        )  # on-policy: the ratio is 1
        if gspo:
            policy_R, clipped_R = gspo_loss(
                logprobs_R, old_R, micro.advantages_R, micro.sequence_R, actor.clip_ratio, high
            )
        else:
            policy_R, clipped_R = clipped_loss(logprobs_R, old_R, micro.advantages_R, actor.clip_ratio, high)
        assert micro.sampler_logprobs_R is not None, "rollouts bring their sampler's log-probs"
        sums = {}
        if correction.rollout_is is not None:
            level, cap = correction.rollout_is, correction.rollout_is_threshold
            sums["importance_weight"] = importance_weights(
                old_R, micro.sampler_logprobs_R, micro.sequence_R, level, cap
            )
            policy_R = policy_R * sums["importance_weight"]
        kl_R = torch.zeros_like(policy_R)
        if micro.ref_logprobs_R is not None:
            kl_R = kl_penalty(logprobs_R, micro.ref_logprobs_R, actor.kl_loss_type)
        losses_R = policy_R + actor.kl_loss_coef * kl_R
        if actor.entropy_coeff:  # without a weight its gradient is not computed at all
            losses_R = losses_R - actor.entropy_coeff * entropy_R
        total = (micro.weights_R * losses_R).sum()
        gap_R = (logprobs_R.detach() - micro.sampler_logprobs_R).abs()
        sums |= {
            "policy_loss": policy_R,
            "kl": kl_R,
            "entropy": entropy_R,
            "clip_rate": clipped_R,
            "sampler_gap": gap_R,
        }
        report = {name: float((micro.weights_R * value_R.detach()).sum()) for name, value_R in sums.items()}
        return total, {"loss": float(total.detach()), **report}

    return loss
