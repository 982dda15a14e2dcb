"""Learning rates."""

import math


def lr_at(
    step: int, total_steps: int, base_lr: float, warmup_steps: int, kind: str = "constant", min_ratio: float = 0.0
) -> float:
    """The learning rate of step ``step`` (from 0): a linear rise over ``warmup_steps``, then constant or a half cosine.

    The first step of a warm-up already learns: step s of w has (s + 1) / w of the rate.
    """
    if step < warmup_steps:
        return base_lr * (step + 1) / warmup_steps
    if kind == "constant":
        return base_lr
    if kind != "cosine":
        raise ValueError(f"lr scheduler {kind!r} is not one of constant, cosine")
    done = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return base_lr * (min_ratio + (1 - min_ratio) * 0.5 * (1 + math.cos(math.pi * min(1.0, done))))
