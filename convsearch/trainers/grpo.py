"""The GRPO run around ``grpo_step``: builds the parts, resumes, validates, saves, exports."""

import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, nullcontext
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from tqdm import tqdm

from convsearch.cluster.launch import open_cluster, with_restarts
from convsearch.config import GrpoConfig
from convsearch.model import distributed
from convsearch.model.loading import load_tokenizer, pick_device
from convsearch.model.precision import settled
from convsearch.policy.policy import LocalPolicy
from convsearch.retriever.client import RetrieverClient
from convsearch.retriever.embedded import open_retriever
from convsearch.retriever.golds import rows_without_gold
from convsearch.rewards.scoring import Group, score
from convsearch.runs import checkpoint, folder, rollouts
from convsearch.runs.export import export as export_checkpoint
from convsearch.runs.stopping import Stopping
from convsearch.runs.throughput import Throughput, throughput_of
from convsearch.runs.tracking import Metrics, Tracker
from convsearch.sampling.overlap import OneStepAhead, Request
from convsearch.trainers import data
from convsearch.trainers.grpo_step import Trainer, grpo_step
from convsearch.types import Example

Draw = Callable[[int], Iterator[Example]]  # step -> its examples, then those that dynamic sampling goes on with


def train(cfg: GrpoConfig) -> None:
    """Runs or resumes the whole training; writes checkpoints, metrics.jsonl, rollouts/ and model/."""
    run_dir, model = Path(cfg.trainer.default_local_dir), cfg.actor_rollout_ref.model
    replay_from = cfg.actor_rollout_ref.rollout.replay_from
    url = "" if replay_from else cfg.retriever.resolved_url()
    cfg = with_dtypes(cfg)
    tokenizer = load_tokenizer(model.path, trust_remote_code=model.trust_remote_code)
    examples = in_order(cfg, read(cfg, tokenizer, cfg.data.train_files))
    held_out = read(cfg, tokenizer, cfg.data.val_files) if cfg.data.val_files and not replay_from else []
    total_steps = steps_of(cfg, examples)
    prompts = [example.prompt_ids for example in examples]
    made_of = folder.made_of(model.path, prompts, cfg.data.train_files, cfg.data.val_files if held_out else ())
    with folder.owned(run_dir):
        folder.claim(run_dir, cfg, made_of)
        if folder.trained(run_dir, total_steps):
            return
        with nullcontext() if replay_from else open_client(cfg, url) as client:
            if client:
                folder.check_made_of(run_dir, {"index": client.index_id()})
                examples, held_out = with_golds(cfg, client, examples, held_out)
                total_steps = steps_of(cfg, examples)
            draw = partial(draw_step, cfg, examples)
            attempt = partial(train_once, cfg, run_dir, total_steps, tokenizer, client, draw, held_out)
            with_restarts(cfg.trainer.max_restarts, attempt)
    best = checkpoint.best(run_dir, cfg.trainer.best_metric, cfg.trainer.best_mode)
    which = f"of {best[0].name} ({best[1].metric}={best[1].value:.4g}, the best) " if best else ""
    print(f"trained {total_steps} steps; the model {which}is in {run_dir / 'model'}")


def train_once(
    cfg: GrpoConfig,
    run_dir: Path,
    total_steps: int,
    tokenizer: Any,
    client: RetrieverClient | None,
    draw: Draw,
    held_out: Sequence[Example],
) -> None:
    """From the newest checkpoint to the exported model; ``client`` is None if a run is replayed."""
    replay_from = cfg.actor_rollout_ref.rollout.replay_from
    with open_cluster(cfg, run_dir, tokenizer) as parts:
        replay = rollouts.Replay(Path(replay_from), parts.first_step) if replay_from else None
        sampler, retriever = replay or parts.sampler, replay or client
        assert sampler is not None
        assert retriever is not None
        trainer = Trainer(cfg, run_dir, total_steps, sampler, retriever, parts.policy, parts.ref)
        sampler.load_weights(parts.policy, version=parts.first_step)
        learn(trainer, parts.first_step, tokenizer, draw, held_out)
        shutil.rmtree(run_dir / "model", ignore_errors=True)  # the rest of a killed export
        if best := checkpoint.best(run_dir, cfg.trainer.best_metric, cfg.trainer.best_mode):
            export_checkpoint(best[0], run_dir / "model", limit=sys.maxsize)  # as one file
        else:
            parts.policy.run(export, run_dir / "model", tokenizer)


