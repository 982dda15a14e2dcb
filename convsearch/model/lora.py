"""Low-rank adapters (peft): small trained matrices beside frozen weights. The reference is the model without them.

The adapters are injected into the linear layers of the model, which keeps its class; other code does not see them.
Exports and the weights for samplers are merged: they have the names and shapes of the Hugging Face model.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from convsearch.model.distributed import like

_A, _B, _BASE = ".lora_A.default.weight", ".lora_B.default.weight", ".base_layer."


def add_adapters(
    causal_lm: Any, rank: int, alpha: float, targets: tuple[str, ...] = ("all-linear",), seed: int = 1
) -> None:
    """Freezes the model and adds an adapter to each target layer, scaled by alpha / rank; initially it changes nothing.

    Args:
        seed: of the adapters' initial values; equal on all ranks and in a resumed run.
        targets: names of linear layers (``q_proj``), or ``all-linear`` for all but the output layer.

    Raises:
        ValueError: peft is not installed, or no layer has one of the names.
    """
    try:
        from peft import LoraConfig
        from peft.tuners.lora import LoraModel
    except ImportError:
        raise ValueError("actor_rollout_ref.model.lora_rank needs peft: pip install 'convsearch[lora]'") from None
    names = targets[0] if targets == ("all-linear",) else list(targets)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        LoraModel(causal_lm, LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=0.0, target_modules=names), "default")


@contextmanager
def without_adapters(module: nn.Module) -> Iterator[None]:
    """Within the block the module is the base model."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [layer for layer in module.modules() if isinstance(layer, BaseTunerLayer)]
    for layer in layers:
        layer._disable_adapters = True  # enable_adapters(False) would also freeze them, which FSDP2 forbids
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


def adapter_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of the adapters."""
    return {name: tensor for name, tensor in tensors.items() if name.endswith((_A, _B))}


def plain_name(name: str) -> str:
    """The name of a base weight in the model without adapters."""
    return name.replace(_BASE, ".")


def merged(
    tensors: Mapping[str, Tensor], scaling: float, whole: Callable[[Tensor], Tensor] = lambda tensor: tensor
) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of the model without adapters: base + scaling x B A for a layer with an adapter.

    Args:
        whole: gathers a sharded tensor; called in the same order on every rank.
    """
    for name, tensor in tensors.items():
        if name.endswith((_A, _B)):
            continue
        full, layer = whole(tensor).detach(), name.removesuffix(f"{_BASE}weight")
        if f"{layer}{_A}" in tensors and name != layer:
            b, a = (whole(tensors[f"{layer}{part}"]).detach().double() for part in (_B, _A))
            full = (full.double() + scaling * (b @ a)).to(full.dtype)
        yield plain_name(name), full


def scaling_of(module: nn.Module) -> float:
    """alpha / rank of a module's adapters; 1 if it has none."""
    layers: Iterator[Any] = module.modules()
    scalings = (layer.scaling["default"] for layer in layers if hasattr(layer, "lora_A"))
    return float(next(scalings, 1.0))


@torch.no_grad()
def restore(named_parameters: dict[str, nn.Parameter], tensors: dict[str, Tensor]) -> None:
    """Copies saved adapters into the parameters, sharded or not."""
    for name, tensor in tensors.items():
        named_parameters[name].copy_(like(named_parameters[name], tensor))
