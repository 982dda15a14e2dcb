"""Weights from the policy's processes to vLLM on GPUs, by vLLM's own transfer (0.32, docs: training/weight_transfer).

IPC if sampler and policy share a GPU, NCCL if they do not. Each process gathers one parameter after another with the
others; process 0 talks to the samplers. On a CPU weights travel through Ray's object store instead
(``cluster.ray_sampler``), because vLLM's transfer needs CUDA.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from convsearch.cluster.workers import get_all
from convsearch.model import distributed, lora
from convsearch.policy.policy import LocalPolicy

TRANSFER_TIMEOUT_S = 600.0


class SamplerClient:
    """What vLLM's sending side calls: each verb goes to every sampler and returns when all have answered."""

    def __init__(self, samplers: Sequence[Any], workers_per_sampler: int):
        self.samplers, self.workers_per_sampler = list(samplers), workers_per_sampler

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        from vllm.distributed.weight_transfer.base import WeightTransferInitRequest

        requests = []
        for number in range(len(self.samplers)):
            own = dict(init_info)
            if "rank_offset" in own:  # otherwise every sampler would number its workers from the same rank
                own["rank_offset"] += number * self.workers_per_sampler
            requests.append(WeightTransferInitRequest(init_info=own))
        self._all("init_weight_transfer_engine", [(request,) for request in requests])

    def start_weight_update(self) -> None:
        self._all("start_weight_update", [()] * len(self.samplers))

    def update_weights(self, update_info: Any) -> None:
        from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest

        self._all("update_weights", [(WeightTransferUpdateRequest(update_info=update_info),)] * len(self.samplers))

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self._all("finish_weight_update", [()] * len(self.samplers))

    def _all(self, verb: str, arguments: Sequence[Sequence[Any]]) -> None:
        refs = [getattr(sampler, verb).remote(*mine) for sampler, mine in zip(self.samplers, arguments, strict=True)]
        get_all(refs, f"sampler {verb}", TRANSFER_TIMEOUT_S)


def open_sender(
    policy: LocalPolicy,
    backend: str,
    bf16: bool,
    rank: int,
    samplers: Sequence[Any],
    workers_per_sampler: int,
    master: tuple[str, int],
) -> Any:
    """The sending side of this process; all processes call it, and later its ``send_weights()``.

    Args:
        backend: "ipc" or "nccl".
        bf16: the samplers compute in bfloat16, so half as many bytes travel.
        samplers: the actors; process 0 talks to them.
        workers_per_sampler: GPUs of one sampler (its tensor parallelism).
        master: the address of the NCCL group of process 0 and the samplers' workers.
    """
    from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource
    from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory

    class Source(WeightSource):  # type: ignore[misc]
        """The parameters by Hugging Face name, whole, on this process's GPU, in the samplers' type."""

        def metadata(self) -> list[Any]:
            tensors = policy.named_parameters()
            adapters = lora.adapter_tensors(tensors)  # sent merged
            kept = {lora.plain_name(name): value for name, value in tensors.items() if name not in adapters}
            return [ParamMeta(name, wire(value), tuple(value.shape)) for name, value in kept.items()]

        def __iter__(self) -> Iterator[tuple[str, Tensor]]:
            scaling = lora.scaling_of(policy.module)
            for name, whole in lora.merged(policy.named_parameters(), scaling, distributed.whole):
                yield name, whole.to(policy.device, wire(whole))

    def wire(value: Tensor) -> torch.dtype:
        return torch.bfloat16 if bf16 else value.dtype

    if backend == "ipc":
        from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo

        info: Any = IPCTrainerInitInfo(packed=True, rank=rank)
    else:
        from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

        world_size = 1 + len(samplers) * workers_per_sampler
        info = NCCLTrainerInitInfo(master_address=master[0], master_port=master[1], world_size=world_size, rank=rank)
    client = SamplerClient(samplers, workers_per_sampler)
    return WeightTransferTrainerFactory.trainer_init(info, client=client, source=Source())
