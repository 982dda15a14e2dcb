"""One step of GRPO with a retriever as the teacher, on one screen: ``grpo_step``.

Differs from the textbook (arXiv 2402.03300) as ConvSearch-R1 does: a retriever gives the reward (the gold passage's
rank, the similarity to it, or a mix: ``rewards/``), the reference is the SFT model, and a step makes one on-policy
update. Ours, exact and switchable: each prompt is computed once for its whole group (``model/batch.py``).
"""

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from convsearch.algorithms.advantages import group_advantages
from convsearch.algorithms.averages import token_weights
from convsearch.algorithms.dynamic_sampling import draw_until_spread
from convsearch.algorithms.loss import grpo_loss
from convsearch.algorithms.max_variance import max_variance_subset
from convsearch.config import GrpoConfig
from convsearch.config.grpo import ActorConfig, AlgorithmConfig
from convsearch.model.batch import Branch, MicroBatch, Tree, pack, unshared
from convsearch.policy.base import Policy, Reference
from convsearch.rewards.scoring import Group, Retriever, score_stream
from convsearch.rewards.shapes import non_latin_share
from convsearch.runs import rollouts
from convsearch.runs.tracking import Metrics
from convsearch.sampling.base import Sampler
from convsearch.trainers.schedule import lr_at
from convsearch.types import Example


@dataclass(slots=True)
class Trainer:
    """The parts of a step, and the configuration that they were built from."""

    cfg: GrpoConfig
    run_dir: Path
    total_steps: int
    sampler: Sampler
    retriever: Retriever
    policy: Policy
    ref: Reference | None


def grpo_step(t: Trainer, step: int, examples: Iterable[Example]) -> tuple[list[Group], Metrics]:
    """Samples, ranks, rewards and learns once; returns all groups drawn and the metrics.

    Args:
        step: counts from 0.
        examples: at least ``data.train_batch_size``; dynamic sampling goes on with those that follow.
    """
    actor, algorithm, clock = t.cfg.actor_rollout_ref.actor, t.cfg.algorithm, Clock()
    groups_P = sample_and_score(t, step, examples, clock)
    check_versions(groups_P, step, allowed=1 if t.cfg.actor_rollout_ref.rollout.overlap else 0)
    groups_P = with_advantages(groups_P, t.cfg)
    rollouts.dump(t.run_dir, step, groups_P)  # every step can be replayed

    minis = minibatches(groups_P, actor, algorithm, t.cfg.data.max_response_length)
    batches = [[with_logprobs(t, micro) for micro in packed(t.cfg, trees)] for trees in minis]
    clock.lap("reference_s")
    optim, loss, updates = actor.optim, grpo_loss(actor, algorithm), []
    lr = lr_at(step, t.total_steps, optim.lr, optim.lr_warmup_steps, optim.lr_scheduler, optim.min_lr_ratio)
    for micros in batches * actor.ppo_epochs:
        reports = [t.policy.forward_backward(micro, loss) for micro in micros]
        updates.append({**summed(reports), **t.policy.optim_step(lr)})
    clock.lap("update_s")
    t.sampler.load_weights(t.policy, version=step + 1)
    return groups_P, {**rollout_metrics(groups_P), **mean_of(updates), **clock.laps}


def sample_and_score(t: Trainer, step: int, examples: Iterable[Example], clock: "Clock") -> list[Group]:
    """The scored groups, in the order of drawing. Finished samples are scored while others are generated.

    With ``algorithm.filter_groups``, other prompts follow for the groups without spread.
    """
    rollout, filters = t.cfg.actor_rollout_ref.rollout, t.cfg.algorithm.filter_groups

    def draw(chosen_P: list[Example], number: int) -> list[Group]:
        prompts = [example.prompt_ids for example in chosen_P]
        finished = t.sampler.stream(prompts, rollout.n, seed=(rollout.seed + 7919 * number) * 1_000_003 + step)
        progress, reward = step / t.total_steps, t.cfg.reward_model.reward
        groups = score_stream(reward, t.retriever, chosen_P, finished, progress, lambda: clock.lap("sample_s"))
        clock.lap("rank_s")
        return groups

    rounds = filters.max_num_gen_batches if filters.enable else 1
    return draw_until_spread(examples, t.cfg.data.train_batch_size, draw, lambda group: group.has_spread, rounds)


def check_versions(groups_P: Sequence[Group], step: int, allowed: int) -> None:
    """Samples of unexpected weights would spoil the ratio unnoticed: they end the run.

    Args:
        allowed: how many steps old the sampler's weights may be.
    """
    versions = {rollout.completion.weights_version for group in groups_P for rollout in group.rollouts}
    if not all(step - allowed <= version <= step for version in versions):
        drawn = f"step {step} got samples of the weights of step {sorted(versions)}"
        raise RuntimeError(f"{drawn}, at most {allowed} behind are allowed: a sampler has missed an update")


