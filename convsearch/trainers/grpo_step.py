"""GRPO with a retriever as the teacher: ``python -m convsearch.grpo experiment=...``.

Differs from the textbook (arXiv 2402.03300) as ConvSearch-R1 does: the reward comes from a retriever (the gold passage's rank, the nearness to it, or a
mix: ``rewarder.py``), the reference is the SFT model, one on-policy update a step.

Ours, exact and switchable: each prompt is computed once for its whole group (``batch.py``).
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from convsearch.config import GrpoConfig

if TYPE_CHECKING:
    from pathlib import Path

    from convsearch.model.batch import MicroBatch, Tree
    from convsearch.policy.policy import Policy
    from convsearch.rewards.scoring import Judge, Score
    from convsearch.runs.tracking import Metrics
    from convsearch.sampling.hf import Sampler
    from convsearch.types import Completion, Example, Rollout


@dataclass(slots=True)
class Trainer:
    """The parts of a step. ``prompt_ids`` maps a query id to its encoded prompt."""

    cfg: GrpoConfig
    run_dir: "Path"
    prompt_ids: dict[str, tuple[int, ...]]
    sampler: "Sampler"
    retriever: "Judge"
    policy: "Policy"
    ref: "Policy | None"
    total_steps: int


def grpo_step(t: Trainer, step: int, examples_P: Sequence["Example"]) -> "Metrics":
    """Samples, ranks, rewards and learns once; returns what is worth a curve. ``step`` counts from 0."""
    from convsearch.algorithms import group_advantages
    from convsearch.algorithms.loss import grpo_loss
    from convsearch.model.batch import pack
    from convsearch.runs import rollouts
    from convsearch.trainers.schedule import lr_at

    actor, n = t.cfg.actor_rollout_ref.actor, t.cfg.actor_rollout_ref.rollout.n
    examples_N = [example for example in examples_P for _ in range(n)]
    clock = Clock()
    completions_N, scores_N = sample_and_score(t, step, examples_P, clock)
    advantages_N = group_advantages([scored.reward for scored in scores_N], n, by_std=t.cfg.algorithm.norm_adv_by_std)
    rollouts_N = assemble(t, step, examples_N, completions_N, scores_N, advantages_N)
    rollouts.dump(t.run_dir, step, rollouts_N)  # every step can be replayed

    lr = lr_at(
        step,
        t.total_steps,
        actor.optim.lr,
        actor.optim.lr_warmup_steps,
        actor.optim.lr_scheduler,
        actor.optim.min_lr_ratio,
    )
    world_size, limit = t.cfg.trainer.world_size, t.cfg.max_tokens_per_pass
    tight = t.cfg.actor_rollout_ref.model.use_remove_padding
    packed = [
        [with_references(t, micro) for micro in pack(trees, limit, world_size=world_size, remove_padding=tight)]
        for trees in minibatches(t.cfg, rollouts_N)
    ]
    clock.lap("reference_s")
    updates = []
    for micros in packed:
        reports = [t.policy.forward_backward(micro, grpo_loss(actor, t.cfg.algorithm)) for micro in micros]
        updates.append({**summed(reports), **t.policy.optim_step(lr)})
    clock.lap("update_s")
    t.sampler.load_weights(t.policy, version=step + 1)
    return {**rollout_metrics(rollouts_N, n), **mean_of(updates), **clock.laps}


def sample_and_score(
    t: Trainer, step: int, examples_P: Sequence["Example"], clock: "Clock"
) -> tuple[list["Completion"], list["Score"]]:
    """n samples a prompt with what they earn, group-major; under ``algorithm.filter_groups`` equal groups are drawn again.

    What is finished is scored while the rest is still being generated.
    """
    from convsearch.algorithms.dynamic_sampling import draw_until_spread
    from convsearch.rewards.scoring import score_stream

    rollout, filters = t.cfg.actor_rollout_ref.rollout, t.cfg.algorithm.filter_groups

    def draw(chosen_P: list[int], number: int) -> list[list[tuple["Completion", "Score"]]]:
        examples = [examples_P[p] for p in chosen_P]
        prompts = [t.prompt_ids[example.qid] for example in examples]
        parts = t.sampler.stream(prompts, rollout.n, seed=(rollout.seed + 7919 * number) * 1_000_003 + step)
        scored = score_stream(
            t.cfg.reward_model.reward, t.retriever, examples, parts, step / t.total_steps, lambda: clock.lap("sample_s")
        )
        clock.lap("rank_s")
        return [scored[start : start + rollout.n] for start in range(0, len(scored), rollout.n)]

    def has_spread(group: list[tuple["Completion", "Score"]]) -> bool:
        return len({scored.reward for _, scored in group}) > 1

    rounds = filters.max_num_gen_batches if filters.enable and not rollout.replay_from else 1
    groups_P = draw_until_spread(draw, has_spread, len(examples_P), rounds)
    pairs_N = [pair for group in groups_P for pair in group]
    return [completion for completion, _ in pairs_N], [scored for _, scored in pairs_N]


def assemble(
    t: Trainer,
    step: int,
    examples_N: Sequence["Example"],
    completions_N: Sequence["Completion"],
    scores_N: Sequence["Score"],
    advantages_N: Sequence[float],
) -> list["Rollout"]:
    """The columns of a step as rollouts. A sample of other weights than the step's would spoil the ratio unnoticed: it ends the run."""
    from convsearch.types import Rollout

    allowed = 1 if t.cfg.actor_rollout_ref.rollout.overlap else 0
    versions = {completion.weights_version for completion in completions_N}
    if not all(step - allowed <= version <= step for version in versions):
        raise RuntimeError(
            f"step {step} got samples of the weights of step {sorted(versions)}, {allowed} behind at most are allowed: a sampler has missed an update"
        )
    return [
        Rollout(
            example.qid,
            t.prompt_ids[example.qid],
            completion,
            scored.rewrite,
            scored.rank,
            scored.reward,
            advantage,
            scored.gain,
        )
        for example, completion, scored, advantage in zip(
            examples_N, completions_N, scores_N, advantages_N, strict=True
        )
    ]


