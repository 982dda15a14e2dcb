"""Low-rank adapters (peft): a few trained matrices beside frozen weights. The reference is the same model with them turned off.

The adapters are injected into the model's own linear layers, so that the model keeps its class and everything else here works as without them.
What leaves the trainer (exports, weights for samplers) is merged: names and shapes of the Hugging Face model.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

_A, _B, _BASE = ".lora_A.default.weight", ".lora_B.default.weight", ".base_layer."


def add_adapters(
    causal_lm: Any, rank: int, alpha: float, targets: tuple[str, ...] = ("all-linear",), seed: int = 1
) -> None:
    """Freezes the model and puts a rank-``rank`` adapter, scaled by alpha / rank, beside each target layer; at first they change nothing.

    Args:
        seed: of the adapters' first values; equal on all ranks and in a resumed run.
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
    """The base model alone, for as long as this lasts."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [layer for layer in module.modules() if isinstance(layer, BaseTunerLayer)]
    for layer in layers:
        layer._disable_adapters = True  # enable_adapters(False) would freeze them as well, which FSDP2 does not expect
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


class Reference:
    """The frozen reference of a policy with adapters: no weights of its own. ``policy`` is a ``convsearch.policy.policy.Policy``."""

    def __init__(self, policy: Any):
        self.policy, self.causal_lm = policy, policy.causal_lm

    def logprobs(self, micro: Any) -> Tensor:
        """[R], on the CPU."""
        with without_adapters(self.policy.module):
            found: Tensor = self.policy.logprobs(micro)
        return found


def adapter_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those of the named tensors or parameters that are an adapter's."""
    return {name: tensor for name, tensor in tensors.items() if name.endswith((_A, _B))}


def plain_name(name: str) -> str:
    """The name that a base weight has in the model without adapters."""
    return name.replace(_BASE, ".")


def merged(
    tensors: Mapping[str, Tensor], scaling: float, whole: Callable[[Tensor], Tensor] = lambda tensor: tensor
) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of the model without adapters, one after another: base + scaling x B A where there is an adapter.

    Args:
        whole: gathers a tensor that is sharded; called in the same order on every rank.
    """
    for name, tensor in tensors.items():
        if name.endswith((_A, _B)):
            continue
        full, layer = whole(tensor).detach(), name.removesuffix(f"{_BASE}weight")
        if f"{layer}{_A}" in tensors and name != layer:
            product = (
                whole(tensors[f"{layer}{_B}"]).detach().double() @ whole(tensors[f"{layer}{_A}"]).detach().double()
            )
            full = (full.double() + scaling * product).to(full.dtype)
        yield plain_name(name), full


def scaling_of(module: nn.Module) -> float:
    """alpha / rank of a module's adapters; 1 where it has none."""
    layers: Iterator[Any] = module.modules()
    scalings = (layer.scaling["default"] for layer in layers if hasattr(layer, "lora_A"))
    return float(next(scalings, 1.0))


@torch.no_grad()
def restore(named_parameters: dict[str, nn.Parameter], tensors: dict[str, Tensor]) -> None:
    """Copies saved adapters into their places, sharded or not."""
    from convsearch.model.distributed import like

    for name, tensor in tensors.items():
        named_parameters[name].copy_(like(named_parameters[name], tensor))
