"""Our arithmetic equals that of verl 0.9.1 (the paper's trainer) and TRL 1.16.0, run on the same random numbers."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers_oracles import CASES, HORIZON, WEIGHT_CAP

from convsearch.algorithms.advantages import group_advantages
from convsearch.algorithms.averages import token_weights
from convsearch.algorithms.clip import clipped_loss
from convsearch.algorithms.kl import kl_penalty
from convsearch.algorithms.loss import grpo_loss
from convsearch.config import GrpoConfig, load_grpo_config
from convsearch.model.batch import Branch, Tree, collate

ROOT = Path(__file__).resolve().parents[1]
ORACLES = Path(os.environ.get("CONVSEARCH_ORACLES", Path(sys.prefix) / "oracles"))
FLAGS = f"--no-deps --only-binary :all: --target {ORACLES} -r tests/requirements-oracles.txt"
INSTALL = f"{sys.executable} -m pip install {FLAGS}"
CLIP, MICRO_BATCH_SIZE, GROUP_SIZES = (0.2, 0.28), 5, (1, 3, 4, 12)
N, T = 24, 11

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not all((ORACLES / name).is_dir() for name in ("verl", "trl")),
        reason=f"verl and TRL are not installed: {INSTALL}",
    ),
]
Arrays = dict[str, Any]


@pytest.fixture(scope="module")
def given() -> Arrays:
    """Random sequences of 1 to 11 tokens; ``far`` holds log-probs up to 150 apart, ``near`` ratios below 3."""
    draw = np.random.default_rng(7)
    rewards_N = draw.choice([-0.1, 0.0, 1 / 9, 1.0, 17 / 9, 2.0], N)
    rewards_N[:4] = 1.0  # a group of equal rewards
    old_NT = -draw.exponential(2.0, (N, T))
    far_NT = old_NT + draw.normal(0, 1, (N, T)) * draw.choice([0.1, 1.0, 5.0, 50.0], (N, T))
    far_NT[0, 0], far_NT[1, 0] = old_NT[0, 0] + 150, old_NT[1, 0] - 150
    lengths_N = draw.integers(1, T + 1, N)
    return {
        "rewards_N": rewards_N,
        "mask_NT": (np.arange(T) < lengths_N[:, None]).astype(float),
        "group_sizes": np.array(GROUP_SIZES),
        "old_NT": old_NT,
        "far_logprobs_NT": far_NT,
        "ref_NT": far_NT + draw.normal(0, 1, (N, T)) * draw.choice([0.0, 0.1, 1.0, 5.0, 50.0], (N, T)),
        "near_logprobs_NT": old_NT + draw.uniform(-0.9, 0.9, (N, T)),
        "near_ref_NT": old_NT + draw.uniform(-1, 1, (N, T)),
        "sampler_NT": old_NT + draw.normal(0, 0.3, (N, T)),
        "entropies_NT": draw.uniform(0, 5, (N, T)),
        "advantages_NT": np.repeat(draw.normal(0, 1, (N, 1)), T, axis=1),
        "losses_NT": draw.normal(0, 1, (N, T)),
        "clip": np.array(CLIP),
        "micro_batch_size": np.array(MICRO_BATCH_SIZE),
    }


@pytest.fixture(scope="module")
def theirs(given: Arrays, tmp_path_factory: pytest.TempPathFactory) -> Arrays:
    folder = tmp_path_factory.mktemp("oracles")
    np.savez(folder / "in.npz", **given)
    command = [
        sys.executable,
        str(ROOT / "tests" / "helpers_oracles.py"),
        str(folder / "in.npz"),
        str(folder / "out.npz"),
    ]
    environment = {**os.environ, "PYTHONPATH": str(ORACLES), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(np.load(folder / "out.npz"))


def responses(given: Arrays, name: str, grad: bool = False) -> torch.Tensor:
    """The response tokens of an array [N, T], flat [R]."""
    return torch.tensor(given[name][given["mask_NT"] > 0], requires_grad=grad)


def weights(given: Arrays, aggregation: str) -> torch.Tensor:
    """The weight of every response token [R]."""
    lengths_N = given["mask_NT"].sum(axis=1).astype(int).tolist()
    each_N = token_weights(lengths_N, aggregation, MICRO_BATCH_SIZE)  # type: ignore[arg-type]
    return torch.tensor(each_N, dtype=torch.float64).repeat_interleave(torch.tensor(lengths_N))


def on_responses(given: Arrays, array_NT: np.ndarray) -> np.ndarray:
    return array_NT[given["mask_NT"] > 0]


def same(ours: Any, expected: Any) -> None:
    np.testing.assert_allclose(np.asarray(ours), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("by_std", [True, False])
@pytest.mark.parametrize("size", GROUP_SIZES)
def test_advantages_equal_verl(given: Arrays, theirs: Arrays, size: int, by_std: bool) -> None:
    ours = group_advantages(given["rewards_N"].tolist(), size, by_std=by_std)
    rtol = 1e-6 if size == 1 else 1e-9  # theirs has 1 + 1e-6 in float32 for a group of one
    np.testing.assert_allclose(ours, theirs[f"verl/advantages_{size}_{by_std}"], rtol=rtol, atol=1e-9)


@pytest.mark.parametrize("size", [size for size in GROUP_SIZES if size > 1])
def test_advantages_equal_trl(given: Arrays, theirs: Arrays, size: int) -> None:
    """TRL adds 1e-4 to the deviation, verl 1e-6. A group of one has advantage 0 in TRL, its reward in verl and here."""
    ours = group_advantages(given["rewards_N"].tolist(), size, eps=1e-4)
    np.testing.assert_allclose(
        ours, theirs[f"trl/advantages_{size}"], rtol=1e-6, atol=1e-6
    )  # theirs has n / (n - 1) in float32


@pytest.mark.parametrize("distance", ["far", "near"])
def test_clipped_loss_equals_verl(given: Arrays, theirs: Arrays, distance: str) -> None:
    """``far`` up to ratios of e^150, without verl's dual clip; ``near`` with verl's defaults."""
    logprobs_R = responses(given, f"{distance}_logprobs_NT", grad=True)
    losses_R, clipped_R = clipped_loss(logprobs_R, responses(given, "old_NT"), responses(given, "advantages_NT"), *CLIP)
    loss = (weights(given, "token-mean") * losses_R).sum()
    loss.backward()
    same(loss.item(), theirs[f"verl/{distance}_loss"])
    assert logprobs_R.grad is not None
    same(logprobs_R.grad, on_responses(given, theirs[f"verl/{distance}_gradient"]))
    np.testing.assert_allclose(clipped_R.double().mean(), theirs[f"verl/{distance}_clipped"], rtol=1e-6)
    assert 0.05 < clipped_R.double().mean() < 0.95  # both sides of the clip were tried


@pytest.mark.parametrize("estimator", ["low_var_kl", "kl", "abs", "mse"])
def test_kl_estimates_equal_verl(given: Arrays, theirs: Arrays, estimator: str) -> None:
    logprobs_R = responses(given, "far_logprobs_NT", grad=True)
    values_R = kl_penalty(logprobs_R, responses(given, "ref_NT"), estimator)  # type: ignore[arg-type]
    values_R.sum().backward()
    same(values_R.detach(), on_responses(given, theirs[f"verl/{estimator}_values"]))
    assert logprobs_R.grad is not None
    same(logprobs_R.grad, on_responses(given, theirs[f"verl/{estimator}_gradient"]))
    if estimator == "low_var_kl":
        assert ((values_R == 10).any(), (values_R < 1).any()) == (True, True)  # the clamp was tried


@pytest.mark.parametrize("aggregation", ["token-mean", "micro-batch-mean"])
def test_averages_equal_verl(given: Arrays, theirs: Arrays, aggregation: str) -> None:
    same((weights(given, aggregation) * responses(given, "losses_NT")).sum(), theirs[f"verl/{aggregation}"])


# What selects each case here, beyond its clip, KL and entropy.
OURS = {
    "grpo_faithful": ["algorithm=grpo_faithful"],
    "grpo": ["algorithm=grpo"],
    "grpo_published": ["algorithm.loss_agg=seq-mean-token-mean"],
    "dr_grpo": ["algorithm=dr_grpo", f"algorithm.loss_scale_factor={HORIZON}"],
    "dapo": ["algorithm=dapo"],
    "gspo": ["algorithm=gspo"],
    "grpo_token_weights": ["algorithm=grpo", "algorithm.rollout_correction.rollout_is=token"],
    "grpo_sequence_weights": ["algorithm=grpo", "algorithm.rollout_correction.rollout_is=sequence"],
    "gspo_sequence_weights": ["algorithm=gspo", "algorithm.rollout_correction.rollout_is=sequence"],
}


def configured(name: str) -> GrpoConfig:
    case, actor = CASES[name], "actor_rollout_ref.actor"
    numbers = [
        f"{actor}.clip_ratio={case.clip[0]}",
        f"{actor}.clip_ratio_high={case.clip[1]}",
        f"{actor}.kl_loss_coef={case.beta}",
    ]
    numbers += [
        f"{actor}.entropy_coeff={case.entropy}",
        f"algorithm.rollout_correction.rollout_is_threshold={WEIGHT_CAP}",
    ]
    sizes = [
        f"{actor}.ppo_micro_batch_size_per_gpu=4",
        "trainer.n_gpus_per_node=1",
        "data.train_files=a",
        "actor_rollout_ref.model.path=m",
    ]
    return load_grpo_config([*OURS[name], *numbers, *sizes])


@pytest.mark.parametrize("library", ["verl", "trl"])
@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradient_of_each_algorithm_equal_verl_and_trl(
    given: Arrays, theirs: Arrays, name: str, library: str
) -> None:
    """The loss of a step under each preset: clip, importance weights, KL, entropy and average together."""
    cfg, case = configured(name), CASES[name]
    assert (cfg.actor_rollout_ref.actor.use_kl_loss, cfg.actor_rollout_ref.actor.entropy_coeff) == (
        case.beta > 0,
        case.entropy,
    )
    lengths_N = given["mask_NT"].sum(axis=1).astype(int).tolist()
    weights_N = token_weights(lengths_N, cfg.algorithm.loss_agg, MICRO_BATCH_SIZE, HORIZON)
    micro = collate(
        [Tree((1, 2), tuple(Branch((3,) * length) for length in lengths_N[i : i + 4])) for i in range(0, N, 4)]
    )
    columns = {
        "advantages_R": responses(given, "advantages_NT"),
        "weights_R": torch.tensor(weights_N, dtype=torch.float64).repeat_interleave(torch.tensor(lengths_N)),
        "old_logprobs_R": responses(given, "old_NT"),
        "sampler_logprobs_R": responses(given, "sampler_NT"),
        "ref_logprobs_R": responses(given, "near_ref_NT") if case.beta else None,
    }
    logprobs_R = responses(given, "near_logprobs_NT", grad=True)
    loss_of = grpo_loss(cfg.actor_rollout_ref.actor, cfg.algorithm)
    loss, report = loss_of(replace(micro, **columns), logprobs_R, responses(given, "entropies_NT"))
    torch.autograd.backward(loss)
    tolerance = {"rtol": 1e-7, "atol": 1e-9}  # verl divides by a length + 1e-8, TRL by a float32 normaliser
    np.testing.assert_allclose(report["loss"], theirs[f"{library}/{name}_loss"], **tolerance)
    assert logprobs_R.grad is not None
    np.testing.assert_allclose(logprobs_R.grad, on_responses(given, theirs[f"{library}/{name}_gradient"]), **tolerance)
    assert (
        0.05 < report["clip_rate"] / float((weights_N * np.array(lengths_N)).sum()) < 0.95
    )  # both sides of the clip were tried
    if case.weighted:
        weight = report["importance_weight"]
        assert 0 < weight < WEIGHT_CAP  # some weights are truncated, some are not
