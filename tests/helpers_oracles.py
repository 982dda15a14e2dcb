"""Runs verl's and TRL's own functions on arrays from a file: ``python helpers_oracles.py INPUTS.npz OUTPUTS.npz``.

It is a process of its own because the two are in a folder that only its path names. What it writes is theirs alone:
nothing of this project is imported here.
"""

import ast
import inspect
import sys
import textwrap
from collections import defaultdict
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
import torch

Arrays = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """One algorithm in the settings of verl and TRL. ``pieces``: the mean of micro-batches' means, not of one batch."""

    verl_average: str
    trl_loss: str
    verl_loss: str = "vanilla"
    pieces: bool = False
    clip: tuple[float, float] = (0.2, 0.2)
    beta: float = 0.04
    entropy: float = 0.0
    weighted: Literal["token", "sequence"] | None = None


WEIGHT_CAP, HORIZON = 1.3, 32
CASES = {
    "grpo_faithful": Case("token-mean", "bnpo", pieces=True, entropy=0.01),
    "grpo": Case("token-mean", "dapo"),
    "grpo_published": Case("seq-mean-token-mean", "grpo"),
    "dr_grpo": Case("seq-mean-token-sum-norm", "dr_grpo"),
    "dapo": Case("token-mean", "dapo", clip=(0.2, 0.28), beta=0.0),
    "gspo": Case("seq-mean-token-mean", "grpo", verl_loss="gspo", clip=(0.01, 0.02)),
    "grpo_token_weights": Case("token-mean", "dapo", weighted="token"),
    "grpo_sequence_weights": Case("token-mean", "dapo", weighted="sequence"),
    "gspo_sequence_weights": Case(
        "seq-mean-token-mean", "grpo", verl_loss="gspo", clip=(0.01, 0.02), weighted="sequence"
    ),
}


def ask_verl(given: Arrays) -> Arrays:
    """Advantages, policy losses, KL estimates and averages, by ``verl.trainer.ppo.core_algos``."""
    from verl.trainer.ppo import core_algos
    from verl.workers.config import ActorConfig

    answers: Arrays = {}
    mask_NT = torch.tensor(given["mask_NT"])
    for size in given["group_sizes"]:
        scores_NT = torch.zeros_like(mask_NT)
        scores_NT[:, 0] = torch.tensor(given["rewards_N"])  # the reward stands on one token; they sum over the row
        index = np.arange(len(mask_NT)) // size
        for by_std in (True, False):
            advantages_NT, _ = core_algos.compute_grpo_outcome_advantage(
                scores_NT, mask_NT, index, norm_adv_by_std_in_grpo=by_std
            )
            answers[f"advantages_{size}_{by_std}"] = advantages_NT[:, 0]
    low, high = given["clip"].tolist()
    for name in ("far", "near"):
        logprobs_NT = torch.tensor(given[f"{name}_logprobs_NT"], requires_grad=True)
        old_NT, advantages_NT = torch.tensor(given["old_NT"]), torch.tensor(given["advantages_NT"])
        # Their dual clip (a third bound, for negative advantages and ratios above 3) is put out of reach for "far".
        bound = {"far": 1e30, "near": 3.0}[name]
        config = ActorConfig(
            strategy="fsdp",
            rollout_n=1,
            use_dynamic_bsz=True,
            clip_ratio_low=low,
            clip_ratio_high=high,
            clip_ratio_c=bound,
        )
        loss, metrics = core_algos.get_policy_loss_fn("vanilla")(
            old_NT, logprobs_NT, advantages_NT, mask_NT, "token-mean", config
        )
        loss.backward()
        answers[f"{name}_loss"], answers[f"{name}_gradient"] = loss, logprobs_NT.grad
        answers[f"{name}_clipped"] = np.array(metrics["actor/pg_clipfrac"])
    for estimator in ("low_var_kl", "kl", "abs", "mse"):
        logprobs_NT = torch.tensor(given["far_logprobs_NT"], requires_grad=True)
        values_NT = core_algos.kl_penalty(logprobs_NT, torch.tensor(given["ref_NT"]), estimator)
        values_NT.sum().backward()
        answers[f"{estimator}_values"], answers[f"{estimator}_gradient"] = values_NT, logprobs_NT.grad
    losses_NT = torch.tensor(given["losses_NT"])
    answers["token-mean"] = core_algos.agg_loss(losses_NT, mask_NT, "token-mean")
    size = int(given["micro_batch_size"])
    means = [
        core_algos.agg_loss(loss_MT, keep_MT, "token-mean")
        for loss_MT, keep_MT in zip(losses_NT.split(size), mask_NT.split(size), strict=True)
    ]
    answers["micro-batch-mean"] = torch.stack(means).mean()
    for name, case in CASES.items():
        answers[f"{name}_loss"], answers[f"{name}_gradient"] = verl_case(given, case)
    return answers


