"""Supervised fine-tuning on the warm-up data.

The loss is the mean over the response tokens of the whole batch, in all processes; prompts are masked. The seed's
trainer takes the mean of micro-batch means instead; here the number of processes and the micro-batch size cannot change
the loss.
"""

import time
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from convsearch import parquet
from convsearch.config import SftConfig
from convsearch.config.sft import SftDataConfig
from convsearch.model import distributed
from convsearch.model.batch import Branch, MicroBatch, Tree, collate_rows
from convsearch.model.loading import encode_chat, load_tokenizer, pick_device
from convsearch.model.precision import settled
from convsearch.policy.build import sft_policy
from convsearch.policy.policy import LocalPolicy
from convsearch.runs import checkpoint, folder
from convsearch.runs.stopping import Stopping
from convsearch.runs.throughput import throughput_of
from convsearch.runs.tracking import Tracker
from convsearch.trainers.data import REMEDY, batch_of
from convsearch.trainers.schedule import lr_at


def sft_step(policy: LocalPolicy, trees: list[Tree], micro_batch_size: int, lr: float) -> dict[str, float]:
    """One optimizer step on a batch of one-branch trees, shared evenly by all processes; returns the batch's loss."""
    own = with_weight(trees, 1 / sum(map(num_response_tokens, trees)))[distributed.rank() :: distributed.world_size()]
    reports = [
        policy.forward_backward(collate_rows([own[start : start + micro_batch_size]]), negative_log_likelihood)
        for start in range(0, len(own), micro_batch_size)
    ]
    loss = distributed.sum_over_ranks({"loss": sum(report["loss"] for report in reports)})
    return {**loss, **policy.optim_step(lr)}


def num_response_tokens(tree: Tree) -> int:
    return sum(len(branch.token_ids) for branch in tree.branches)


def with_weight(trees: list[Tree], weight: float) -> list[Tree]:
    """The trees with ``weight`` for each response token."""
    return [replace(tree, branches=tuple(replace(branch, weight=weight) for branch in tree.branches)) for tree in trees]


def negative_log_likelihood(
    micro: MicroBatch, logprobs_R: Tensor, entropy_R: Tensor
) -> tuple[Tensor, dict[str, float]]:
    """The weighted sum of -log p over the response tokens."""
    total = -(micro.weights_R * logprobs_R).sum()
    return total, {"loss": float(total.detach())}


def read_rows(cfg: SftDataConfig, paths: tuple[str, ...], tokenizer: Any) -> list[Tree]:
    """Parquet rows -> prompt | answer + end of sequence, cut to ``data.max_length`` as ``data.truncation`` says.

    Raises:
        ValueError: a column or key is missing, a text is empty, or a row is too long under truncation=error.
    """
    rows, columns = [], sorted({cfg.prompt_key, cfg.response_key})
    for path in paths:
        for number, row in enumerate(parquet.read_rows(path, columns, remedy=REMEDY)):
            where = f"{path}: row {number}"
            prompt = _text(row, cfg.prompt_key, cfg.prompt_dict_keys, where)
            answer = _text(row, cfg.response_key, cfg.response_dict_keys, where)
            prompt_ids = encode_chat(tokenizer, ({"role": "user", "content": prompt},))
            answer_ids = (*tokenizer.encode(answer, add_special_tokens=False), tokenizer.eos_token_id)
            rows.append(_cut(prompt_ids, answer_ids, cfg.max_length, cfg.truncation, where))
    if not rows:
        raise ValueError(f"{', '.join(paths)}: no rows to learn from")
    return rows


def _text(row: dict[str, Any], column: str, keys: tuple[str, ...], where: str) -> str:
    value: Any = row[column]
    for key in keys:
        if not isinstance(value, dict) or key not in value:
            remedy = "check data.prompt_dict_keys and data.response_dict_keys"
            raise ValueError(f"{where}: column {column!r} has no key {key!r}; {remedy}")
        value = value[key]
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{where}: {'.'.join((column, *keys))} must be a non-empty text, got {value!r}")
    return value


def _cut(prompt: tuple[int, ...], answer: tuple[int, ...], limit: int, truncation: str, where: str) -> Tree:
    total = len(prompt) + len(answer)
    if total > limit:
        if truncation == "error":
            remedy = "raise it or set data.truncation=right or left"
            raise ValueError(f"{where} has {total} tokens, above data.max_length={limit}; {remedy}")
        if truncation == "left":
            prompt = prompt[total - limit :]
        else:
            answer = answer[: max(0, limit - len(prompt))]
        if not prompt or not answer:
            part = "answer" if prompt else "prompt"
            raise ValueError(f"{where}: nothing of the {part} is left under data.max_length={limit}; raise it")
    return Tree(prompt, (Branch(answer),))