def minibatches(cfg: GrpoConfig, rollouts_N: Sequence["Rollout"]) -> list[list["Tree"]]:
    """Rollouts -> one list of trees an optimiser step, with the weight that the loss aggregation gives to each sample's tokens."""
    from convsearch.algorithms import token_weights
    from convsearch.model.batch import Branch, Tree, unshared

    actor, n = cfg.actor_rollout_ref.actor, cfg.actor_rollout_ref.rollout.n
    size = actor.ppo_mini_batch_size * n
    result = []
    for start in list(range(0, len(rollouts_N), size)) * actor.ppo_epochs:
        mini = rollouts_N[start : start + size]
        if cfg.algorithm.filter_groups.enable:
            groups = [mini[g : g + n] for g in range(0, len(mini), n)]
            spread = [group for group in groups if len({rollout.reward for rollout in group}) > 1]
            mini = [rollout for group in spread or groups[:1] for rollout in group]
        lengths = [len(rollout.completion.token_ids) for rollout in mini]
        scale = cfg.algorithm.loss_scale_factor or cfg.data.max_response_length
        weights = token_weights(lengths, cfg.algorithm.loss_agg, actor.ppo_micro_batch_size_per_gpu, scale)
        branches = [
            Branch(rollout.completion.token_ids, rollout.advantage, weight, rollout.completion.logprobs)
            for rollout, weight in zip(mini, weights, strict=True)
        ]
        trees = [Tree(mini[g].prompt_ids, tuple(branches[g : g + n])) for g in range(0, len(mini), n)]
        if actor.skip_zero_advantage:
            trees = [tree for tree in trees if any(branch.advantage for branch in tree.branches)] or trees[:1]
        result.append(trees if actor.share_prompts else unshared(trees))
    return result


def with_references(t: Trainer, micro: "MicroBatch") -> "MicroBatch":
    """Adds the reference's log-probs, and the policy's own of before the first update when a step makes several."""
    actor = t.cfg.actor_rollout_ref.actor
    if t.ref is not None:
        micro = replace(micro, ref_logprobs_R=t.ref.logprobs(micro))
    if t.cfg.data.train_batch_size > actor.ppo_mini_batch_size or actor.ppo_epochs > 1:
        micro = replace(micro, old_logprobs_R=t.policy.logprobs(micro))
    return micro


class Clock:
    """Seconds by phase; a phase that comes twice adds up."""

    def __init__(self) -> None:
        self.start = self.last = time.monotonic()
        self.laps: dict[str, float] = {}

    def lap(self, name: str) -> None:
        now = time.monotonic()
        self.laps[name] = self.laps.get(name, 0.0) + now - self.last
        self.laps["step_s"] = now - self.start
        self.last = now


def summed(reports: Sequence[dict[str, float]]) -> dict[str, float]:
    return {name: sum(report[name] for report in reports) for name in reports[0]}


def mean_of(reports: Sequence[dict[str, float]]) -> dict[str, float]:
    return {name: value / len(reports) for name, value in summed(reports).items()}


def rollout_metrics(rollouts_N: Sequence["Rollout"], n: int) -> "Metrics":
    """Means over the samples, and the share of groups whose rewards differ (those that teach)."""
    from convsearch.rewards.shapes import non_latin_share

    total = len(rollouts_N)
    groups = [rollouts_N[i : i + n] for i in range(0, total, n)]
    lengths = [len(rollout.completion.token_ids) for rollout in rollouts_N]
    gains = [rollout.gain for rollout in rollouts_N if rollout.gain is not None]
    return ({"similarity_gain": sum(gains) / len(gains)} if gains else {}) | {
        "reward": sum(rollout.reward for rollout in rollouts_N) / total,
        "format_rate": sum(rollout.rewrite.error is None for rollout in rollouts_N) / total,
        "rank1_rate": sum(rollout.rank == 1 for rollout in rollouts_N) / total,
        "found_rate": sum(rollout.rank is not None for rollout in rollouts_N) / total,
        "mrr": sum(1 / rollout.rank if rollout.rank else 0.0 for rollout in rollouts_N) / total,
        "spread_rate": sum(len({rollout.reward for rollout in group}) > 1 for group in groups) / len(groups),
        "response_tokens": sum(lengths) / total,
        "non_latin_share": sum(non_latin_share(rollout.completion.text) for rollout in rollouts_N) / total,
        "truncated_rate": sum(rollout.completion.finish_reason == "length" for rollout in rollouts_N) / total,
    }
