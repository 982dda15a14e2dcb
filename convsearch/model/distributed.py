"""The little that the trainers need of torch.distributed: start, shard, gather. On one process everything here is the identity."""

import os
import sys
from typing import Any

import torch
from torch import Tensor, nn


def start(device: torch.device) -> torch.device:
    """Joins the process group that torchrun announces; returns this rank's device."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or torch.distributed.is_initialized():
        return device
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    torch.distributed.init_process_group(_backends(device))
    return device


def _backends(device: torch.device) -> str:
    """gloo beside nccl, because what is kept in CPU memory is gathered there."""
    return "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"


def stop(status: int = 0) -> None:
    """The end of a rank's work: leaves the process group, and with several ranks the process too, with that exit status.

    The interpreter is not wound down: gloo's threads may still hold Python tensors, DTensor's caches keep those threads alive, and letting go
    of a tensor then aborts the process ("terminate called without an active exception", pytorch/pytorch#179291).
    """
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def world_size() -> int:
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


def rank() -> int:
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def barrier() -> None:
    if world_size() > 1:
        torch.distributed.barrier()


def sum_over_ranks(values: dict[str, float]) -> dict[str, float]:
    """Adds up named numbers; every rank must bring the same names."""
    if world_size() == 1:
        return values
    totals = torch.tensor(
        [values[name] for name in sorted(values)], dtype=torch.float64
    )  # by gloo: a few numbers, on the CPU
    torch.distributed.all_reduce(totals)
    return dict(zip(sorted(values), totals.tolist(), strict=True))


def shard(module: Any, device: torch.device, *, bf16: bool = False, offload: bool = False) -> Any:
    """Moves the module to the device; with several ranks, FSDP2 shards each decoder layer and the rest as one unit.

    Args:
        bf16: where it is sharded, parameters are gathered and multiplied in bfloat16, gradients reduced in float32; the shards stay in float32.
        offload: between uses the shards (and their gradients and Adam's state) live in CPU memory, where the optimizer steps. On a GPU, one rank
            is a mesh of its own then; on a CPU everything is there already.
    """
    offload = offload and device.type == "cuda"
    if world_size() == 1 and not offload:
        return module.to(device)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard

    if not torch.distributed.is_initialized():
        store = torch.distributed.HashStore()  # type: ignore[attr-defined]
        torch.distributed.init_process_group(_backends(device), store=store, rank=0, world_size=1)
    if offload:
        for buffer in module.buffers():  # FSDP2 moves parameters alone
            buffer.data = buffer.data.to(device)
    else:
        module = module.to(device)
    options: dict[str, Any] = {"mesh": init_device_mesh(device.type, (world_size(),))}
    if bf16:
        options["mp_policy"] = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    if offload:
        options["offload_policy"] = CPUOffloadPolicy()
    for layer in module.causal_lm.model.layers:
        fully_shard(layer, **options)
    return fully_shard(module, **options)


def is_sharded(module: Any) -> bool:
    return hasattr(module, "reshard")


def reshard(module: Any) -> None:
    """Gives back what a forward pass without a backward pass has gathered: FSDP2 keeps the outermost unit whole until then, and what is
    whole is not the parameter that the optimizer knows."""
    if is_sharded(module):
        module.reshard()


def full(tensor: Tensor | nn.Parameter) -> Tensor:
    """The whole tensor on the CPU, gathered where it is sharded (a collective call)."""
    whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    copied: Tensor = whole.detach().cpu().clone()
    return copied


def like(parameter: nn.Parameter, value: Tensor) -> Tensor:
    """``value`` laid out as ``parameter`` is: on its device, sharded where it is sharded."""
    if hasattr(parameter, "device_mesh"):
        from torch.distributed.tensor import distribute_tensor

        mesh = parameter.device_mesh
        sharded: Tensor = distribute_tensor(value.to(mesh.device_type), mesh, parameter.placements).to(parameter.device)  # type: ignore[attr-defined]
        return sharded
    return value.to(parameter.device)
