"""Arithmetic in bfloat16 on one device: the module computes in bfloat16, its trained weights stay in float32.

Autocast would cast every weight again in every pass, which costs as much as the products of a small model. Here the
module itself has bfloat16 parameters, as a sharded one has under FSDP2, and a sampler that shares it computes with the
very same numbers.
"""

from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from convsearch.config.base import Section

S = TypeVar("S", bound=Section)


def settled_name(name: str, device: torch.device) -> str:
    """``auto`` is bf16 where the processor multiplies it (avx512_bf16, AMX, CUDA from Ampere on), else fp32."""
    return name if name != "auto" else "bf16" if _multiplies_bf16(device) else "fp32"


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """The type that ``auto``, ``fp32`` or ``bf16`` means on this device."""
    return {"fp32": torch.float32, "bf16": torch.bfloat16}[settled_name(name, device)]


def settled(section: S, device: torch.device) -> S:
    """The section with the type that its key ``dtype`` means on this device, so that a run's config.json has it."""
    return section.model_copy(update={"dtype": settled_name(section.dtype, device)})  # type: ignore[attr-defined]


def _multiplies_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def cast(module: nn.Module) -> None:
    """Casts the parameters to bfloat16 in place; buffers (the frequencies of rotary embeddings) stay in float32."""
    for parameter in module.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)


class Masters:
    """The float32 weights of a module, which itself is cast to bfloat16.

    The gradient of each backward pass is added to that of the float32 weights, in float32. After a step of the
    optimizer, ``publish`` copies the float32 weights into the module.
    """

    def __init__(self, module: nn.Module):
        self.module = module
        self.named: dict[str, nn.Parameter] = {}
        for name, parameter in module.named_parameters():
            trained = parameter.requires_grad
            master = self.named[name] = nn.Parameter(parameter.detach().float(), requires_grad=trained)
            if trained:
                parameter.register_post_accumulate_grad_hook(partial(_collect, master))  # type: ignore[no-untyped-call]
        cast(module)

    @torch.no_grad()
    def publish(self) -> None:
        for name, parameter in self.module.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(self.named[name])


def _collect(master: nn.Parameter, parameter: Tensor) -> Any:
    assert parameter.grad is not None
    if master.grad is None:
        master.grad = parameter.grad.float()
    else:
        master.grad += parameter.grad
    parameter.grad = None
