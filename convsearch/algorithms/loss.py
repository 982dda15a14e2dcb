"""The loss that ``algorithm.*`` and ``actor_rollout_ref.actor.*`` select."""

from collections.abc import Callable

import torch
from torch import Tensor

from convsearch.algorithms.clip import clipped_loss
from convsearch.algorithms.gspo import gspo_loss
from convsearch.algorithms.importance import importance_weights
from convsearch.algorithms.kl import kl_penalty
from convsearch.algorithms.llds import llds_penalty
from convsearch.config.grpo import ActorConfig, AlgorithmConfig
from convsearch.model.batch import Loss, MicroBatch

PolicyLoss = Callable[[Tensor, Tensor, Tensor, float, float, Tensor], tuple[Tensor, Tensor]]
"""(log-probs, old log-probs, advantages, lower clip, upper clip, sequence numbers) -> (losses, clip active) [R]."""
POLICY_LOSSES: dict[str, PolicyLoss] = {"vanilla": clipped_loss, "gspo": gspo_loss}  # by algorithm.loss_mode


def grpo_loss(actor: ActorConfig, algorithm: AlgorithmConfig) -> Loss:
    """Policy loss x importance weight + KL coefficient x KL + LLDS coefficient x LLDS - entropy coefficient x entropy.

    Each token has a weight.
    The reported sums have the weights of the loss: they are means over tokens or sequences, except under Dr. GRPO,
    whose weights do not sum to 1.
    """
    correction, policy_loss = algorithm.rollout_correction, POLICY_LOSSES[algorithm.loss_mode]
    clips = actor.clip_ratio, actor.clip_ratio if actor.clip_ratio_high is None else actor.clip_ratio_high

    def loss(micro: MicroBatch, logprobs_R: Tensor, entropy_R: Tensor) -> tuple[Tensor, dict[str, float]]:
        # Without old log-probs the update is on-policy and the ratio is 1.
        old_R = logprobs_R.detach() if micro.old_logprobs_R is None else micro.old_logprobs_R
        policy_R, clipped_R = policy_loss(logprobs_R, old_R, micro.advantages_R, *clips, micro.sequence_R)
        sampler_R, sums = micro.sampler_logprobs_R, {}
        assert sampler_R is not None, "rollouts carry the log-probs of their sampler"
        if (level := correction.rollout_is) is not None:
            cap = correction.rollout_is_threshold
            sums["importance_weight"] = importance_weights(old_R, sampler_R, micro.sequence_R, level, cap)
            policy_R = policy_R * sums["importance_weight"]
        kl_R = torch.zeros_like(policy_R)
        if micro.ref_logprobs_R is not None:
            kl_R = kl_penalty(logprobs_R, micro.ref_logprobs_R, actor.kl_loss_type)
        losses_R = policy_R + actor.kl_loss_coef * kl_R
        if actor.llds_coef:
            sums["llds"] = llds_penalty(logprobs_R, old_R, micro.advantages_R, micro.sequence_R)
            losses_R = losses_R + actor.llds_coef * sums["llds"]
        if actor.entropy_coeff:  # with a coefficient of 0 its gradient is not computed at all
            losses_R = losses_R - actor.entropy_coeff * entropy_R
        total = (micro.weights_R * losses_R).sum()
        sums |= {"policy_loss": policy_R, "kl": kl_R, "entropy": entropy_R, "clip_rate": clipped_R}
        sums["sampler_gap"] = (logprobs_R.detach() - sampler_R).abs()
        report = {name: float((micro.weights_R * value_R.detach()).sum()) for name, value_R in sums.items()}
        return total, {"loss": float(total.detach()), **report}

    return loss