def in_order(cfg: GrpoConfig, examples: list[Example]) -> list[Example]:
    """The examples in the order of the file, or those of middling difficulty first."""
    d = cfg.data
    return data.middling_first(examples, d.samples_file, d.seed) if d.samples_file else examples


def draw_step(cfg: GrpoConfig, examples: Sequence[Example], step: int) -> Iterator[Example]:
    """The examples of a step, then those that dynamic sampling goes on with."""
    d = cfg.data
    return data.stream_of(examples, d.train_batch_size, step, d.seed, d.shuffle and not d.samples_file)


def steps_of(cfg: GrpoConfig, examples: Sequence[Example]) -> int:
    """The number of training steps; ValueError if the examples do not fill one."""
    draw_step(cfg, examples, 0)
    steps_per_epoch = len(examples) // cfg.data.train_batch_size
    return cfg.trainer.total_training_steps or cfg.trainer.total_epochs * steps_per_epoch


def with_golds(
    cfg: GrpoConfig, client: RetrieverClient, examples: list[Example], held_out: list[Example]
) -> tuple[list[Example], list[Example]]:
    """Both without the rows whose gold passages the index lacks.

    Raises:
        ValueError: they are more than ``data.skip_bad``.
    """
    kept = []
    for rows, files in ((examples, cfg.data.train_files), (held_out, cfg.data.val_files)):
        golds = [(row.qid, row.gold_docids) for row in rows]
        bad = rows_without_gold(client, golds, ", ".join(files), cfg.data.skip_bad, "data.skip_bad")
        kept.append([row for number, row in enumerate(rows) if number not in bad])
    return kept[0], kept[1]


def with_dtypes(cfg: GrpoConfig) -> GrpoConfig:
    """``dtype=auto`` of policy and sampler becomes what it means on this machine.

    Raises:
        ValueError: there is no such device.
    """
    device, parts = pick_device(cfg.trainer.device), cfg.actor_rollout_ref
    chosen = {"model": settled(parts.model, device), "rollout": settled(parts.rollout, device)}
    return cfg.model_copy(update={"actor_rollout_ref": parts.model_copy(update=chosen)})


def read(cfg: GrpoConfig, tokenizer: Any, paths: Sequence[str]) -> list[Example]:
    """The rows of the files, with encoded prompts, under the configured length rule."""
    d = cfg.data
    examples = data.read_examples(paths, d.prompt_key)
    return data.encode(
        tokenizer, examples, d.max_prompt_length, filter_overlong=d.filter_overlong_prompts, truncation=d.truncation
    )


def open_client(cfg: GrpoConfig, url: str) -> RetrieverClient:
    """The retriever that gives the rewards, with an encoder if similarities are paid for."""
    r = cfg.retriever
    encoder = r.similarity_model if cfg.reward_model.reward.weights[1] else None
    return open_retriever(url, r.topk, r.timeout_s, r.max_wait_s, r.index, encoder)


def export(policy: LocalPolicy, target: Path, tokenizer: Any) -> None:
    """Every process helps to gather the weights; the first one writes."""
    weights = policy.weights()
    if distributed.rank() == 0:
        checkpoint.export(target, policy.causal_lm, tokenizer, weights)


