"""GRPO's relatives by hand: GSPO, importance weights, Dr. GRPO, LLDS, dynamic sampling, PODS, the presets.

1. GSPO's ratio is the geometric mean over its sequence; the clip acts on whole sequences; sequences are found in trees
as they are packed.
2. A sample of another policy is weighted by min(pi_old / pi_sampler, cap); the weight has no gradient.
3. LLDS: only tokens that fall, of samples that fall, whose advantage is not negative.
4. Other prompts are drawn for equal groups, as many as are missing, until the rounds or the prompts are used up.
5. No other samples of a group have rewards of larger variance than those that are trained on.
6. Each preset is the algorithm it is named after, and only the faithful one has an entropy bonus.
Parity with verl and TRL is in test_parity_verl_trl.py.
"""

import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from convsearch.algorithms.averages import token_weights
from convsearch.algorithms.dynamic_sampling import draw_until_spread
from convsearch.algorithms.gspo import gspo_loss
from convsearch.algorithms.importance import importance_weights
from convsearch.algorithms.llds import llds_penalty
from convsearch.algorithms.loss import grpo_loss
from convsearch.algorithms.max_variance import max_variance_subset
from convsearch.config import load_grpo_config
from convsearch.model.batch import Branch, Tree, collate, unshared

near = pytest.approx
SEQUENCES = torch.tensor([0, 0, 1, 1, 1])
SMALL = ["actor_rollout_ref.model.path=m", "data.train_files=a"]


def tensor(*values: float, grad: bool = False) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64, requires_grad=grad)


def test_gspo_worked_by_hand() -> None:
    # Sequence 0: ratios 4 and 1, geometric mean 2, clipped at 1.5: loss -1.5 x 1. Sequence 1: ratios 2, 1/2, 1: mean 1,
    # advantage -3.
    logprobs_R = tensor(math.log(0.4), math.log(0.1), math.log(0.2), math.log(0.1), math.log(0.3), grad=True)
    old_R = tensor(math.log(0.1), math.log(0.1), math.log(0.1), math.log(0.2), math.log(0.3))
    losses_R, clipped_R = gspo_loss(logprobs_R, old_R, tensor(1, 1, -3, -3, -3), 0.2, 0.5, SEQUENCES)
    assert losses_R.tolist() == near([-1.5, -1.5, 3, 3, 3])
    assert clipped_R.tolist() == [True, True, False, False, False]
    torch.autograd.backward(losses_R.sum() / 3)
    assert logprobs_R.grad is not None
    assert logprobs_R.grad.tolist() == near(
        [0, 0, 1, 1, 1]
    )  # a clipped sequence has none, the other -advantage x ratio a token


def test_weights_against_the_sampler_worked_by_hand() -> None:
    old_R, sampler_R = (
        tensor(*map(math.log, values)) for values in ((0.6, 0.1, 0.2, 0.3, 0.5), (0.2, 0.2, 0.2, 0.2, 0.4))
    )
    assert importance_weights(old_R, sampler_R, SEQUENCES, "token", 2.0).tolist() == near([2.0, 0.5, 1.0, 1.5, 1.25])
    products = [3 * 0.5] * 2 + [1.5 * 1.25] * 3
    assert importance_weights(old_R, sampler_R, SEQUENCES, "sequence", 1.6).tolist() == near(
        [products[0]] * 2 + [1.6] * 3
    )
    assert not importance_weights(old_R.requires_grad_(), sampler_R, SEQUENCES, "token", 2.0).requires_grad
    assert importance_weights(tensor(0.0), tensor(-1e4), torch.tensor([0]), "token", 1e12).item() == near(math.exp(20))


def test_llds_worked_by_hand() -> None:
    # Sample 0 gets less likely (-1 + 0.25), and only its first token is to blame. Sample 1 gets more likely, although
    # a token falls. Samples 2 and 3 fall, with a negative advantage and with 0. The sum of sample 4 is 0.
    changes = [[-1.0, 0.25], [-0.5, 2.0], [-1.0, -1.0], [-0.25], [0.5, -0.5]]
    advantages = [1.0, 1.0, -1.0, 0.0, 2.0]
    change_R = tensor(*(value for sample in changes for value in sample))
    advantages_R = tensor(*(a for a, sample in zip(advantages, changes, strict=True) for _ in sample))
    sequence_R = torch.tensor([number for number, sample in enumerate(changes) for _ in sample])
    old_R = tensor(*(-3.0 - r for r in range(9)))
    logprobs_R = (old_R + change_R).requires_grad_()
    penalty_R = llds_penalty(logprobs_R, old_R, advantages_R, sequence_R)
    assert penalty_R.tolist() == [1.0, 0, 0, 0, 0, 0, 0.25, 0, 0]
    torch.autograd.backward(penalty_R.sum())
    assert logprobs_R.grad is not None
    assert logprobs_R.grad.tolist() == [-1, 0, 0, 0, 0, 0, -1, 0, 0]
    assert llds_penalty(old_R, old_R, advantages_R, sequence_R).tolist() == [0] * 9  # the first update of a step


