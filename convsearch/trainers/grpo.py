"""Around the GRPO step: assemble the parts, resume, validate, save, export."""

import time
from collections.abc import Sequence
from contextlib import closing, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from tqdm import tqdm

from convsearch.cluster.launch import Parts, open_cluster, with_restarts
from convsearch.config import GrpoConfig
from convsearch.model import distributed, lora
from convsearch.model.loading import encode_chat, load_model, load_tokenizer, pick_device
from convsearch.policy.policy import Policy
from convsearch.retriever.client import open_retriever
from convsearch.rewards.scoring import score
from convsearch.runs import checkpoint, rollouts
from convsearch.runs import folder as runs
from convsearch.runs.stopping import Stopping
from convsearch.runs.throughput import throughput_of
from convsearch.runs.tracking import Metrics, Tracker
from convsearch.sampling.overlap import OneStepAhead, Request
from convsearch.trainers import data
from convsearch.trainers.grpo_step import Trainer, grpo_step
from convsearch.types import Example


def train(cfg: GrpoConfig) -> None:
    """Runs or resumes the whole training; leaves checkpoints, ``metrics.jsonl``, ``rollouts/`` and the exported ``model/`` in the run folder."""
    run_dir, replay_from = Path(cfg.trainer.default_local_dir), cfg.actor_rollout_ref.rollout.replay_from
    url = "" if replay_from else cfg.retriever.resolved_url()
    pick_device(cfg.trainer.device)  # an error now rather than in a worker
    examples = data.read_examples(cfg.data.train_files, cfg.data.prompt_key)
    held_out = (
        data.read_examples(cfg.data.val_files, cfg.data.prompt_key) if cfg.data.val_files and not replay_from else []
    )
    tokenizer = load_tokenizer(
        cfg.actor_rollout_ref.model.path, trust_remote_code=cfg.actor_rollout_ref.model.trust_remote_code
    )
    examples, prompt_ids = encode(cfg, tokenizer, examples)
    held_out, held_out_ids = encode(cfg, tokenizer, held_out) if held_out else ([], {})
    if clashes := [qid for qid, ids in held_out_ids.items() if prompt_ids.get(qid, ids) != ids]:
        raise ValueError(
            f"query id {clashes[0]!r} names one prompt in data.train_files and another in data.val_files; rename one of them"
        )
    data.batch_indices(
        len(examples), cfg.data.train_batch_size, 0, cfg.data.seed
    )  # an error now rather than after loading a model
    total_steps = cfg.trainer.total_training_steps or cfg.trainer.total_epochs * (
        len(examples) // cfg.data.train_batch_size
    )
    runs.claim(run_dir, cfg)
    if runs.trained(run_dir, total_steps):
        return
    r = cfg.retriever
    wait = {"timeout_s": r.timeout_s, "max_wait_s": r.max_wait_s}
    replay = nullcontext(rollouts.Replay(Path(replay_from), 0)) if replay_from else None
    encoder = r.similarity_model if cfg.reward_model.reward.weights[1] else None
    with replay or open_retriever(url, depth=r.topk, index=r.index, similarity_model=encoder, **wait) as retriever:

        def work() -> None:
            with open_cluster(cfg, run_dir, tokenizer) as parts:
                sampler = parts.sampler
                if isinstance(retriever, rollouts.Replay):
                    sampler, retriever.step = retriever, parts.first_step
                assert sampler is not None
                trainer = Trainer(
                    cfg, run_dir, prompt_ids | held_out_ids, sampler, retriever, parts.policy, parts.ref, total_steps
                )
                sampler.load_weights(parts.policy, version=parts.first_step)
                learn(trainer, parts, tokenizer, examples, held_out)
                parts.on_ranks(export, run_dir / "model", tokenizer)

        with_restarts(cfg, work)
    print(f"trained {total_steps} steps; the model is in {run_dir / 'model'}")