def learn(t: Trainer, first_step: int, tokenizer: Any, draw: Draw, held_out: Sequence[Example]) -> None:
    """The remaining steps, with validation, metrics and checkpoints."""
    settings, total = t.cfg.trainer, t.total_steps
    rollout = t.cfg.actor_rollout_ref.rollout
    overlap = rollout.overlap and not rollout.replay_from
    ahead = OneStepAhead(t.sampler, partial(request, t, draw), first_step) if overlap else None
    t.sampler = ahead or t.sampler
    names = settings.logger, settings.project_name, settings.experiment_name
    tracker = Tracker(t.run_dir, *names, first_step, t.cfg.model_dump())
    if settings.val_before_train and first_step == 0 and held_out:
        tracker.log(-1, validate(t, held_out))
    rates = throughput_of(
        t.cfg.actor_rollout_ref.model.path, settings.peak_tflops, settings.device, settings.world_size
    )
    steps, save = range(first_step, total), partial(t.policy.run, checkpoint.save_by, t.run_dir, tokenizer, settings)
    with (
        closing(ahead) if ahead else nullcontext(),
        closing(tracker),
        Stopping(t.run_dir, settings, steps, settings.save_freq, save, t.cfg.guard) as stopping,
    ):
        for step in tqdm(steps, desc="GRPO", unit="step", initial=first_step, total=total):
            groups_P, metrics = grpo_step(t, step, draw(step))
            metrics |= rates_of(t, rates, groups_P, metrics)
            done = step + 1
            if held_out and settings.test_freq > 0 and (done % settings.test_freq == 0 or done == total):
                metrics |= validate(t, held_out)
            tracker.log(step, metrics)
            if tracker.shows_tables and settings.sample_table_freq > 0 and step % settings.sample_table_freq == 0:
                tracker.samples(step, rollouts.table(groups_P))
            stopping.after_step(step, metrics)


def rates_of(t: Trainer, rates: Throughput, groups_P: Sequence[Group], metrics: Metrics) -> Metrics:
    """Tokens per second, and MFU, of a step."""
    actor = t.cfg.actor_rollout_ref.actor
    drawn, trained = (
        [(len(some[0].example.prompt_ids), [len(r.completion.token_ids) for r in some]) for some in groups if some]
        for groups in ([group.rollouts for group in groups_P], [group.trained for group in groups_P])
    )
    passes, epochs = int(actor.use_kl_loss) + int(t.cfg.several_updates), actor.ppo_epochs
    return rates.of_grpo(drawn, trained, metrics, share_prompts=actor.share_prompts, passes=passes, epochs=epochs)


def request(t: Trainer, draw: Draw, step: int) -> Request | None:
    """What step ``step`` asks the sampler for first."""
    if step >= t.total_steps:
        return None
    rollout, examples = t.cfg.actor_rollout_ref.rollout, islice(draw(step), t.cfg.data.train_batch_size)
    return tuple(example.prompt_ids for example in examples), rollout.n, rollout.seed * 1_000_003 + step


def validate(t: Trainer, held_out: Sequence[Example]) -> Metrics:
    """Mean reward and reciprocal rank of one sample per held-out question, always with the same seed."""
    start, limit = time.monotonic(), t.cfg.data.val_max_samples
    rows = held_out[:limit] if limit > 0 else held_out
    seed = t.cfg.actor_rollout_ref.rollout.seed
    completions = [sample for (sample,) in t.sampler.generate([row.prompt_ids for row in rows], 1, seed=seed)]
    cfg = t.cfg.reward_model.reward
    shape = "rank_incentive" if cfg.name == "curriculum" else cfg.name  # a reward that changes would not compare
    cfg = cfg.model_copy(update={"language_guard": False, "name": shape})
    scores = score(cfg, t.retriever, rows, completions)
    ranks = [scored.feedback.rank for scored in scores]
    return {
        "val_reward": sum(scored.reward for scored in scores) / len(rows),
        "val_mrr": sum(1 / rank if rank else 0.0 for rank in ranks) / len(rows),
        "val_format_rate": sum(scored.rewrite.error is None for scored in scores) / len(rows),
        "val_s": time.monotonic() - start,
    }
