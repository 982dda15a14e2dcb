"""DAPO's dynamic sampling (arXiv 2503.14476, section 3.2): groups whose rewards are all equal are drawn again."""

from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")  # a group: a prompt with its samples


def draw_until_spread(
    draw: Callable[[list[int], int], list[T]], has_spread: Callable[[T], bool], prompts: int, max_rounds: int
) -> list[T]:
    """One group per prompt. Groups without spread are drawn again until all have spread or ``max_rounds`` are used up.

    A prompt keeps its position and its last draw. verl takes other prompts instead; here a step trains on the prompts
    of its own position in the data order, so that a resumed run sees the same prompts as an uninterrupted one.

    Args:
        draw: takes the positions of the prompts to draw for and the number of the round (from 0, for another seed).
        has_spread: whether the rewards of a group differ.
        max_rounds: 1 draws once, as plain GRPO does.
    """
    groups_P = draw(list(range(prompts)), 0)
    for number in range(1, max_rounds):
        again_P = [p for p, group in enumerate(groups_P) if not has_spread(group)]
        if not again_P:
            break
        for p, group in zip(again_P, draw(again_P, number), strict=True):
            groups_P[p] = group
    return groups_P
