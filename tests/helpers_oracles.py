"""Runs verl's and TRL's own functions on arrays from a file: ``python helpers_oracles.py INPUTS.npz OUTPUTS.npz``.

It is a process of its own because the two live in a folder that only its path names. What it writes is theirs alone: nothing of this project
is imported here.
"""

import ast
import inspect
import sys
import textwrap
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

Arrays = dict[str, Any]


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
            advantages_NT, _ = core_algos.compute_grpo_outcome_advantage(scores_NT, mask_NT, index, norm_adv_by_std_in_grpo=by_std)
            answers[f"advantages_{size}_{by_std}"] = advantages_NT[:, 0]
    low, high = given["clip"].tolist()
    for name in ("far", "near"):
        logprobs_NT = torch.tensor(given[f"{name}_logprobs_NT"], requires_grad=True)
        old_NT, advantages_NT = torch.tensor(given["old_NT"]), torch.tensor(given["advantages_NT"])
        # Their dual clip (a third bound, for negative advantages and ratios above 3) is put out of reach for "far".
        bound = {"far": 1e30, "near": 3.0}[name]
        config = ActorConfig(
            strategy="fsdp", rollout_n=1, use_dynamic_bsz=True, clip_ratio_low=low, clip_ratio_high=high, clip_ratio_c=bound
        )
        loss, metrics = core_algos.get_policy_loss_fn("vanilla")(old_NT, logprobs_NT, advantages_NT, mask_NT, "token-mean", config)
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
    return answers


def ask_trl(given: Arrays) -> Arrays:
    """Advantages and whole losses with their gradients, by ``trl.GRPOTrainer``'s own code."""
    from trl.trainer import grpo_trainer

    answers: Arrays = {f"advantages_{size}": trl_advantages(grpo_trainer, given["rewards_N"], int(size)) for size in given["group_sizes"]}
    # Their name of the average -> ours.
    for loss_type, aggregation in (("dapo", "token-mean"), ("bnpo", "micro-batch-mean")):
        logprobs_NT = torch.tensor(given["near_logprobs_NT"], requires_grad=True)
        loss = trl_loss(grpo_trainer.GRPOTrainer, given, logprobs_NT, loss_type)
        loss.backward()
        answers[f"{aggregation}_loss"], answers[f"{aggregation}_gradient"] = loss, logprobs_NT.grad
    return answers


def trl_advantages(module: Any, rewards_N: Any, group_size: int) -> torch.Tensor:
    """Executes the statement of their ``_generate_and_score_completions`` that turns rewards into advantages."""
    source = textwrap.dedent(inspect.getsource(module.GRPOTrainer._generate_and_score_completions))
    wanted = "self.multi_objective_aggregation == 'sum_then_normalize'"
    (statement,) = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.If) and ast.unparse(node.test) == wanted)
    trainer = SimpleNamespace(multi_objective_aggregation="sum_then_normalize", scale_rewards="group", reward_weights=torch.ones(1))
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


def trl_loss(trainer_class: Any, given: Arrays, logprobs_NT: torch.Tensor, loss_type: str) -> torch.Tensor:
    """The sum of their ``_compute_loss`` over the micro-batches of one optimiser step, called on a stand-in for the trainer."""
    size = int(given["micro_batch_size"])
    chunks = torch.arange(len(logprobs_NT)).split(size)
    mask_NT = torch.tensor(given["mask_NT"])
    low, high = given["clip"].tolist()
    trainer = SimpleNamespace(
        aux_loss_enabled=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        importance_sampling_level="token",
        beta=float(given["beta"]),
        epsilon_low=low,
        epsilon_high=high,
        loss_type=loss_type,
        use_vllm=False,
        args=SimpleNamespace(use_bias_correction_kl=False, delta=None, steps_per_generation=len(chunks)),
        model=SimpleNamespace(training=True),
        current_gradient_accumulation_steps=len(chunks),
        accelerator=SimpleNamespace(num_processes=1, gather=lambda value: value, reduce=lambda value, reduction: value),
        _entropy_bonus_enabled=False,
        _metrics=defaultdict(lambda: defaultdict(list)),
    )
    total = torch.zeros((), dtype=logprobs_NT.dtype)
    for rows in chunks:
        own_MT = logprobs_NT[rows]
        trainer._get_per_token_logps_and_entropies = lambda *args, own_MT=own_MT, **kwargs: (own_MT, torch.zeros_like(own_MT), None)
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
        total = total + trainer_class._compute_loss(trainer, None, inputs)
    return total


def main() -> None:
    given = dict(np.load(sys.argv[1]))
    answers = {f"verl/{name}": value for name, value in ask_verl(given).items()}
    answers |= {f"trl/{name}": value for name, value in ask_trl(given).items()}
    plain = {name: value.detach().numpy() if isinstance(value, torch.Tensor) else value for name, value in answers.items()}
    np.savez(sys.argv[2], **plain)


if __name__ == "__main__":
    main()
