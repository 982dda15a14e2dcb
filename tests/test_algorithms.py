"""GRPO's arithmetic against hand-worked values.

1. Advantages: (r - mean) / (unbiased std + 1e-6), 0 in sum a group; a group of one keeps its reward.
2. The clip takes the larger of two losses; on policy nothing is clipped and the gradient is that of -A log p.
3. KL estimators after Schulman; k3 is never negative, and held to 10.
4. A loss is the sum of weight x token loss: both averages are weights that sum to 1.
Parity with verl's and TRL's own functions is in test_parity_verl_trl.py.
"""

import math
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from convsearch.algorithms.advantages import group_advantages
from convsearch.algorithms.averages import token_weights
from convsearch.algorithms.clip import clipped_loss
from convsearch.algorithms.kl import kl_penalty

near = pytest.approx
rewards = st.sampled_from([-0.1, 0.0, 0.3, 1.0, 17 / 9, 2.0])


def tensor(*values: float, grad: bool = False) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64, requires_grad=grad)


# --- advantages -------------------------------------------------------------------------------------------------------


def test_advantages_worked_by_hand() -> None:
    # Group 1: 2, 1, 0, 1: mean 1, squares 1 + 0 + 1 + 0, unbiased variance 2/3. Group 2: 1, 1, 1, -0.1: mean 0.725,
    # deviations 0.275 (three times) and -0.825, squares 0.226875 + 0.680625 = 0.9075, variance 0.3025, std 0.55: +0.5
    # three times, -1.5.
    first, second = math.sqrt(2 / 3), 0.55
    expected = [1 / first, 0, -1 / first, 0, *[0.275 / second] * 3, -0.825 / second]
    assert group_advantages([2, 1, 0, 1, 1, 1, 1, -0.1], 4) == near(expected, abs=1e-5)
    assert group_advantages([1, 1, 1, -0.1], 4, eps=0) == near([0.5, 0.5, 0.5, -1.5], abs=1e-12)
    assert group_advantages([2, 1, 0, 1], 4, eps=1.0) == near([1 / (first + 1), 0, -1 / (first + 1), 0], abs=1e-12)


def test_advantages_without_the_division() -> None:
    assert group_advantages([2, 1, 0, 1, 5, 5, 5, 1], 4, by_std=False) == near([1, 0, -1, 0, 1, 1, 1, -3])


def test_a_group_of_one_keeps_its_reward() -> None:
    assert group_advantages([2.0, -0.1], 1) == near([2.0 / (1 + 1e-6), -0.1 / (1 + 1e-6)], abs=1e-15)
    assert group_advantages([2.0, -0.1], 1, by_std=False) == [2.0, -0.1]


def test_equal_rewards_have_no_advantage() -> None:
    assert group_advantages([0.1] * 6, 3) == near([0.0] * 6, abs=1e-9)  # 0.1 + 0.1 + 0.1 is not 0.3 in floats


@settings(max_examples=50)
@given(
    st.integers(2, 6).flatmap(
        lambda size: st.tuples(
            st.just(size), st.lists(st.lists(rewards, min_size=size, max_size=size), min_size=1, max_size=4)
        )
    )
)
def test_advantages_equal_the_formula_for_any_groups(case: tuple[int, list[list[float]]]) -> None:
    size, groups = case
    advantages = group_advantages([value for group in groups for value in group], size)
    assert len(advantages) == size * len(groups)
    for number, group in enumerate(groups):
        own = advantages[number * size : (number + 1) * size]
        assert sum(own) == near(0, abs=1e-9)
        assert own == near(group_advantages(group, size), abs=1e-12)  # other groups have no part in it
        assert own == near(group_advantages([value + 3 for value in group], size), abs=1e-6)  # nor has a constant
        spread = statistics.stdev(group)
        assert own == near([(value - statistics.mean(group)) / (spread + 1e-6) for value in group], abs=1e-6)


@pytest.mark.parametrize(("count", "size"), [(7, 4), (3, 4), (4, 0), (4, -1)])
def test_rewards_that_fill_no_groups_are_refused(count: int, size: int) -> None:
    with pytest.raises(ValueError, match=f"^{count} rewards do not make whole groups of {size}$"):
        group_advantages([0.0] * count, size)


