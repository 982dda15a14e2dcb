"""Max-variance down-sampling (PODS, arXiv 2504.13818): draw many samples, train on those whose rewards differ most."""

from collections import Counter
from collections.abc import Sequence
from fractions import Fraction
from itertools import accumulate


def max_variance_subset(rewards_G: Sequence[float], size: int) -> list[int]:
    """The positions, in order, of the ``size`` samples whose rewards have the largest variance.

    Such a subset consists of the lowest and the highest rewards: after sorting, only the split between them is open,
    and prefix sums give the variance of every split, O(G log G) in total. Fractions make it exact. Of splits of equal
    variance the one with the most high rewards is taken, of equal rewards the sample that was drawn first.

    Args:
        size: 1 to G.
    """
    total = len(rewards_G)
    assert 1 <= size <= total, (size, total)
    ordered = sorted(rewards_G)
    values = [Fraction(value) for value in ordered]
    sums = list(accumulate(values, initial=Fraction(0)))
    squares = list(accumulate((value * value for value in values), initial=Fraction(0)))

    def spread(low: int) -> Fraction:
        """size^2 x the variance of the ``low`` lowest and ``size - low`` highest rewards."""
        gap = total - size + low
        middle, middle_squares = sums[gap] - sums[low], squares[gap] - squares[low]
        return size * (squares[total] - middle_squares) - (sums[total] - middle) ** 2

    low = max(range(size + 1), key=spread)
    left = Counter(ordered[:low] + ordered[total - size + low :])
    chosen = []
    for position, reward in enumerate(rewards_G):
        if left[reward]:
            left[reward] -= 1
            chosen.append(position)
    return chosen