def export(policy: Policy, folder: Path, tokenizer: Any) -> None:
    """Every rank helps to gather the weights, the first one writes."""
    weights = policy.weights()
    if distributed.rank() == 0:
        checkpoint.export(folder, policy.causal_lm, tokenizer, weights)


def learn(t: Trainer, parts: Parts, tokenizer: Any, examples: list[Example], held_out: list[Example]) -> None:
    """The steps that are left, with validation, metrics and checkpoints."""
    cfg, total, first_step = t.cfg, t.total_steps, parts.first_step
    ahead = (
        OneStepAhead(t.sampler, partial(request, t, examples), first_step)
        if cfg.actor_rollout_ref.rollout.overlap
        else None
    )
    t.sampler = ahead or t.sampler
    tracker = Tracker(
        t.run_dir,
        cfg.trainer.logger,
        cfg.trainer.project_name,
        cfg.trainer.experiment_name,
        first_step,
        cfg.model_dump(),
    )
    if cfg.trainer.val_before_train and first_step == 0 and held_out:
        tracker.log(-1, validate(t, held_out))
    throughput = throughput_of(
        cfg.actor_rollout_ref.model.path, cfg.trainer.peak_tflops, cfg.trainer.device, cfg.trainer.world_size
    )
    steps, save = (
        range(first_step, total),
        partial(parts.on_ranks, checkpoint.save_by, t.run_dir, tokenizer, cfg.trainer),
    )
    with (
        closing(ahead) if ahead else nullcontext(),
        closing(tracker),
        Stopping(t.run_dir, cfg.trainer, steps, cfg.trainer.save_freq, save, cfg.guard) as stopping,
    ):
        for step in tqdm(steps, desc="GRPO", unit="step", initial=first_step, total=total):
            indices = data.batch_indices(
                len(examples), cfg.data.train_batch_size, step, cfg.data.seed, cfg.data.shuffle
            )
            metrics = grpo_step(t, step, [examples[i] for i in indices])
            lengths, n = rollouts.lengths(t.run_dir, step), cfg.actor_rollout_ref.rollout.n
            groups = [(lengths[i][0], [pair[1] for pair in lengths[i : i + n]]) for i in range(0, len(lengths), n)]
            actor = cfg.actor_rollout_ref.actor
            passes = actor.use_kl_loss + (actor.ppo_epochs > 1 or cfg.data.train_batch_size > actor.ppo_mini_batch_size)
            metrics |= throughput.of_grpo(
                groups, metrics, share_prompts=actor.share_prompts, passes=passes, epochs=actor.ppo_epochs
            )
            done = step + 1
            if held_out and cfg.trainer.test_freq > 0 and (done % cfg.trainer.test_freq == 0 or done == total):
                metrics |= validate(t, held_out)
            tracker.log(step, metrics)
            if tracker.shows_tables and cfg.trainer.sample_table_freq > 0 and step % cfg.trainer.sample_table_freq == 0:
                tracker.samples(step, rollouts.table(t.run_dir, step, cfg.actor_rollout_ref.rollout.n))
            stopping.after_step(step, metrics)


def encode(
    cfg: GrpoConfig, tokenizer: Any, examples: list[Example]
) -> tuple[list[Example], dict[str, tuple[int, ...]]]:
    """Encodes the prompts once and applies the length rule; returns the rows that stay and their ids by query id."""
    ids = [
        encode_chat(tokenizer, example.messages)
        for example in tqdm(examples, desc="encoding prompts", unit="prompt", leave=False)
    ]
    limit = cfg.data.max_prompt_length
    kept = data.fit_length([len(i) for i in ids], limit, cfg.data.filter_overlong_prompts, cfg.data.truncation)
    if len(kept) < len(examples):
        print(f"{len(examples) - len(kept)} of {len(examples)} prompts are longer than {limit} tokens and are left out")
    encoded = {examples[i].qid: data.truncate(ids[i], limit, cfg.data.truncation) for i in kept}
    if len(encoded) < len(kept):
        raise ValueError(
            f"{len(kept) - len(encoded)} query ids of the training rows occur twice; every row needs its own extra_info.query_id"
        )
    return [examples[i] for i in kept], encoded