def test_llds_is_added_with_its_weight() -> None:
    branches = (Branch((3, 4), 1.0, 0.25, (-1.0, -1.0)), Branch((5,), -1.0, 0.5, (-1.0,)))
    micro = replace(collate([Tree((1, 2), branches)]), old_logprobs_R=tensor(-1, -1, -1))
    logprobs_R = tensor(-3, -2, -2, grad=True)  # falls of 2 and 1 in a good sample, of 1 in a bad one
    losses = {}
    for coefficient in (0.0, 0.2):
        options = [f"actor_rollout_ref.actor.llds_coef={coefficient}", "actor_rollout_ref.actor.ppo_epochs=2"]
        cfg = load_grpo_config([*SMALL, *options])
        loss, report = grpo_loss(cfg.actor_rollout_ref.actor, cfg.algorithm)(micro, logprobs_R, torch.zeros(3))
        losses[coefficient] = loss.item()
        assert report.get("llds") == (near(0.25 * (2 + 1)) if coefficient else None)
    assert losses[0.2] - losses[0.0] == near(0.2 * 0.25 * (2 + 1))


def test_averages_of_sequences_worked_by_hand() -> None:
    assert token_weights([1, 4], "seq-mean-token-mean") == near([1 / 2, 1 / 8])
    assert token_weights([1, 4, 5], "seq-mean-token-sum-norm", scale=10) == near([1 / 30] * 3)
    assert token_weights([], "seq-mean-token-mean") == token_weights([], "seq-mean-token-sum-norm") == []


@given(st.lists(st.lists(st.integers(1, 5), min_size=1, max_size=4), min_size=1, max_size=4))
def test_sequences_are_found_in_trees(lengths: list[list[int]]) -> None:
    trees = [Tree((7,) * (p + 1), tuple(Branch((8,) * size) for size in group)) for p, group in enumerate(lengths)]
    expected = [number for number, size in enumerate(size for group in lengths for size in group) for _ in range(size)]
    assert collate(trees).sequence_R.tolist() == collate(unshared(trees)).sequence_R.tolist() == expected


def test_other_prompts_follow_for_equal_groups() -> None:
    """The stream is 7 2 9 4 1 8; only the groups of 2, 4 and 8 differ. Three are wanted."""
    asked: list[tuple[int, list[int]]] = []

    def draw(prompts: list[int], number: int) -> list[str]:
        asked.append((number, prompts))
        return [f"{prompt} in round {number}" for prompt in prompts]

    def run(stream: list[int], rounds: int) -> list[int]:
        asked.clear()
        groups = draw_until_spread(stream, 3, draw, lambda group: int(group[0]) % 2 == 0, rounds)
        assert groups == [f"{prompt} in round {number}" for number, prompts in asked for prompt in prompts]
        return [len(prompts) for _, prompts in asked]

    assert run([7, 2, 9, 4, 1, 8, 6], rounds=9) == [3, 2, 1]  # 2 is one of three; 4 1 brings one; 8 is the last
    assert asked == [(0, [7, 2, 9]), (1, [4, 1]), (2, [8])]
    assert run([7, 2, 9, 4, 1, 8, 6], rounds=2) == [3, 2]
    assert run([7, 2, 9, 4, 1, 8, 6], rounds=1) == [3]
    assert run([2, 4, 6, 8], rounds=9) == [3]
    assert run([7, 9, 1, 3], rounds=9) == [3, 1]  # then no prompt is left


