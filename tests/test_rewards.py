"""Golden tables of the rewards, worked out by hand from the published shapes, and what holds of all of them."""

import itertools
import math
from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from convsearch.config.grpo import RewardConfig
from convsearch.rewards.shapes import (
    DEPTH,
    SHAPES,
    SIMILARITY,
    Feedback,
    curriculum,
    exponential,
    mrr,
    ndcg_at_3,
    non_latin_share,
    rank_incentive,
    reciprocal,
    reward,
)
from convsearch.types import Rewrite, RewriteError

PARSED = Rewrite("who is Anne Hathaway", None)
ERRORS: list[RewriteError] = ["no_tag", "many_tags", "empty", "truncated", "format"]
ranks = st.none() | st.integers(1, 200)
near = pytest.approx


def paid(rewrite: Rewrite, rank: int | None, question: str = "", progress: float = 0.0, **options: Any) -> float:
    """The reward under these options; ``guard``: a language guard with that share."""
    if (guard := options.pop("guard", None)) is not None:
        options |= {"language_guard": True, "language_guard_share": guard}
    return reward(rewrite, Feedback(rank), RewardConfig(**options), question, progress)


# r in 1..10: 19/9 - r/9 = (19 - r)/9; r in 11..100: 10/9 - r/90 = (100 - r)/90.
@pytest.mark.parametrize(
    ("rank", "expected"),
    [
        (1, 2.0),
        (2, 17 / 9),
        (3, 16 / 9),
        (5, 14 / 9),
        (9, 10 / 9),
        (10, 1.0),
        (11, 89 / 90),
        (12, 88 / 90),
        (50, 5 / 9),
        (55, 0.5),
        (99, 1 / 90),
        (100, 0.0),
        (101, 0.0),
        (1000, 0.0),
        (None, 0.0),
    ],
)
def test_rank_incentive(rank: int | None, expected: float) -> None:
    assert rank_incentive(rank) == near(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("rank", "expected"), [(1, 1.0), (2, 0.5), (3, 1 / 3), (10, 0.1), (100, 0.01), (101, 0.0), (None, 0.0)]
)
def test_reciprocal_and_mrr(rank: int | None, expected: float) -> None:
    assert reciprocal(rank) == mrr(rank) == near(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("rank", "expected"),
    [(1, 1.0), (2, 0.36787944117144233), (3, 0.1353352832366127), (11, 4.539992976248485e-05), (101, 0.0), (None, 0.0)],
)
def test_exponential(rank: int | None, expected: float) -> None:
    assert exponential(rank) == near(expected, abs=1e-15)


@pytest.mark.parametrize(
    ("rank", "expected"), [(1, 1.0), (2, 0.6309297535714575), (3, 0.5), (4, 0.0), (100, 0.0), (None, 0.0)]
)
def test_ndcg_at_3(rank: int | None, expected: float) -> None:
    assert ndcg_at_3(rank) == near(expected, abs=1e-12)


# First quarter: 1 - (r - 1)/99 down to rank 100, else -0.2. Afterwards: the same down to rank 10, then 0 down to rank
# 100, else -0.2.
@pytest.mark.parametrize(
    ("rank", "early", "late"),
    [
        (1, 1.0, 1.0),
        (2, 98 / 99, 98 / 99),
        (10, 90 / 99, 90 / 99),
        (11, 89 / 99, 0.0),
        (50, 50 / 99, 0.0),
        (100, 0.0, 0.0),
        (101, -0.2, -0.2),
        (None, -0.2, -0.2),
    ],
)
def test_curriculum_in_both_phases(rank: int | None, early: float, late: float) -> None:
    for progress in (0.0, 0.1, 0.2499):
        assert curriculum(rank, progress) == near(early, abs=1e-12)
        assert paid(PARSED, rank, name="curriculum", progress=progress) == near(early, abs=1e-12)
    for progress in (0.25, 0.5, 1.0):
        assert curriculum(rank, progress) == near(late, abs=1e-12)
        assert paid(PARSED, rank, name="curriculum", progress=progress) == near(late, abs=1e-12)


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("shape", [*SHAPES, "curriculum"])
@pytest.mark.parametrize("rank", [1, 100, None])
def test_a_broken_form_gets_the_penalty_instead_of_the_reward(
    error: RewriteError, shape: str, rank: int | None
) -> None:
    assert paid(Rewrite(None, error), rank, name=shape) == -0.1
    assert paid(Rewrite(None, error), rank, name=shape, format_penalty=-0.75) == -0.75


@pytest.mark.parametrize("shape", SHAPES)
def test_a_kept_form_gets_the_shape_and_nothing_else(shape: str) -> None:
    for rank in (1, 2, 10, 11, 100, 101, None):
        assert paid(PARSED, rank, name=shape, format_penalty=-9.0, progress=0.9) == SHAPES[shape](rank)


def test_the_paper_is_the_default() -> None:
    assert [paid(PARSED, rank) for rank in (1, 10, 100, None)] == near([2.0, 1.0, 0.0, 0.0], abs=1e-12)


@settings(max_examples=100)
@given(ranks, ranks, st.sampled_from([*SHAPES, "curriculum"]), st.floats(0, 1))
def test_a_better_rank_never_earns_less(one: int | None, other: int | None, shape: str, progress: float) -> None:
    better, worse = sorted((one, other), key=lambda rank: math.inf if rank is None else rank)
    first, second = (paid(PARSED, rank, name=shape, progress=progress) for rank in (better, worse))
    assert first >= second
    assert -0.2 <= second <= first <= 2.0


def test_the_paper_s_shape_tells_every_rank_within_the_depth_apart() -> None:
    rewards = [rank_incentive(rank) for rank in range(1, DEPTH + 1)]
    steps = [before - after for before, after in itertools.pairwise(rewards)]
    assert steps[:9] == near([1 / 9] * 9)
    assert steps[9:] == near([1 / 90] * 90)


def test_every_configured_shape_has_a_function() -> None:
    names = get_args(RewardConfig.model_fields["name"].annotation)
    assert sorted(names) == sorted([*SHAPES, "curriculum", SIMILARITY])


@pytest.mark.parametrize(
    ("text", "share"),
    [
        ("", 0.0),
        ("1999 - 2024 ?!", 0.0),
        ("Who wrote Hamlet?", 0.0),
        ("Où est né Dvořák?", 0.0),
        ("кто", 1.0),
        ("ab кто 12", 0.6),
        ("谁写了 Hamlet", 3 / 9),
        ("東京", 1.0),
    ],
)
def test_share_of_letters_that_are_not_latin(text: str, share: float) -> None:
    assert non_latin_share(text) == near(share)


def test_the_language_guard_treats_drift_as_a_broken_form() -> None:
    drifted, kept = Rewrite("who wrote 哈姆雷特 the play", None), Rewrite("who wrote Hamlet", None)
    share = 4 / 19  # 4 ideographs among 19 letters
    assert paid(drifted, 1) == 2.0  # off by default
    assert paid(drifted, 1, guard=share - 0.01) == -0.1
    assert paid(drifted, 1, guard=share + 0.01) == 2.0
    assert paid(kept, 1, guard=0.0) == 2.0
    # What the user writes in another script may be answered in it.
    assert paid(Rewrite("кто написал Гамлета", None), 1, guard=0.1, question="кто его написал") == 2.0
    assert paid(Rewrite("кто написал Гамлета", None), 1, guard=0.1, question="who wrote it") == -0.1
