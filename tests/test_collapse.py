"""The collapse guard: what it reports, what it accepts, and its messages."""

import math
from typing import Any

import pytest

from convsearch.config.guard import GuardConfig
from convsearch.runs.collapse import CollapseGuard

FINE = {"reward": 1.2, "format_rate": 1.0, "response_tokens": 40.0, "kl": 0.05, "non_latin_share": 0.0, "skipped": 0.0}


def run(guard: CollapseGuard, *records: dict[str, Any], start: int = 0) -> list[str | None]:
    return [guard.check(start + step, FINE | record) for step, record in enumerate(records)]


@pytest.mark.parametrize(
    ("limits", "collapsed", "said"),
    [
        (
            {"max_reward_fall": 1.0},
            {"reward": -0.1},
            "reward fell to -0.1 over steps 3 - 5, from 1.2 in the best window (up to step 2)",
        ),
        ({"max_format_fall": 0.5}, {"format_rate": 0.25}, "more than guard.max_format_fall=0.5"),
        ({"min_reward": 0.0}, {"reward": -0.1}, "reward is -0.1 over steps 3 - 5, below guard.min_reward=0"),
        (
            {"min_format_rate": 0.9},
            {"format_rate": 0.5},
            "format_rate is 0.5 over steps 3 - 5, below guard.min_format_rate=0.9",
        ),
        ({"min_response_tokens": 20.0}, {"response_tokens": 3.0}, "response_tokens is 3 over steps 3 - 5, below"),
        (
            {"max_response_tokens": 90.0},
            {"response_tokens": 100.0},
            "response_tokens is 100 over steps 3 - 5, above guard.max_response_tokens=90",
        ),
        ({"max_kl": 1.0}, {"kl": 2.5}, "kl is 2.5 over steps 3 - 5, above guard.max_kl=1"),
        ({"max_non_latin_share": 0.5}, {"non_latin_share": 0.9}, "non_latin_share is 0.9 over steps 3 - 5, above"),
    ],
)
def test_each_limit_reports_its_metric_with_values(
    limits: dict[str, float], collapsed: dict[str, float], said: str
) -> None:
    off = dict.fromkeys(("max_reward_fall", "max_format_fall", "max_non_latin_share"))
    guard = CollapseGuard(GuardConfig(window=3, **(off | limits)), max_skipped=10)
    answers = run(guard, *[{}] * 3, *[collapsed] * 3)
    assert answers[:3] == [None] * 3
    assert answers[5] is not None
    assert said in answers[5]
    silent = CollapseGuard(GuardConfig(window=3, **off), max_skipped=10)
    assert run(silent, *[{}] * 3, *[collapsed] * 3) == [None] * 6


def test_one_bad_step_or_a_bad_start_is_no_collapse() -> None:
    guard = CollapseGuard(GuardConfig(window=4), max_skipped=10)
    assert (
        run(guard, {"format_rate": 0.0, "reward": -0.1}, *[{}] * 5, {"format_rate": 0.0, "reward": -0.1}, *[{}] * 5)
        == [None] * 12
    )
    low = CollapseGuard(GuardConfig(window=2), max_skipped=10)
    assert run(low, *[{"format_rate": 0.0, "reward": -0.1}] * 9) == [None] * 9


def test_nothing_is_reported_before_the_first_full_window() -> None:
    guard = CollapseGuard(GuardConfig(window=3, min_reward=5.0), max_skipped=10)
    assert [answer is None for answer in run(guard, {}, {}, {})] == [True, True, False]


def test_a_resumed_run_reports_the_same_as_an_uninterrupted_one() -> None:
    cfg, records = GuardConfig(window=3), [*[{}] * 4, *[{"reward": -0.1}] * 4]
    unbroken = run(CollapseGuard(cfg, max_skipped=10), *records)
    assert unbroken[-3:] != [None] * 3
    for cut in range(1, 8):
        history = [
            {"step": -1, "val_reward": 0.0},
            *({"step": step, **FINE, **record} for step, record in enumerate(records[:cut])),
        ]
        assert run(CollapseGuard(cfg, max_skipped=10, history=history), *records[cut:], start=cut) == unbroken[cut:]


def test_steps_without_a_finite_gradient_are_counted_in_a_row() -> None:
    bad = {"skipped": 1.0, "kl": math.nan, "reward": 1.2}
    guard = CollapseGuard(None, max_skipped=3)
    answers = run(guard, bad, bad, {}, bad, bad, bad)
    assert answers[:5] == [None] * 5
    assert answers[5] is not None
    assert "3 steps in a row" in answers[5]
    assert "trainer.max_skipped_steps=3" in answers[5]


def test_nan_is_left_out_of_the_mean() -> None:
    guard = CollapseGuard(GuardConfig(window=2, max_kl=1.0), max_skipped=10)
    assert run(guard, {"kl": 2.0}, {"kl": math.nan}) == [None, None]
    assert "kl is 2 over steps 0 - 2" in str(guard.check(2, FINE | {"kl": 2.0}))


def test_several_limits_are_reported_together() -> None:
    guard = CollapseGuard(GuardConfig(window=2), max_skipped=10)
    said = run(guard, {}, {}, *[{"reward": -0.1, "format_rate": 0.0, "non_latin_share": 1.0}] * 2)[-1]
    assert said is not None
    assert said.count("; ") == 2
