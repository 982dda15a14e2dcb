"""The one factory of samplers: from a configuration to an engine."""

from types import SimpleNamespace
from typing import Any, Literal

import torch
from transformers import GenerationConfig

from convsearch.config import GrpoConfig
from convsearch.model.loading import load_model, load_tokenizer, pick_device, stop_token_ids
from convsearch.model.precision import pick_dtype
from convsearch.sampling.base import SamplingConfig
from convsearch.sampling.hf import HfSampler
from convsearch.sampling.vllm import VllmSampler


def hf_sampler(cfg: GrpoConfig, causal_lm: Any, tokenizer: Any) -> HfSampler:
    """A sampler around a loaded model, for example the one that is trained; it computes in the model's type.

    Raises:
        ValueError: that is not ``rollout.dtype``.
    """
    asked = cfg.actor_rollout_ref.rollout.dtype
    if pick_dtype(asked, causal_lm.device) != causal_lm.dtype:
        shared = "the sampler hf computes with the policy's weights"
        remedy = "set actor_rollout_ref.model.dtype to the same"
        raise ValueError(f"actor_rollout_ref.rollout.dtype={asked}, but {shared} in {causal_lm.dtype}: {remedy}")
    return HfSampler(causal_lm, tokenizer, _sampling(cfg), stop_token_ids(causal_lm, tokenizer))


def build_engine(cfg: GrpoConfig, transfer: Literal["ipc", "nccl"] | None) -> HfSampler | VllmSampler:
    """The engine of a sampler with a process of its own, with a model of its own."""
    model, rollout = cfg.actor_rollout_ref.model, cfg.actor_rollout_ref.rollout
    tokenizer = load_tokenizer(model.path, trust_remote_code=model.trust_remote_code)
    device = pick_device(cfg.trainer.device)
    if rollout.name == "hf":
        causal_lm = load_model(model.path, pick_dtype(rollout.dtype, device), trust_remote_code=model.trust_remote_code)
        return hf_sampler(cfg, causal_lm.to(device), tokenizer)
    try:
        ends = SimpleNamespace(generation_config=GenerationConfig.from_pretrained(model.path))
    except OSError:  # a folder without one
        ends = SimpleNamespace()
    return VllmSampler(
        model.path,
        tokenizer,
        _sampling(cfg),
        stop_token_ids(ends, tokenizer),
        model_len=cfg.max_tokens,
        device="cuda" if device.type == "cuda" else "cpu",
        bf16=pick_dtype(rollout.dtype, device) == torch.bfloat16,
        stop=rollout.stop,
        tensor_parallel=rollout.tensor_model_parallel_size,
        memory_share=rollout.gpu_memory_utilization,
        transfer=transfer,
        trust_remote_code=model.trust_remote_code,
    )


def _sampling(cfg: GrpoConfig) -> SamplingConfig:
    rollout = cfg.actor_rollout_ref.rollout
    return SamplingConfig(rollout.temperature, rollout.top_p, 0, cfg.data.max_response_length, rollout.max_num_seqs)