# --- the clipped loss -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "clipped"),
    [
        (1.0, 2.0, -2.0, False),
        (1.1, 2.0, -2.2, False),
        (1.5, 2.0, -2.4, True),  # no more reward beyond 1.2
        (0.5, 2.0, -1.0, False),  # a loss is never cut off: the way back stays open
        (0.5, -2.0, 1.6, True),  # no more punishment below 0.8
        (1.5, -2.0, 3.0, False),
        (1.0, -2.0, 2.0, False),
        (3.0, 0.0, 0.0, False),
    ],
)
def test_clipped_loss_worked_by_hand(ratio: float, advantage: float, loss: float, clipped: bool) -> None:
    logprobs = tensor(math.log(ratio) - 1.5, grad=True)
    losses, active = clipped_loss(logprobs, tensor(-1.5), tensor(advantage), 0.2, 0.2)
    assert losses.item() == near(loss, abs=1e-12)
    assert active.tolist() == [clipped]
    losses.sum().backward()
    assert logprobs.grad is not None
    assert logprobs.grad.item() == near(0.0 if clipped else -advantage * ratio, abs=1e-12)


def test_the_two_clips_are_independent() -> None:
    losses, active = clipped_loss(tensor(math.log(1.25), math.log(0.85)), tensor(0, 0), tensor(1, -1), 0.1, 0.3)
    assert losses.tolist() == near([-1.25, 0.9])
    assert active.tolist() == [False, True]


def test_on_policy_the_gradient_is_the_policy_gradient() -> None:
    logprobs, advantages = tensor(-0.1, -3.0, -7.0, grad=True), tensor(1.5, -0.5, 0.25)
    losses, active = clipped_loss(logprobs, logprobs.detach(), advantages, 0.2, 0.2)
    assert losses.tolist() == near((-advantages).tolist())
    assert not active.any()
    losses.sum().backward()
    assert logprobs.grad is not None
    assert logprobs.grad.tolist() == near((-advantages).tolist())


@pytest.mark.parametrize("advantage", [1.0, 0.0, -1.0])
@pytest.mark.parametrize("difference", [150.0, -150.0])
def test_distant_log_probs_have_finite_loss_and_gradient(advantage: float, difference: float) -> None:
    logprobs = torch.tensor([difference], requires_grad=True)  # exp(150) is infinite in float32
    losses, _ = clipped_loss(logprobs, torch.zeros(1), torch.tensor([advantage]), 0.2, 0.2)
    losses.sum().backward()
    assert logprobs.grad is not None
    assert torch.isfinite(losses).all()
    assert torch.isfinite(logprobs.grad).all()


# --- KL ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("estimator", "expected"),
    # policy - reference = ln 2 and -ln 2; k3 = e^d - d - 1 with d the other way round: 1/2 + ln 2 - 1 and 2 - ln 2 - 1.
    [
        ("kl", [math.log(2), -math.log(2)]),
        ("abs", [math.log(2), math.log(2)]),
        ("mse", [math.log(2) ** 2 / 2, math.log(2) ** 2 / 2]),
        ("low_var_kl", [math.log(2) - 0.5, 1 - math.log(2)]),
    ],
)
def test_kl_worked_by_hand(estimator: str, expected: list[float]) -> None:
    policy, reference = tensor(-1.0, -1.0 - math.log(2)), tensor(-1.0 - math.log(2), -1.0)
    assert kl_penalty(policy, reference, estimator).tolist() == near(expected, abs=1e-12)  # type: ignore[arg-type]
    assert kl_penalty(policy, policy, estimator).tolist() == [0, 0]  # type: ignore[arg-type]


def test_the_low_variance_estimate_is_clamped_to_ten() -> None:
    # d = 3: e^3 - 4 = 16.09 > 10. d = -8: e^-8 + 7. d = -12: 11 + e^-12 > 10. d = 200 would overflow.
    values = kl_penalty(tensor(-3, 8, 12, -200), tensor(0, 0, 0, 0), "low_var_kl")
    assert values.tolist() == near([10, 7 + math.exp(-8), 10, 10], abs=1e-12)