def verl_case(given: Arrays, case: Case) -> tuple[torch.Tensor, Any]:
    """The loss of their actor (``verl.workers.utils.losses.ppo_loss``: policy - entropy + KL), and its gradient."""
    from verl.trainer.ppo import core_algos
    from verl.trainer.ppo.rollout_corr_helper import compute_rollout_correction_weights
    from verl.workers.config import ActorConfig

    logprobs_NT = torch.tensor(given["near_logprobs_NT"], requires_grad=True)
    names = ("mask_NT", "old_NT", "sampler_NT", "near_ref_NT", "advantages_NT", "entropies_NT")
    columns = {name: torch.tensor(given[name]) for name in names}
    config = ActorConfig(
        strategy="fsdp", rollout_n=1, use_dynamic_bsz=True, clip_ratio_low=case.clip[0], clip_ratio_high=case.clip[1]
    )
    config.global_batch_info.update(loss_scale_factor=HORIZON)
    losses = []
    for rows in torch.arange(len(logprobs_NT)).split(
        int(given["micro_batch_size"]) if case.pieces else len(logprobs_NT)
    ):
        mask, old, sampler, ref, advantages, entropies = (columns[name][rows] for name in names)
        weights = None
        if case.weighted:
            weights, _ = compute_rollout_correction_weights(old - sampler, mask, case.weighted, WEIGHT_CAP)
        policy_loss = core_algos.get_policy_loss_fn(case.verl_loss)
        loss, _ = policy_loss(old, logprobs_NT[rows], advantages, mask, case.verl_average, config, weights)
        kl = core_algos.kl_penalty(logprobs_NT[rows], ref, "low_var_kl")
        info = config.global_batch_info
        loss = loss + case.beta * core_algos.agg_loss(kl, mask, case.verl_average, **info)
        losses.append(loss - case.entropy * core_algos.agg_loss(entropies, mask, case.verl_average, **info))
    loss = torch.stack(losses).mean()
    loss.backward()
    return loss, logprobs_NT.grad


def ask_trl(given: Arrays) -> Arrays:
    """Advantages and whole losses with their gradients, by ``trl.GRPOTrainer``'s own code."""
    from trl.trainer import grpo_trainer

    answers: Arrays = {
        f"advantages_{size}": trl_advantages(grpo_trainer, given["rewards_N"], int(size))
        for size in given["group_sizes"]
    }
    for name, case in CASES.items():
        logprobs_NT = torch.tensor(given["near_logprobs_NT"], requires_grad=True)
        loss = trl_loss(grpo_trainer, given, logprobs_NT, case)
        loss.backward()
        answers[f"{name}_loss"], answers[f"{name}_gradient"] = loss, logprobs_NT.grad
    return answers


def trl_advantages(module: Any, rewards_N: Any, group_size: int) -> torch.Tensor:
    """Executes the statement of their ``_generate_and_score_completions`` that turns rewards into advantages."""
    source = textwrap.dedent(inspect.getsource(module.GRPOTrainer._generate_and_score_completions))
    wanted = "self.multi_objective_aggregation == 'sum_then_normalize'"
    (statement,) = (
        node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.If) and ast.unparse(node.test) == wanted
    )
    trainer = SimpleNamespace(
        multi_objective_aggregation="sum_then_normalize", scale_rewards="group", reward_weights=torch.ones(1)
    )
    rewards_per_func = torch.tensor(rewards_N)[:, None]
    names = {
        **vars(module),
        "self": trainer,
        "rewards_per_func": rewards_per_func,
        "unscorable_mask": torch.isnan(rewards_per_func).all(dim=1),
        "num_generations": group_size,
        "device": "cpu",
    }
    exec(compile(ast.Module([statement], []), "trl", "exec"), names)
    return names["advantages"]


