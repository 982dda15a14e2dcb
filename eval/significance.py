"""Paired statistics over queries: bootstrap intervals, t-test, permutation test, Holm's correction, effect size.

Everything works on differences [queries, comparisons] at once. Sources: Smucker, Allan and Carterette (CIKM 2007) for
the paired tests in retrieval, Efron's percentile interval, Holm (1979), Cohen's d of paired differences (d_z).
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.special import stdtr

Floats = npt.NDArray[np.float64]
LEVELS = ((0.001, "***"), (0.01, "**"), (0.05, "*"))
_CELLS = 1 << 22  # draws x queries held in memory at a time


def stars(p: float) -> str:
    """The mark of the strictest level that ``p`` is below; "" if it is below none."""
    return next((mark for level, mark in LEVELS if p < level), "")


@dataclass(frozen=True, slots=True)
class PairedTests:
    """One entry per comparison, [comparisons]. p-values are two-sided, and not corrected."""

    difference: Floats  # mean of the paired differences
    t_p: Floats
    permutation_p: Floats
    effect_size: Floats  # mean / standard deviation of the differences; 0 if the mean is 0, inf if they never vary


def bootstrap_intervals(values: Floats, draws: int, seed: int, confidence: float) -> tuple[Floats, Floats]:
    """Percentile intervals of the columns' means; every column sees the same resampled queries.

    Args:
        values: [queries, columns].

    Returns:
        Lower and upper bounds, [columns] each.
    """
    rng = np.random.default_rng(seed)
    queries = len(values)
    means = []
    for block in _blocks(draws, queries):
        picks = rng.integers(queries, size=(block, queries)) + np.arange(block)[:, None] * queries
        weights = np.bincount(picks.ravel(), minlength=block * queries).reshape(block, queries)
        means.append(weights @ values / queries)
    tail = (1 - confidence) / 2
    low, high = np.quantile(np.concatenate(means), (tail, 1 - tail), axis=0)
    return low, high


def paired_tests(differences: Floats, draws: int, seed: int) -> PairedTests:
    """Tests each column against a mean of 0. ``differences``: [queries, comparisons], at least two queries.

    Raises:
        ValueError: there are fewer than two queries.
    """
    if len(differences) < 2:
        raise ValueError(f"a comparison needs at least 2 queries, got {len(differences)}")
    mean, deviation = differences.mean(axis=0), differences.std(axis=0, ddof=1)
    deviation = np.where(np.ptp(differences, axis=0) == 0, 0, deviation)  # rounding is no variation
    with np.errstate(divide="ignore", invalid="ignore"):
        effect = np.where(mean == 0, 0, mean / deviation)
    return PairedTests(mean, _t_test(effect, len(differences)), _permutation_test(differences, draws, seed), effect)


def _t_test(effect: Floats, queries: int) -> Floats:
    p: Floats = 2 * stdtr(queries - 1, -np.abs(effect) * np.sqrt(queries))
    return p


def _permutation_test(differences: Floats, draws: int, seed: int) -> Floats:
    """How often a random flip of signs gives a sum as far from 0.

    Exact over all flips if there are at most ``draws`` of them, else (hits + 1) / (draws + 1).
    """
    queries = len(differences)
    observed = np.abs(differences.sum(axis=0)) - 1e-12 * np.abs(differences).sum(axis=0)  # sums differ by rounding
    exact = queries < 63 and 1 << queries <= draws
    rng = np.random.default_rng(seed)
    hits, done = np.zeros(differences.shape[1]), 0
    total = 1 << queries if exact else draws
    for block in _blocks(total, queries):
        flips: npt.NDArray[np.integer[Any]]
        if exact:
            flips = (np.arange(done, done + block)[:, None] >> np.arange(queries)) & 1
        else:
            random_bytes = rng.integers(256, size=(block, -(-queries // 8)), dtype=np.uint8)
            flips = np.unpackbits(random_bytes, axis=1, count=queries)
        sums = (1 - 2 * flips.astype(np.float64)) @ differences
        hits += (np.abs(sums) >= observed).sum(axis=0)
        done += block
    p: Floats = hits / total if exact else (hits + 1) / (total + 1)
    return p


def _blocks(total: int, queries: int) -> list[int]:
    """``total`` split into block sizes that keep block x queries small."""
    size = max(1, _CELLS // queries)
    return [min(size, total - start) for start in range(0, total, size)]


def holm(p_values: Any) -> Floats:
    """Holm's step-down correction over all ``p_values``, in their shape: [0.01, 0.04, 0.03] -> [0.03, 0.06, 0.06]."""
    p = np.asarray(p_values, np.float64)
    order = np.argsort(p, axis=None)
    factors = np.arange(p.size, 0, -1)
    corrected = np.empty(p.size)
    corrected[order] = np.minimum(np.maximum.accumulate(p.ravel()[order] * factors), 1)
    return corrected.reshape(p.shape)
