"""What the trainers need of torch.distributed: start, shard, gather. On one process all of it is the identity."""

import os
import sys
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import distribute_tensor


def start(device: torch.device) -> torch.device:
    """Joins the process group of torchrun's environment variables; returns this rank's device."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or torch.distributed.is_initialized():
        return device
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    torch.distributed.init_process_group(_backends(device))
    return device


def _backends(device: torch.device) -> str:
    """gloo beside nccl, because tensors in CPU memory are gathered there."""
    return "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"


def stop(status: int = 0) -> None:
    """Leaves the process group; with several ranks it also ends the process, with that exit status.

    The interpreter does not shut down normally: gloo's threads may still hold Python tensors, DTensor's caches keep
    those threads alive, and freeing a tensor then aborts the process ("terminate called without an active exception",
    pytorch/pytorch#179291).
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
    """Sums of named numbers over the ranks; every rank must have the same names."""
    if world_size() == 1:
        return values
    names = sorted(values)
    totals = torch.tensor([values[name] for name in names], dtype=torch.float64)  # a few numbers on the CPU: by gloo
    torch.distributed.all_reduce(totals)
    return dict(zip(names, totals.tolist(), strict=True))


def shard(module: Any, device: torch.device, *, bf16: bool = False, offload: bool = False) -> Any:
    """Moves the module to the device; with several ranks, FSDP2 shards each decoder layer and the rest as one unit.

    Args:
        bf16: a sharded module gathers and multiplies parameters in bfloat16 and reduces gradients in float32; the
            shards stay in float32.
        offload: between uses the shards, their gradients and Adam's state are in CPU memory, where the optimizer steps.
            On a GPU, a single rank then has its own mesh; on a CPU this changes nothing.
    """
    offload = offload and device.type == "cuda"
    if world_size() == 1 and not offload:
        return module.to(device)
    if not torch.distributed.is_initialized():
        store = torch.distributed.HashStore()  # type: ignore[attr-defined]
        torch.distributed.init_process_group(_backends(device), store=store, rank=0, world_size=1)
    if offload:
        for buffer in module.buffers():  # FSDP2 moves only parameters
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
    """Frees what a forward pass without a backward pass has gathered.

    Until then FSDP2 keeps the outermost unit whole, and its whole parameters are not those that the optimizer knows.
    """
    if is_sharded(module):
        module.reshard()


def local(tensor: Any) -> Tensor:
    """This rank's part of a sharded tensor."""
    part: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return part


def whole(tensor: Any) -> Tensor:
    """The whole tensor, gathered if it is sharded (a collective call)."""
    gathered: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return gathered


def full(tensor: Tensor | nn.Parameter) -> Tensor:
    """A copy of the whole tensor on the CPU (a collective call)."""
    return whole(tensor).detach().cpu().clone()


def like(parameter: nn.Parameter, value: Tensor) -> Tensor:
    """``value`` in the layout of ``parameter``: on its device, sharded if it is sharded."""
    if hasattr(parameter, "device_mesh"):
        mesh = parameter.device_mesh
        value = distribute_tensor(value.to(mesh.device_type), mesh, parameter.placements)  # type: ignore[attr-defined]
    return value.to(parameter.device)