def trl_loss(module: Any, given: Arrays, logprobs_NT: torch.Tensor, case: Case) -> torch.Tensor:
    """The sum of their ``_compute_loss`` over the micro-batches of an optimiser step, on a fake trainer."""
    chunks = torch.arange(len(logprobs_NT)).split(int(given["micro_batch_size"]) if case.pieces else len(logprobs_NT))
    mask_NT = torch.tensor(given["mask_NT"])
    trainer = SimpleNamespace(
        aux_loss_enabled=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        importance_sampling_level="sequence" if case.verl_loss == "gspo" else "token",
        beta=case.beta,
        epsilon_low=case.clip[0],
        epsilon_high=case.clip[1],
        loss_type=case.trl_loss,
        max_completion_length=HORIZON,
        use_vllm=case.weighted is not None,
        vllm_importance_sampling_correction=True,
        vllm_importance_sampling_mode=f"{case.weighted}_truncate",
        vllm_importance_sampling_clip_min=None,
        vllm_importance_sampling_clip_max=WEIGHT_CAP,
        args=SimpleNamespace(use_bias_correction_kl=False, delta=None, steps_per_generation=len(chunks)),
        model=SimpleNamespace(training=True),
        current_gradient_accumulation_steps=len(chunks),
        accelerator=SimpleNamespace(
            num_processes=1, sync_gradients=True, gather=lambda value: value, reduce=lambda value, reduction: value
        ),
        _entropy_bonus_enabled=case.entropy > 0,
        use_adaptive_entropy=False,
        entropy_coef=case.entropy,
        _metrics=defaultdict(lambda: defaultdict(list)),
    )
    total = torch.zeros((), dtype=logprobs_NT.dtype)
    for rows in chunks:
        own_MT, entropies_MT = logprobs_NT[rows], torch.tensor(given["entropies_NT"])[rows]
        trainer._get_per_token_logps_and_entropies = lambda *_, own=(own_MT, entropies_MT, None), **__: own
        ids_MT = torch.zeros(own_MT.shape, dtype=torch.long)
        inputs = {
            "prompt_ids": ids_MT[:, :1],
            "prompt_mask": ids_MT[:, :1],
            "completion_ids": ids_MT,
            "completion_mask": mask_NT[rows],
            "advantages": torch.tensor(given["advantages_NT"])[rows],
            "old_per_token_logps": torch.tensor(given["old_NT"])[rows],
            "ref_per_token_logps": torch.tensor(given["near_ref_NT"])[rows],
            "num_items_in_batch": mask_NT.sum(),
        }
        if case.weighted:
            inputs["importance_sampling_ratio"] = trl_weights(module, trainer, given, mask_NT)[rows]
        total = total + module.GRPOTrainer._compute_loss(trainer, None, inputs)
    return total


def trl_weights(module: Any, trainer: Any, given: Arrays, mask_NT: torch.Tensor) -> torch.Tensor:
    """Executes the statement of their ``_generate_and_score_completions`` that weighs the samples of another engine."""
    source = textwrap.dedent(inspect.getsource(module.GRPOTrainer._generate_and_score_completions))
    wanted = "self.use_vllm and self.vllm_importance_sampling_correction"
    found = [
        node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.If) and ast.unparse(node.test) == wanted
    ]
    (statement,) = (
        node for node in found if "torch.exp(logps_diff)" in ast.unparse(node)
    )  # the others log and pass on
    names = {
        **vars(module),
        "self": trainer,
        "completion_mask": mask_NT,
        "tool_mask": None,
        "old_per_token_logps": torch.tensor(given["old_NT"]),
        "sampling_per_token_logps": torch.tensor(given["sampler_NT"]),
    }
    exec(compile(ast.Module([statement], []), "trl", "exec"), names)
    return names["vllm_importance_sampling_ratio"]


def main() -> None:
    given = dict(np.load(sys.argv[1]))
    answers = {f"verl/{name}": value for name, value in ask_verl(given).items()}
    answers |= {f"trl/{name}": value for name, value in ask_trl(given).items()}
    plain = {
        name: value.detach().numpy() if isinstance(value, torch.Tensor) else value for name, value in answers.items()
    }
    np.savez(sys.argv[2], **plain)


if __name__ == "__main__":
    main()