def test_presets_match_their_names() -> None:
    presets = {
        name: load_grpo_config([f"algorithm={name}", *SMALL])
        for name in ("grpo_faithful", "grpo", "grpo_llds", "dr_grpo", "dapo", "gspo")
    }
    assert {name: cfg.actor_rollout_ref.actor.entropy_coeff for name, cfg in presets.items()} == dict.fromkeys(
        presets, 0.0
    ) | {"grpo_faithful": 0.001}
    averages = {name: cfg.algorithm.loss_agg for name, cfg in presets.items()}
    assert averages == {
        "grpo_faithful": "micro-batch-mean",
        "grpo": "token-mean",
        "grpo_llds": "token-mean",
        "dr_grpo": "seq-mean-token-sum-norm",
        "dapo": "token-mean",
        "gspo": "seq-mean-token-mean",
    }
    assert [name for name, cfg in presets.items() if not cfg.algorithm.norm_adv_by_std] == ["dr_grpo"]
    assert [name for name, cfg in presets.items() if cfg.algorithm.loss_mode == "gspo"] == ["gspo"]
    assert [name for name, cfg in presets.items() if cfg.algorithm.filter_groups.enable] == ["dapo"]
    assert [name for name, cfg in presets.items() if not cfg.actor_rollout_ref.actor.use_kl_loss] == ["dapo"]
    assert [name for name, cfg in presets.items() if cfg.actor_rollout_ref.actor.llds_coef] == ["grpo_llds"]
    assert [name for name, cfg in presets.items() if cfg.several_updates] == ["grpo_llds"]
    assert presets["dapo"].actor_rollout_ref.actor.clip_ratio_high == 0.28
    assert load_grpo_config([*SMALL]).actor_rollout_ref.actor.entropy_coeff == 0
    assert load_grpo_config(["experiment=paper_qrecc_llama_bm25"]).actor_rollout_ref.actor.entropy_coeff == 0.001


def test_without_a_weight_the_entropy_has_no_gradient() -> None:
    """Its backward pass would cost as much as that of the log-probs."""
    micro = collate([Tree((1, 2), (Branch((3, 4), advantage=1.0, sampler_logprobs=(-1.0, -1.0)),))])
    for coefficient in (0.0, 0.5):
        cfg = load_grpo_config([*SMALL, f"actor_rollout_ref.actor.entropy_coeff={coefficient}"])
        logprobs_R, entropy_R = tensor(-1, -1, grad=True), tensor(2, 3, grad=True)
        loss, report = grpo_loss(cfg.actor_rollout_ref.actor, cfg.algorithm)(micro, logprobs_R, entropy_R)
        torch.autograd.backward(loss)
        assert (None if entropy_R.grad is None else entropy_R.grad.tolist()) == (
            [-coefficient] * 2 if coefficient else None
        )
        assert report["entropy"] == near(5)


# --- the subset of largest variance -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rewards", "size", "chosen"),
    [
        ([0.0, 1.0, 0.5, 0.4], 2, [0, 1]),
        ([2.0, 1.9, 0.0, 1.8, 2.0], 3, [0, 2, 4]),  # 2, 0, 2: 0.889; 2, 0, 1.8: 0.809
        ([0.0, 0.1, 5.0, 0.2, 0.0], 3, [0, 2, 4]),  # two lows and the one high
        ([1.0, 0.0, 1.0, 0.0, 1.0], 4, [0, 1, 2, 3]),  # half and half: the first of the equal ones
        ([1.0, 0.0, 1.0, 0.0, 1.0], 3, [0, 1, 2]),  # two highs or two lows differ by nothing: the highs
        ([0.3, 0.3, 0.3], 2, [0, 1]),
        ([0.1, 0.2, 0.3], 3, [0, 1, 2]),
        ([0.1, 0.2, 0.3], 1, [2]),
    ],
)
def test_the_subset_worked_by_hand(rewards: list[float], size: int, chosen: list[int]) -> None:
    assert max_variance_subset(rewards, size) == chosen


@given(
    st.lists(
        st.sampled_from([-0.1, 0.0, 0.1, 0.2, 0.3, 1.0, 17 / 9, 2.0]) | st.floats(-10, 10), min_size=1, max_size=9
    ).flatmap(lambda rewards: st.tuples(st.just(rewards), st.integers(1, len(rewards))))
)
def test_no_subset_has_a_larger_variance(case: tuple[list[float], int]) -> None:
    """Exactly: Fractions of all subsets."""
    rewards, size = case

    def variance(positions: Sequence[int]) -> Fraction:
        return statistics.pvariance([Fraction(rewards[g]) for g in positions])

    chosen = max_variance_subset(rewards, size)
    assert chosen == sorted(set(chosen))
    assert len(chosen) == size
    assert variance(chosen) == max(map(variance, itertools.combinations(range(len(rewards)), size)))
    twins = {g: rewards.index(reward) for g, reward in enumerate(rewards)}
    for g in chosen:  # of equal rewards the first ones
        assert all(twin in chosen for twin in range(g) if twins[twin] == twins[g])