def test_the_default_kl_is_the_paper_s() -> None:
    assert kl_penalty(tensor(0.5), tensor(0.0)).item() == near(math.exp(-0.5) + 0.5 - 1)


@settings(max_examples=50)
@given(st.lists(st.tuples(st.floats(-60, 0), st.floats(-60, 0)), min_size=1, max_size=8))
def test_the_low_variance_estimate_is_not_negative_and_points_to_the_reference(
    pairs: list[tuple[float, float]],
) -> None:
    logprobs = tensor(*(policy for policy, _ in pairs), grad=True)
    reference = tensor(*(ref for _, ref in pairs))
    values = kl_penalty(logprobs, reference)
    assert ((values >= 0) & (values <= 10)).all()
    values.sum().backward()
    assert logprobs.grad is not None
    difference = logprobs.detach() - reference
    assert (logprobs.grad * difference >= 0).all()  # a step against the gradient brings the two nearer
    inside = (difference.abs() > 0.01) & (values.detach() < 9.9) & (difference.abs() < 19)
    assert (logprobs.grad[inside] != 0).all()


def test_the_expected_estimate_is_the_kl_divergence() -> None:
    """Over the policy's own distribution, kl and low_var_kl have the same mean: the divergence."""
    policy, reference = tensor(0.5, 0.3, 0.2), tensor(0.2, 0.2, 0.6)
    divergence = (policy * (policy / reference).log()).sum().item()
    for estimator in ("kl", "low_var_kl"):
        values = kl_penalty(policy.log(), reference.log(), estimator)  # type: ignore[arg-type]
        assert (policy * values).sum().item() == near(divergence, abs=1e-12)


def test_an_unknown_estimator_is_named() -> None:
    with pytest.raises(ValueError, match=r"^KL estimator 'k4' is not one of low_var_kl, kl, abs, mse$"):
        kl_penalty(tensor(0), tensor(0), "k4")  # type: ignore[arg-type]


# --- averages ---------------------------------------------------------------------------------------------------------


def test_token_weights_worked_by_hand() -> None:
    # token-mean: 10 tokens in all. micro-batches of 2: {1, 3}, {2, 2}, {2}: means over 4, 4, 2 tokens, a third each.
    assert token_weights([1, 3, 2, 2, 2], "token-mean") == near([0.1] * 5)
    assert token_weights([1, 3, 2, 2, 2], "micro-batch-mean", 2) == near([1 / 12, 1 / 12, 1 / 12, 1 / 12, 1 / 6])
    assert token_weights([4, 4], "micro-batch-mean") == token_weights([4, 4], "token-mean") == near([0.125, 0.125])
    assert token_weights([], "token-mean") == token_weights([], "micro-batch-mean") == []


lengths = st.lists(st.integers(1, 50), min_size=1, max_size=20)


@settings(max_examples=50)
@given(lengths, st.integers(1, 9))
def test_the_weighted_sum_equals_the_named_average(lengths_N: list[int], size: int) -> None:
    losses = [[math.sin(10 * row + column) for column in range(length)] for row, length in enumerate(lengths_N)]
    means = [
        statistics.fmean([value for row in losses[start : start + size] for value in row])
        for start in range(0, len(lengths_N), size)
    ]
    for aggregation, expected in (
        ("token-mean", statistics.fmean([value for row in losses for value in row])),
        ("micro-batch-mean", statistics.fmean(means)),
    ):
        weights = token_weights(lengths_N, aggregation, size)  # type: ignore[arg-type]
        assert sum(weight * length for weight, length in zip(weights, lengths_N, strict=True)) == near(1)
        assert sum(weight * sum(row) for weight, row in zip(weights, losses, strict=True)) == near(expected, abs=1e-9)


def test_one_micro_batch_is_the_token_mean() -> None:
    assert token_weights([3, 9, 1], "micro-batch-mean", 3) == near(token_weights([3, 9, 1], "token-mean"))


def test_an_unknown_average_is_named() -> None:
    known = "token-mean, micro-batch-mean, seq-mean-token-mean, seq-mean-token-sum-norm"
    with pytest.raises(ValueError, match=f"^loss aggregation 'seq-mean' is not one of {known}$"):
        token_weights([1], "seq-mean")  # type: ignore[arg-type]
