"""The model in this process, behind the verbs of ``policy.base.Policy``. Loss and step never see FSDP."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from convsearch.model import distributed, lora, precision
from convsearch.model.attention import Kernel, packed_context
from convsearch.model.batch import Loss, MicroBatch
from convsearch.model.logprobs import ChosenLogprobs
from convsearch.policy.base import T

GRPO_KNOBS = (
    "lower actor_rollout_ref.actor.ppo_max_token_len_per_gpu (or ppo_micro_batch_size_per_gpu) first; then "
    "actor_rollout_ref.model.enable_gradient_checkpointing=true, "
    "actor_rollout_ref.actor.fsdp_config.optimizer_offload=true, "
    "actor_rollout_ref.ref.fsdp_config.param_offload=true, "
    "or a lower actor_rollout_ref.rollout.gpu_memory_utilization"
)
SFT_KNOBS = (
    "lower data.micro_batch_size_per_gpu first; then model.enable_gradient_checkpointing=true, "
    "or a lower data.max_length"
)


@contextmanager
def memory_advice(doing: str, knobs: str) -> Iterator[None]:
    """Turns an out-of-memory error into a ValueError that names the operation and the keys to change."""
    try:
        yield
    except RuntimeError as error:  # torch.OutOfMemoryError is a RuntimeError; the CPU's allocator raises a plain one
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        raise ValueError(f"out of memory in {doing}: {knobs} ({str(error).splitlines()[0]})") from error


class ResponseLogprobs(nn.Module):
    """Micro-batch -> log-probability [R] and entropy [R] of its response tokens; one module, for FSDP2 to wrap.

    Logits exist for ``chunk`` response tokens at a time, never for prompts. With several chunks the backward pass
    recomputes them.
    """

    def __init__(self, causal_lm: Any, temperature: float, chunk: int = 1024):
        super().__init__()
        self.causal_lm, self.temperature, self.chunk = causal_lm, temperature, chunk
        self.kernel: Kernel = "auto"

    def forward(self, micro: MicroBatch) -> tuple[Tensor, Tensor]:
        half = self.causal_lm.lm_head.weight.dtype == torch.bfloat16
        context = packed_context(micro, self.kernel, half)
        hidden_BTX = self.causal_lm.model(
            input_ids=micro.token_ids_BT, position_ids=micro.position_ids_BT, use_cache=False, context=context
        ).last_hidden_state
        hidden_RX = hidden_BTX[micro.row_R, micro.source_R]
        recompute = torch.is_grad_enabled() and len(hidden_RX) > self.chunk
        scored = []
        for start in range(0, len(hidden_RX), self.chunk):
            chunk = hidden_RX[start : start + self.chunk], micro.target_ids_R[start : start + self.chunk]
            scored.append(checkpoint(self._score, *chunk, use_reentrant=False) if recompute else self._score(*chunk))
        return torch.cat([logprobs_R for logprobs_R, _ in scored]), torch.cat([entropy_R for _, entropy_R in scored])

    def _score(self, hidden_RX: Tensor, target_ids_R: Tensor) -> tuple[Tensor, Tensor]:
        logits_RV = self.causal_lm.lm_head(hidden_RX)
        chosen_R, entropy_R = ChosenLogprobs.apply(logits_RV, target_ids_R, self.temperature)  # type: ignore[no-untyped-call]
        return chosen_R, entropy_R


class LocalPolicy:
    """A causal LM with its AdamW: plain in one process, sharded by FSDP2 if torch.distributed has several.

    Args:
        temperature: log-probs are those of the distribution that the sampler draws from.
        bf16: arithmetic in bfloat16, by ``model.precision`` or, if sharded, by FSDP2; weights and Adam's moments stay
            in float32.
        param_offload: weights, gradients and Adam's state are in CPU memory; layers move to the GPU when used.
        optimizer_offload: Adam's state is in CPU memory and moves to the GPU for each step.
        memory_knobs: advice for an out-of-memory error.
    """

    def __init__(
        self,
        causal_lm: Any,
        device: torch.device,
        *,
        temperature: float = 1.0,
        lr: float = 1e-6,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.01,
        grad_clip: float = 1.0,
        gradient_checkpointing: bool = False,
        bf16: bool = False,
        param_offload: bool = False,
        optimizer_offload: bool = False,
        memory_knobs: str = GRPO_KNOBS,
    ):
        if gradient_checkpointing:
            causal_lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        self.causal_lm, self.device, self.grad_clip = causal_lm, device, grad_clip
        self.optimizer_offload, self.memory_knobs = optimizer_offload and device.type == "cuda", memory_knobs
        scorer = ResponseLogprobs(causal_lm, temperature)
        self.module = distributed.shard(scorer, device, bf16=bf16, offload=param_offload)
        self.module.train()
        self.masters: precision.Masters | None = None
        if bf16 and not distributed.is_sharded(self.module):
            if self._trained():
                self.masters = precision.Masters(self.module)
            else:
                precision.cast(self.module)
        options: dict[str, Any] = {"lr": lr, "betas": betas, "weight_decay": weight_decay, "fused": True}
        trained = self._trained()
        self.optimizer = torch.optim.AdamW(trained, **options) if trained else None  # a frozen reference has none

    def _trained(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.named_parameters().values() if parameter.requires_grad]

    def run(self, function: Callable[..., T], *arguments: Any) -> T:
        """``function(self, *arguments)``: this is the policy's only process."""
        return function(self, *arguments)

    @torch.no_grad()
    def logprobs(self, micro: MicroBatch) -> Tensor:
        """[R], on the CPU."""
        with memory_advice(f"the log-probs of {micro.num_tokens} positions", self.memory_knobs):
            logprobs_R, _ = self.module(micro.to(self.device))
        distributed.reshard(self.module)
        return logprobs_R.float().cpu()  # type: ignore[no-any-return]

    def forward_backward(self, micro: MicroBatch, loss: Loss) -> dict[str, float]:
        """Adds the micro-batch's gradient. FSDP2 averages over processes, so the sum is multiplied by their number."""
        with memory_advice(f"a forward and backward pass over {micro.num_tokens} positions", self.memory_knobs):
            micro = micro.to(self.device)
            logprobs_R, entropy_R = self.module(micro)
            weighted, report = loss(micro, logprobs_R, entropy_R)
            torch.autograd.backward(weighted * distributed.world_size())
        return report

    def optim_step(self, lr: float) -> dict[str, float]:
        """One clipped AdamW step. A gradient that is not finite is not applied: ``skipped`` is 1.

        ``broken`` is 1 if a weight is not finite after the step.
        """
        assert self.optimizer is not None, "a frozen model takes no step"
        norm = distributed.whole(torch.nn.utils.clip_grad_norm_(self._trained(), self.grad_clip))
        finite = bool(torch.isfinite(norm))
        if finite:
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            with memory_advice("the optimizer's step", self.memory_knobs):
                self._move_moments(self.device)
                self.optimizer.step()
                self._publish()
            self._move_moments(torch.device("cpu"))
        self.optimizer.zero_grad(set_to_none=True)
        return {"grad_norm": float(norm), "lr": lr, "skipped": float(not finite), "broken": float(not self._is_sound())}

    def _is_sound(self) -> bool:
        """Whether all weights are finite, in all processes."""
        largest = torch._foreach_norm([distributed.local(weight.detach()) for weight in self._trained()], torch.inf)
        broken = sum(float(not torch.isfinite(norm)) for norm in largest)
        return distributed.sum_over_ranks({"broken": broken})["broken"] == 0

    def _publish(self) -> None:
        if self.masters is not None:
            self.masters.publish()

    def _move_moments(self, device: torch.device) -> None:
        """Moves Adam's moments, under ``optimizer_offload``."""
        if self.optimizer_offload and self.optimizer is not None:
            for parameter, state in self.optimizer.state.items():
                # A parameter in CPU memory takes its step there.
                target = parameter.device if device.type == "cuda" else device
                state |= {name: value.to(target) for name, value in state.items() if name != "step"}

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """By Hugging Face name (with adapters: peft's names); tied weights once."""
        named = self.module.named_parameters() if self.masters is None else self.masters.named.items()
        return {name.removeprefix("causal_lm."): parameter for name, parameter in named}

    def weights(self) -> dict[str, Tensor]:
        """Full tensors on the CPU, in every process, by Hugging Face name; adapters are merged."""
        return dict(lora.merged(self.named_parameters(), lora.scaling_of(self.module), distributed.full))

    def optimizer_state(self) -> dict[str, Tensor]:
        """``<moment>/<parameter>`` (adapters: ``adapter/<parameter>``) -> full tensor on the CPU."""
        assert self.optimizer is not None
        moments = {
            f"{moment}/{name}": distributed.full(value)
            for name, parameter in self.named_parameters().items()
            for moment, value in self.optimizer.state.get(parameter, {}).items()
        }
        adapters = lora.adapter_tensors(self.named_parameters())
        return moments | {f"adapter/{name}": distributed.full(parameter) for name, parameter in adapters.items()}

    @torch.no_grad()
    def load_optimizer_state(self, state: dict[str, Tensor]) -> None:
        """The inverse of ``optimizer_state``, with any number of processes."""
        assert self.optimizer is not None
        parameters, prefix = self.named_parameters(), "adapter/"
        lora.restore(parameters, {key.removeprefix(prefix): state[key] for key in state if key.startswith(prefix)})
        self._publish()
        for name, parameter in parameters.items():
            if parameter.requires_grad:
                moments = self.optimizer.state[parameter] = {}
                if f"step/{name}" in state:
                    moments["step"] = state[f"step/{name}"].to(parameter.device, copy=True)
                for moment in ("exp_avg", "exp_avg_sq"):
                    if f"{moment}/{name}" in state:
                        moments[moment] = distributed.like(parameter, state[f"{moment}/{name}"])


class BaseReference:
    """The frozen reference of a policy with adapters: the same model with the adapters switched off."""

    def __init__(self, policy: LocalPolicy):
        self.policy = policy

    def logprobs(self, micro: MicroBatch) -> Tensor:
        """[R], on the CPU."""
        with lora.without_adapters(self.policy.module):
            return self.policy.logprobs(micro)