def build_policy(cfg: GrpoConfig, run_dir: Path, device: torch.device) -> tuple[int, Policy, Policy | None]:
    """The policy (from the newest checkpoint where there is one), the step it stands at, and the frozen reference."""
    model, actor = cfg.actor_rollout_ref.model, cfg.actor_rollout_ref.actor
    found = checkpoint.latest(run_dir) if cfg.trainer.resume_mode == "auto" else None
    step, source = (
        found[0] if found else 0,
        model.path if model.lora_rank else checkpoint.model_folder(found, model.path),
    )
    options: dict[str, Any] = {"temperature": cfg.actor_rollout_ref.rollout.temperature, "bf16": model.dtype == "bf16"}
    causal_lm = load_model(source, trust_remote_code=model.trust_remote_code)
    if model.lora_rank:  # the base stays as it was; a checkpoint's adapters come with the optimizer's state
        lora.add_adapters(causal_lm, model.lora_rank, model.lora_alpha, model.target_modules, cfg.trainer.seed)
    policy = Policy(
        causal_lm,
        device,
        lr=actor.optim.lr,
        betas=actor.optim.betas,
        weight_decay=actor.optim.weight_decay,
        grad_clip=actor.grad_clip,
        gradient_checkpointing=model.enable_gradient_checkpointing,
        param_offload=actor.fsdp_config.param_offload,
        optimizer_offload=actor.fsdp_config.optimizer_offload,
        **options,
    )
    if found:
        checkpoint.restore(found[1], policy)
        print(f"resumed from {found[1]}")
    cfg.check_context(policy.causal_lm.config.max_position_embeddings)
    if not actor.use_kl_loss:
        return step, policy, None
    if model.lora_rank:
        return step, policy, cast(Policy, lora.Reference(policy))  # only asked for log-probs
    reference = load_model(model.path, trust_remote_code=model.trust_remote_code).requires_grad_(False)
    return (
        step,
        policy,
        Policy(reference, device, param_offload=cfg.actor_rollout_ref.ref.fsdp_config.param_offload, **options),
    )


def request(t: Trainer, examples: list[Example], step: int) -> Request | None:
    """What step ``step`` asks the sampler for first."""
    if step >= t.total_steps:
        return None
    rollout = t.cfg.actor_rollout_ref.rollout
    indices = data.batch_indices(len(examples), t.cfg.data.train_batch_size, step, t.cfg.data.seed, t.cfg.data.shuffle)
    return tuple(t.prompt_ids[examples[i].qid] for i in indices), rollout.n, rollout.seed * 1_000_003 + step


def validate(t: Trainer, held_out: Sequence[Example]) -> Metrics:
    """Mean reward and reciprocal rank of one sample a held-out question; the seed is the same each time, so that curves compare."""
    start = time.monotonic()
    limit = t.cfg.data.val_max_samples
    rows = held_out[:limit] if limit > 0 else held_out
    completions = t.sampler.generate(
        [t.prompt_ids[row.qid] for row in rows], 1, seed=t.cfg.actor_rollout_ref.rollout.seed
    )
    cfg = t.cfg.reward_model.reward
    cfg = cfg.model_copy(
        update={"language_guard": False, "name": "rank_incentive" if cfg.name == "curriculum" else cfg.name}
    )
    scores = score(cfg, t.retriever, rows, completions)
    return {
        "val_reward": sum(scored.reward for scored in scores) / len(rows),
        "val_mrr": sum(1 / scored.rank if scored.rank else 0.0 for scored in scores) / len(rows),
        "val_format_rate": sum(scored.rewrite.error is None for scored in scores) / len(rows),
        "val_s": time.monotonic() - start,
    }