def validation_loss(policy: LocalPolicy, trees: list[Tree], micro_batch_size: int) -> float:
    """Mean negative log-likelihood per response token. Rows of weight 0 fill up the processes' micro-batches."""
    rank, world = distributed.rank(), distributed.world_size()
    missing = -len(trees) % (world * micro_batch_size) if world > 1 else 0
    own = [*trees, *with_weight(trees[:1], 0.0) * missing][rank::world]
    sums = {"nll": 0.0, "tokens": 0.0}
    for start in range(0, len(own), micro_batch_size):
        micro = collate_rows([own[start : start + micro_batch_size]])
        nll = -float((micro.weights_R * policy.logprobs(micro)).sum())
        sums = {"nll": sums["nll"] + nll, "tokens": sums["tokens"] + float(micro.weights_R.sum())}
    sums = distributed.sum_over_ranks(sums)
    return sums["nll"] / sums["tokens"]


def train(cfg: SftConfig) -> None:
    """Runs or resumes the whole fine-tuning; writes checkpoints, metrics.jsonl and the exported model/."""
    if cfg.trainer.num_threads:
        torch.set_num_threads(cfg.trainer.num_threads)
    device = distributed.start(pick_device(cfg.trainer.device))
    cfg.check_world(distributed.world_size())
    cfg = cfg.model_copy(update={"model": settled(cfg.model, device)})
    run_dir, size = Path(cfg.trainer.default_local_dir), cfg.data.train_batch_size
    tokenizer = load_tokenizer(cfg.model.partial_pretrain, trust_remote_code=cfg.model.trust_remote_code)
    rows = read_rows(cfg.data, cfg.data.train_files, tokenizer)
    held_out = read_rows(cfg.data, cfg.data.val_files, tokenizer) if cfg.data.val_files else []
    batch_of(rows, size, 0, cfg.data.seed)  # an error now rather than after loading a model
    total = cfg.trainer.total_training_steps or cfg.trainer.total_epochs * (len(rows) // size)
    prompts = [row.prompt_ids for row in rows]
    made_of = folder.made_of(cfg.model.partial_pretrain, prompts, cfg.data.train_files, cfg.data.val_files)
    with folder.owned(run_dir):
        folder.claim(run_dir, cfg, made_of)
        if not folder.trained(run_dir, total):
            first_step, policy = sft_policy(cfg, run_dir, device)
            learn(cfg, run_dir, policy, tokenizer, rows, held_out, range(first_step, total))
            weights = policy.weights()
            if distributed.rank() == 0:
                checkpoint.export(run_dir / "model", policy.causal_lm, tokenizer, weights)
                print(f"trained {total} steps on {len(rows)} rows; the model is in {run_dir / 'model'}")


def learn(
    cfg: SftConfig,
    run_dir: Path,
    policy: LocalPolicy,
    tokenizer: Any,
    rows: list[Tree],
    held_out: list[Tree],
    steps: range,
) -> None:
    """The optimizer steps ``steps``, with validation, metrics and checkpoints."""
    trainer, optim, total = cfg.trainer, cfg.optim, steps.stop
    size, micro_batch_size = cfg.data.train_batch_size, cfg.data.micro_batch_size_per_gpu
    epoch = len(rows) // size
    save_every = trainer.save_freq if trainer.save_freq > 0 else epoch
    test_every = trainer.test_freq if trainer.test_freq > 0 else epoch
    warmup = int(optim.warmup_steps_ratio * total)
    names = trainer.logger, trainer.project_name, trainer.experiment_name
    tracker = Tracker(run_dir, *names, steps.start, cfg.model_dump())
    save = partial(checkpoint.save_by, policy, run_dir, tokenizer, trainer)
    devices = distributed.world_size()
    throughput = throughput_of(cfg.model.partial_pretrain, trainer.peak_tflops, trainer.device, devices)
    quiet = distributed.rank() > 0
    with closing(tracker), Stopping(run_dir, trainer, steps, save_every, save) as stopping:
        for step in tqdm(steps, desc="SFT", unit="step", initial=steps.start, total=total, disable=quiet):
            batch = batch_of(rows, size, step, cfg.data.seed, cfg.data.shuffle)
            lr = lr_at(step, total, optim.lr, warmup, optim.lr_scheduler, optim.min_lr_ratio)
            start = time.monotonic()
            metrics = sft_step(policy, batch, micro_batch_size, lr)
            lengths = [(len(row.prompt_ids), num_response_tokens(row)) for row in batch]
            metrics |= throughput.of_sft(lengths, time.monotonic() - start)
            if held_out and ((step + 1) % test_every == 0 or step + 1 == total):
                metrics["val_loss"] = validation_loss(policy, held_out, micro_batch_size)
            tracker.log(step, metrics)
            stopping.after_step(step, metrics)
