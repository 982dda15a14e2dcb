"""The policies of the two trainers: from a configuration and the newest checkpoint to a model with its optimizer."""

from pathlib import Path

import torch

from convsearch.config import GrpoConfig, SftConfig
from convsearch.model import distributed, lora
from convsearch.model.loading import load_model
from convsearch.model.precision import pick_dtype
from convsearch.policy.base import Reference
from convsearch.policy.policy import SFT_KNOBS, BaseReference, LocalPolicy
from convsearch.runs import checkpoint


def sft_policy(cfg: SftConfig, run_dir: Path, device: torch.device) -> tuple[int, LocalPolicy]:
    """(number of steps done, the model to train), from the newest checkpoint if there is one."""
    found = checkpoint.latest(run_dir) if cfg.trainer.resume_mode == "auto" else None
    source = checkpoint.model_folder(found, cfg.model.partial_pretrain)
    policy = LocalPolicy(
        load_model(source, trust_remote_code=cfg.model.trust_remote_code),
        device,
        lr=cfg.optim.lr,
        betas=cfg.optim.betas,
        weight_decay=cfg.optim.weight_decay,
        grad_clip=cfg.optim.clip_grad,
        gradient_checkpointing=cfg.model.enable_gradient_checkpointing,
        bf16=pick_dtype(cfg.model.dtype, device) == torch.bfloat16,
        memory_knobs=SFT_KNOBS,
    )
    cfg.check_context(policy.causal_lm.config.max_position_embeddings)
    return _restored(found, policy), policy


def grpo_policy(cfg: GrpoConfig, run_dir: Path, device: torch.device) -> tuple[int, LocalPolicy, Reference | None]:
    """(steps done, the policy, the frozen reference); the first two from the newest checkpoint, if any."""
    model, actor = cfg.actor_rollout_ref.model, cfg.actor_rollout_ref.actor
    found = checkpoint.latest(run_dir) if cfg.trainer.resume_mode == "auto" else None
    source = model.path if model.lora_rank else checkpoint.model_folder(found, model.path)
    temperature, bf16 = cfg.actor_rollout_ref.rollout.temperature, pick_dtype(model.dtype, device) == torch.bfloat16
    causal_lm = load_model(source, trust_remote_code=model.trust_remote_code)
    if model.lora_rank:  # the base does not change; a checkpoint's adapters are stored with the optimizer's state
        lora.add_adapters(causal_lm, model.lora_rank, model.lora_alpha, model.target_modules, cfg.trainer.seed)
    policy = LocalPolicy(
        causal_lm,
        device,
        temperature=temperature,
        lr=actor.optim.lr,
        betas=actor.optim.betas,
        weight_decay=actor.optim.weight_decay,
        grad_clip=actor.grad_clip,
        gradient_checkpointing=model.enable_gradient_checkpointing,
        bf16=bf16,
        param_offload=actor.fsdp_config.param_offload,
        optimizer_offload=actor.fsdp_config.optimizer_offload,
    )
    step = _restored(found, policy)
    cfg.check_context(policy.causal_lm.config.max_position_embeddings)
    if not actor.use_kl_loss:
        return step, policy, None
    if model.lora_rank:
        return step, policy, BaseReference(policy)
    frozen = load_model(model.path, trust_remote_code=model.trust_remote_code).requires_grad_(False)
    offload = cfg.actor_rollout_ref.ref.fsdp_config.param_offload
    return step, policy, LocalPolicy(frozen, device, temperature=temperature, bf16=bf16, param_offload=offload)


def _restored(found: tuple[int, Path] | None, policy: LocalPolicy) -> int:
    """Loads the checkpoint's state; returns the number of steps done."""
    if found is None:
        return 0
    step, folder = found
    checkpoint.restore(folder, policy)
    if distributed.rank() == 0:
        print(f"resumed from {folder}")
    return step
