"""Supervised fine-tuning on the warm-up data: ``torchrun --nproc_per_node=8 -m convsearch.sft experiment=...``, or plain ``python -m``.

The loss is the mean over the response tokens of the whole batch, on all ranks; prompts are masked. Differs from the seed's trainer (mean of
micro-batch means) in that the number of ranks and the micro-batch size cannot change it.
"""

import sys
import time
from contextlib import closing
from functools import partial
from typing import TYPE_CHECKING, Any

from convsearch.cli import Ended
from convsearch.config import SftConfig, load_sft_config

if TYPE_CHECKING:
    from pathlib import Path

    from convsearch.model.batch import Tree
    from convsearch.policy.policy import Policy


def sft_step(
    policy: "Policy", trees: list["Tree"], rank: int, world: int, micro_batch_size: int, lr: float
) -> dict[str, float]:
    """One optimiser step on a batch of one-branch trees, of which this rank computes every ``world``-th; returns the batch's loss."""
    from convsearch.model import distributed
    from convsearch.model.batch import collate

    mine = with_token_mean(trees)[rank::world]
    reports = [
        policy.forward_backward(collate(mine[start : start + micro_batch_size]), negative_log_likelihood)
        for start in range(0, len(mine), micro_batch_size)
    ]
    loss = distributed.sum_over_ranks({"loss": sum(report["loss"] for report in reports)})
    return {**loss, **policy.optim_step(lr)}


def with_token_mean(trees: list["Tree"]) -> list["Tree"]:
    """Every response token weighs one over the number of response tokens of all ``trees``."""
    from dataclasses import replace

    weight = 1 / sum(len(branch.token_ids) for tree in trees for branch in tree.branches)
    return [replace(tree, branches=tuple(replace(branch, weight=weight) for branch in tree.branches)) for tree in trees]


def negative_log_likelihood(micro: Any, logprobs_R: Any, entropy_R: Any) -> tuple[Any, dict[str, float]]:
    """The weighted sum of -log p over the response tokens."""
    total = -(micro.weights_R * logprobs_R).sum()
    return total, {"loss": float(total.detach())}


def read_rows(cfg: SftConfig, paths: tuple[str, ...], tokenizer: Any) -> list["Tree"]:
    """Parquet rows -> prompt | answer + end of sequence, cut to ``data.max_length`` as ``data.truncation`` says.

    Raises:
        ValueError: a column or key is missing, a text is empty, or a row is too long under truncation=error.
    """
    from convsearch.model.batch import Branch, Tree
    from convsearch.model.loading import encode_chat
    from convsearch.trainers.data import read_parquet

    rows = []
    columns = sorted({cfg.data.prompt_key, cfg.data.response_key})
    for path in paths:
        for number, row in enumerate(read_parquet(path, columns)):
            prompt = _text(row, cfg.data.prompt_key, cfg.data.prompt_dict_keys, f"{path}: row {number}")
            answer = _text(row, cfg.data.response_key, cfg.data.response_dict_keys, f"{path}: row {number}")
            prompt_ids = encode_chat(tokenizer, ({"role": "user", "content": prompt},))
            answer_ids = (*tokenizer.encode(answer, add_special_tokens=False), tokenizer.eos_token_id)
            prompt_ids, answer_ids = _cut(cfg, prompt_ids, answer_ids, f"{path}: row {number}")
            rows.append(Tree(prompt_ids, (Branch(answer_ids),)))
    if not rows:
        raise ValueError(f"{', '.join(paths)}: no rows to learn from")
    return rows


def _text(row: dict[str, Any], column: str, keys: tuple[str, ...], where: str) -> str:
    value: Any = row[column]
    for key in keys:
        if not isinstance(value, dict) or key not in value:
            raise ValueError(
                f"{where}: column {column!r} has no key {key!r}; check data.prompt_dict_keys and data.response_dict_keys"
            )
        value = value[key]
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{where}: {'.'.join((column, *keys))} must be a non-empty text, got {value!r}")
    return value