def with_advantages(groups_P: Sequence[Group], cfg: GrpoConfig) -> list[Group]:
    """The groups with the samples to train on marked, and with their advantages.

    With ``algorithm.filter_groups``, these are samples of groups with spread; if there is none, of the first group.
    """
    teaches_P = [group.has_spread or not cfg.algorithm.filter_groups.enable for group in groups_P]
    teaches_P[0] |= not any(teaches_P)
    size, by_std = cfg.actor_rollout_ref.rollout.trained, cfg.algorithm.norm_adv_by_std
    return [marked(group, size if teaches else 0, by_std) for group, teaches in zip(groups_P, teaches_P, strict=True)]


def marked(group: Group, size: int, by_std: bool) -> Group:
    """The group with ``size`` samples to train on, whose advantages compare only those."""
    rewards_G = [rollout.score.reward for rollout in group.rollouts]
    chosen = max_variance_subset(rewards_G, size) if size else []
    values = group_advantages([rewards_G[g] for g in chosen], size, by_std=by_std) if size else []
    advantages, rollouts_G = dict(zip(chosen, values, strict=True)), enumerate(group.rollouts)
    return Group(tuple(replace(r, advantage=advantages.get(g, 0.0), trained=g in advantages) for g, r in rollouts_G))


def minibatches(
    groups_P: Sequence[Group], actor: ActorConfig, algorithm: AlgorithmConfig, max_response_length: int
) -> list[list[Tree]]:
    """One list of trees per optimizer step of an epoch; the loss aggregation decides the weight of each token."""
    scale, size = algorithm.loss_scale_factor or max_response_length, actor.ppo_mini_batch_size
    trained, result = [group for group in groups_P if group.trained], []
    for start in range(0, len(trained), size):
        mini = trained[start : start + size]
        lengths = [len(rollout.completion.token_ids) for group in mini for rollout in group.trained]
        weights = iter(token_weights(lengths, algorithm.loss_agg, actor.ppo_micro_batch_size_per_gpu, scale))
        trees = [tree_of(group, weights) for group in mini]
        if actor.skip_zero_advantage:
            trees = [tree for tree in trees if any(branch.advantage for branch in tree.branches)] or trees[:1]
        result.append(trees if actor.share_prompts else unshared(trees))
    return result


def tree_of(group: Group, weights: Iterator[float]) -> Tree:
    """The group as a prompt with one branch per sample; takes one weight per sample."""
    branches = tuple(
        Branch(r.completion.token_ids, r.advantage, next(weights), r.completion.logprobs) for r in group.trained
    )
    return Tree(group.rollouts[0].example.prompt_ids, branches)


def packed(cfg: GrpoConfig, trees: Sequence[Tree]) -> Iterator[MicroBatch]:
    """Micro-batches of the configured size for all processes of the policy."""
    remove_padding = cfg.actor_rollout_ref.model.use_remove_padding
    return pack(trees, cfg.max_tokens_per_pass, world_size=cfg.trainer.world_size, remove_padding=remove_padding)


def with_logprobs(t: Trainer, micro: MicroBatch) -> MicroBatch:
    """Adds the reference's log-probs and, if a step makes several updates, the policy's from before the first."""
    if t.ref is not None:
        micro = replace(micro, ref_logprobs_R=t.ref.logprobs(micro))
    if t.cfg.several_updates:
        micro = replace(micro, old_logprobs_R=t.policy.logprobs(micro))
    return micro


class Clock:
    """Seconds per phase; a phase that occurs twice adds up."""

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


def rollout_metrics(groups_P: Sequence[Group]) -> Metrics:
    """Means over all samples drawn, and the share of groups whose rewards differ (only those teach)."""
    scores = [rollout.score for group in groups_P for rollout in group.rollouts]
    completions = [rollout.completion for group in groups_P for rollout in group.rollouts]
    ranks = [score.feedback.rank for score in scores]
    gains = [score.feedback.gain for score in scores if score.feedback.gain is not None]
    total = len(scores)
    return ({"similarity_gain": sum(gains) / len(gains)} if gains else {}) | {
        "reward": sum(score.reward for score in scores) / total,
        "format_rate": sum(score.rewrite.error is None for score in scores) / total,
        "rank1_rate": sum(rank == 1 for rank in ranks) / total,
        "found_rate": sum(rank is not None for rank in ranks) / total,
        "mrr": sum(1 / rank if rank else 0.0 for rank in ranks) / total,
        "spread_rate": sum(group.has_spread for group in groups_P) / len(groups_P),
        "response_tokens": sum(len(completion.token_ids) for completion in completions) / total,
        "non_latin_share": sum(non_latin_share(completion.text) for completion in completions) / total,
        "truncated_rate": sum(completion.finish_reason == "length" for completion in completions) / total,
    }
