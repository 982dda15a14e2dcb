"""Learning rates worked out by hand: a rise whose first step already learns, then constant or a half cosine."""

import math
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from convsearch.trainers.schedule import lr_at

near = pytest.approx


def test_constant_after_a_linear_rise() -> None:
    rates = [lr_at(step, 10, 1e-6, 4) for step in range(6)]
    assert rates == near([0.25e-6, 0.5e-6, 0.75e-6, 1e-6, 1e-6, 1e-6])
    assert lr_at(2129, 2130, 1e-6, 100) == 1e-6


def test_without_warm_up_the_first_step_has_the_whole_rate() -> None:
    assert lr_at(0, 10, 3e-4, 0) == lr_at(0, 10, 3e-4, 0, "cosine") == 3e-4


def test_half_a_cosine() -> None:
    # 2 steps up, then 8 steps down: a quarter of the way 0.5 (1 + cos 45 degrees), half way 0.5, three quarters 0.5 (1
    # - cos 45 degrees).
    rates = [lr_at(step, 10, 2.0, 2, "cosine") for step in (0, 1, 2, 4, 6, 8, 10)]
    quarter = math.sqrt(0.5)
    assert rates == near([1.0, 2.0, 2.0, 1 + quarter, 1.0, 1 - quarter, 0.0], abs=1e-12)


def test_the_floor_of_the_cosine() -> None:
    assert [lr_at(step, 10, 2.0, 0, "cosine", 0.1) for step in (0, 5, 10, 99)] == near([2.0, 1.1, 0.2, 0.2])


def test_a_schedule_that_is_all_warm_up_ends_at_the_rate() -> None:
    assert [lr_at(step, 4, 1.0, 4, "cosine") for step in range(5)] == near([0.25, 0.5, 0.75, 1.0, 1.0])


@settings(max_examples=100)
@given(st.integers(1, 300), st.integers(0, 100), st.sampled_from(["constant", "cosine"]), st.floats(0, 1))
def test_the_rate_rises_in_the_warm_up_only(total: int, warmup: int, kind: str, floor: float) -> None:
    rates = [lr_at(step, total, 1.0, warmup, kind, floor) for step in range(total + 5)]
    assert all(0 < rate <= 1 or kind == "cosine" for rate in rates)
    assert all(later > earlier for earlier, later in pairwise(rates[:warmup]))
    assert all(later <= earlier + 1e-12 for earlier, later in pairwise(rates[warmup:]))
    assert max(rates) <= 1
    assert min(rates[warmup:], default=1) >= (min(floor, 1) if kind == "cosine" else 1) - 1e-12


def test_an_unknown_kind_is_named() -> None:
    with pytest.raises(ValueError, match=r"^lr scheduler 'linear' is not one of constant, cosine$"):
        lr_at(5, 10, 1.0, 2, "linear")