def _cut(
    cfg: SftConfig, prompt_ids: tuple[int, ...], answer_ids: tuple[int, ...], where: str
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    limit, total = cfg.data.max_length, len(prompt_ids) + len(answer_ids)
    if total <= limit:
        return prompt_ids, answer_ids
    if cfg.data.truncation == "error":
        raise ValueError(
            f"{where} has {total} tokens, above data.max_length={limit}; raise it or set data.truncation=right or left"
        )
    if cfg.data.truncation == "left":
        prompt_ids = prompt_ids[total - limit :]
    else:
        answer_ids = answer_ids[: limit - len(prompt_ids)] if len(prompt_ids) < limit else ()
    if not prompt_ids or not answer_ids:
        raise ValueError(
            f"{where}: nothing of the {'answer' if prompt_ids else 'prompt'} is left under data.max_length={limit}; raise it"
        )
    return prompt_ids, answer_ids


def validation_loss(policy: "Policy", trees: list["Tree"], rank: int, world: int, micro_batch_size: int) -> float:
    """Mean negative log-likelihood a response token; rows of weight 0 give every rank as many micro-batches as the others."""
    from dataclasses import replace

    from convsearch.model import distributed
    from convsearch.model.batch import collate

    missing = -len(trees) % (world * micro_batch_size) if world > 1 else 0
    filler = replace(trees[0], branches=tuple(replace(branch, weight=0.0) for branch in trees[0].branches))
    mine = [*trees, *[filler] * missing][rank::world]
    sums = {"nll": 0.0, "tokens": 0.0}
    for start in range(0, len(mine), micro_batch_size):
        micro = collate(mine[start : start + micro_batch_size])
        nll = -float((micro.weights_R * policy.logprobs(micro)).sum())
        sums = {"nll": sums["nll"] + nll, "tokens": sums["tokens"] + float(micro.weights_R.sum())}
    sums = distributed.sum_over_ranks(sums)
    return sums["nll"] / sums["tokens"]


def train(cfg: SftConfig) -> None:
    """Runs or resumes the whole fine-tuning; leaves checkpoints, ``metrics.jsonl`` and the exported ``model/`` in the run folder."""
    from pathlib import Path

    import torch

    from convsearch.model import distributed
    from convsearch.model.loading import load_tokenizer, pick_device
    from convsearch.runs import checkpoint
    from convsearch.runs import folder as runs
    from convsearch.trainers.data import batch_indices

    if cfg.trainer.num_threads:
        torch.set_num_threads(cfg.trainer.num_threads)
    device = distributed.start(pick_device(cfg.trainer.device))
    cfg.check_world(distributed.world_size())
    run_dir, size = Path(cfg.trainer.default_local_dir), cfg.data.train_batch_size
    tokenizer = load_tokenizer(cfg.model.partial_pretrain, trust_remote_code=cfg.model.trust_remote_code)
    rows = read_rows(cfg, cfg.data.train_files, tokenizer)
    held_out = read_rows(cfg, cfg.data.val_files, tokenizer) if cfg.data.val_files else []
    batch_indices(len(rows), size, 0, cfg.data.seed)  # an error now rather than after loading a model
    total = cfg.trainer.total_training_steps or cfg.trainer.total_epochs * (len(rows) // size)
    runs.claim(run_dir, cfg)
    if not runs.trained(run_dir, total):
        first_step, policy = build_policy(cfg, run_dir, device)
        learn(cfg, run_dir, policy, tokenizer, rows, held_out, range(first_step, total))
        weights = policy.weights()
        if distributed.rank() == 0:
            checkpoint.export(run_dir / "model", policy.causal_lm, tokenizer, weights)
            print(f"trained {total} steps on {len(rows)} rows; the model is in {run_dir / 'model'}")


def build_policy(cfg: SftConfig, run_dir: "Path", device: Any) -> tuple[int, "Policy"]:
    """The model to train, from the newest checkpoint where there is one, and the step at which it stands."""
    from convsearch.model import distributed
    from convsearch.model.loading import load_model
    from convsearch.policy.policy import SFT_KNOBS, Policy
    from convsearch.runs import checkpoint

    found = checkpoint.latest(run_dir) if cfg.trainer.resume_mode == "auto" else None
    policy = Policy(
        load_model(
            checkpoint.model_folder(found, cfg.model.partial_pretrain), trust_remote_code=cfg.model.trust_remote_code
        ),
        device,
        lr=cfg.optim.lr,
        betas=cfg.optim.betas,
        weight_decay=cfg.optim.weight_decay,
        grad_clip=cfg.optim.clip_grad,
        gradient_checkpointing=cfg.model.enable_gradient_checkpointing,
        bf16=cfg.model.dtype == "bf16",
        memory_knobs=SFT_KNOBS,
    )
    cfg.check_context(policy.causal_lm.config.max_position_embeddings)
    if found is None:
        return 0, policy
    checkpoint.restore(found[1], policy)
    if distributed.rank() == 0:
        print(f"resumed from {found[1]}")
    return found[0], policy


def learn(
    cfg: SftConfig,
    run_dir: "Path",
    policy: "Policy",
    tokenizer: Any,
    rows: list["Tree"],
    held_out: list["Tree"],
    steps: range,
) -> None:
    """The optimiser steps ``steps``, with validation, metrics and checkpoints."""
    from tqdm import tqdm

    from convsearch.model import distributed
    from convsearch.runs.checkpoint import save_by
    from convsearch.runs.stopping import Stopping
    from convsearch.runs.throughput import throughput_of
    from convsearch.runs.tracking import Tracker
    from convsearch.trainers.data import batch_indices
    from convsearch.trainers.schedule import lr_at

    rank, world, micro_batch_size = distributed.rank(), distributed.world_size(), cfg.data.micro_batch_size_per_gpu
    size, total = cfg.data.train_batch_size, steps.stop
    epoch = len(rows) // size
    save_every = cfg.trainer.save_freq if cfg.trainer.save_freq > 0 else epoch
    test_every = cfg.trainer.test_freq if cfg.trainer.test_freq > 0 else epoch
    warmup = int(cfg.optim.warmup_steps_ratio * total)
    tracker = Tracker(
        run_dir,
        cfg.trainer.logger,
        cfg.trainer.project_name,
        cfg.trainer.experiment_name,
        steps.start,
        cfg.model_dump(),
    )
    save = partial(save_by, policy, run_dir, tokenizer, cfg.trainer)
    throughput = throughput_of(cfg.model.partial_pretrain, cfg.trainer.peak_tflops, cfg.trainer.device, world)
    with closing(tracker), Stopping(run_dir, cfg.trainer, steps, save_every, save) as stopping:
        for step in tqdm(steps, desc="SFT", unit="step", initial=steps.start, total=total, disable=rank > 0):
            batch = [rows[i] for i in batch_indices(len(rows), size, step, cfg.data.seed, cfg.data.shuffle)]
            lr = lr_at(step, total, cfg.optim.lr, warmup, cfg.optim.lr_scheduler, cfg.optim.min_lr_ratio)
            start = time.monotonic()
            metrics = sft_step(policy, batch, rank, world, micro_batch_size, lr)
            lengths = [(len(row.prompt_ids), len(row.branches[0].token_ids)) for row in batch]
            metrics |= throughput.of_sft(lengths, time.monotonic() - start)
            if held_out and ((step + 1) % test_every == 0 or step + 1 == total):
                metrics["val_loss"] = validation_loss(policy, held_out, rank, world, micro_batch_size)
            tracker.log(step, metrics)
            stopping.after_step(step, metrics)


def main() -> None:
    """Composes the configuration, then trains (torch is imported there)."""
    cfg = load_sft_config(sys.argv[1:])
    from convsearch.model import distributed

    try:
        train(cfg)
    except Ended as end:
        if distributed.world_size() == 1:
            raise
        if distributed.rank() == 0:
            print(f"stopped: {end}", file=sys.stderr)
        distributed.stop(end.status)
    distributed.stop()
