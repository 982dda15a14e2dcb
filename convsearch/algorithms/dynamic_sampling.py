"""DAPO's dynamic sampling (arXiv 2503.14476, section 3.2): a group whose rewards are all equal teaches nothing and is drawn again."""

from collections.abc import Callable, Sequence
from typing import TypeVar

Sample = TypeVar("Sample")


def groups_without_spread(rewards_N: Sequence[float], n: int) -> list[int]:
    """Positions of the groups (from 0) whose n rewards are all equal."""
    return [p for p in range(len(rewards_N) // n) if len(set(rewards_N[p * n : (p + 1) * n])) == 1]


def draw_with_spread(
    draw: Callable[[list[int], int], list[Sample]],
    reward: Callable[[Sample], float],
    prompts: int,
    n: int,
    max_rounds: int,
) -> list[Sample]:
    """The samples of all prompts, group-major, with groups without spread drawn again until all have one or ``max_rounds`` are spent.

    A prompt keeps its place and its last draw. verl fills up with other prompts instead; here a step trains on the prompts of its own place in the
    data order, so that a resumed run sees what the unbroken one would have seen.

    Args:
        draw: takes the positions of the prompts to draw for and the number of the round (from 0, for another seed); gives n samples each.
        reward: the reward of one sample.
        max_rounds: 1 draws once, like plain GRPO.
    """
    samples_N = draw(list(range(prompts)), 0)
    for number in range(1, max_rounds):
        again_P = groups_without_spread([reward(sample) for sample in samples_N], n)
        if not again_P:
            break
        fresh = draw(again_P, number)
        for place, p in enumerate(again_P):
            samples_N[p * n : (p + 1) * n] = fresh[place * n : (place + 1) * n]
    return samples_N
