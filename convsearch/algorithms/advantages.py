"""Advantages from rewards: each sample is compared with the other samples of its prompt."""

from collections.abc import Sequence

import torch


def group_advantages(
    rewards_N: Sequence[float], group_size: int, *, by_std: bool = True, eps: float = 1e-6
) -> list[float]:
    """(reward - group mean) / (unbiased group std + eps); a group of one keeps its reward, as in verl.

    Args:
        by_std: False: no division (Dr. GRPO, arXiv 2503.20783).

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
