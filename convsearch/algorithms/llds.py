"""LLDS, likelihood-preserving regularisation (arXiv 2512.04220).

The likelihood of good samples falls slowly before GRPO collapses; a penalty holds it up.
"""

import torch
from torch import Tensor

from convsearch.algorithms.gspo import sequence_sums


def llds_penalty(logprobs_R: Tensor, old_logprobs_R: Tensor, advantages_R: Tensor, sequence_R: Tensor) -> Tensor:
    """max(0, old log-prob - log-prob) of each token [R], where its sample has become less likely, else 0.

    Only samples whose advantage is not negative count. The paper's gate is the action (a turn between two searches); a
    sample has one, so that its gates by action and by response are the same here. The formula is the authors' code's
    (vengdeng/LLDS-On-Group-Relative-Policy-Optimization-Collapse-in-Search-R1, verl/workers/actor/dp_actor.py).

    Args:
        sequence_R: number of the sample that each token belongs to, from 0; a micro-batch has whole samples.
    """
    fall_R = old_logprobs_R - logprobs_R
    gate_R = (sequence_sums(fall_R.detach(), sequence_R) > 0) & (advantages_R >= 0)
    return torch.where(gate_R, fall_R.clamp(min=0), 0.0)
