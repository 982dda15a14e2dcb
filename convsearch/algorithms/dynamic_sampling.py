"""DAPO's dynamic sampling (arXiv 2503.14476, section 3.2): other prompts for groups whose rewards are all equal."""

from collections.abc import Callable, Iterable
from itertools import islice
from typing import TypeVar

P = TypeVar("P")  # a prompt
G = TypeVar("G")  # a group: a prompt with its samples


def draw_until_spread(
    prompts: Iterable[P],
    count: int,
    draw: Callable[[list[P], int], list[G]],
    has_spread: Callable[[G], bool],
    rounds: int,
) -> list[G]:
    """All groups that were drawn, in order, until ``count`` have spread, ``rounds`` are used up or no prompt is left.

    A round draws as many prompts as groups with spread are missing. So there are at most ``count`` of them.

    Args:
        prompts: the prompts of the step, then those to go on with. None is drawn twice.
        draw: takes prompts and the number of the round (from 0, for another seed).
        has_spread: whether the rewards of a group differ.
        rounds: 1 draws once, as plain GRPO does.
    """
    left, groups = iter(prompts), list[G]()
    for number in range(rounds):
        missing = list(islice(left, count - sum(map(has_spread, groups))))
        if not missing:
            break
        groups += draw(missing, number)
    return groups
