"""The way of the weights from the policy's ranks to vLLM on GPUs: vLLM's own transfer (docs.vllm.ai, training/weight_transfer, 0.32).

IPC where sampler and policy share a GPU, NCCL where they do not. Each rank gathers one parameter after another with the others; rank 0 talks to
the samplers. On a CPU weights go through Ray's object store instead (``convsearch.cluster.ray_sampler``), for vLLM's transfer needs CUDA.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from convsearch.cluster.workers import answers
from convsearch.model import lora

TRANSFER_TIMEOUT_S = 600.0


class SamplerClient:
    """What vLLM's sending end calls: each verb goes to every sampler, and ends when all have answered."""

    def __init__(self, samplers: Sequence[Any], workers_a_sampler: int):
        self.samplers, self.workers_a_sampler = list(samplers), workers_a_sampler

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        from vllm.distributed.weight_transfer.base import WeightTransferInitRequest

        requests = []
        for number in range(len(self.samplers)):
            own = dict(init_info)
            if (
                "rank_offset" in own
            ):  # the samplers are engines of their own, each of which would count its workers from the same rank
                own["rank_offset"] += number * self.workers_a_sampler
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
        answers(refs, f"sampler {verb}", TRANSFER_TIMEOUT_S)


def open_sender(
    policy: Any,
    backend: str,
    bf16: bool,
    rank: int,
    samplers: Sequence[Any],
    workers_a_sampler: int,
    master: tuple[str, int],
) -> Any:
    """The sending end of this rank; all ranks call it, and later its ``send_weights()``.

    Args:
        backend: "ipc" or "nccl".
        bf16: the samplers compute in bfloat16: half as much has to travel.
        samplers: the actors; rank 0 talks to them.
        workers_a_sampler: GPUs of one sampler (its tensor parallelism).
        master: where the NCCL group of rank 0 and the samplers' workers meets.
    """
    from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource
    from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory

    class Source(WeightSource):  # type: ignore[misc]
        """The parameters under their Hugging Face names, whole, on this rank's GPU, in the samplers' type."""

        def metadata(self) -> list[Any]:
            tensors = policy.named_parameters()
            adapters = lora.adapter_tensors(tensors)  # sent merged
            kept = {lora.plain_name(name): value for name, value in tensors.items() if name not in adapters}
            return [ParamMeta(name, wire(value), tuple(value.shape)) for name, value in kept.items()]

        def __iter__(self) -> Iterator[tuple[str, Tensor]]:
            for name, whole in lora.merged(policy.named_parameters(), lora.scaling_of(policy.module), gathered):
                yield name, whole.to(policy.device, wire(whole))

    def gathered(value: Any) -> Tensor:
        whole: Tensor = value.full_tensor() if hasattr(value, "full_tensor") else value
        return whole

    def wire(value: Tensor) -> torch.dtype:
        return torch.bfloat16 if bf16 else value.dtype

    if backend == "ipc":
        from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo

        info: Any = IPCTrainerInitInfo(packed=True, rank=rank)
    else:
        from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

        world_size = 1 + len(samplers) * workers_a_sampler
        info = NCCLTrainerInitInfo(master_address=master[0], master_port=master[1], world_size=world_size, rank=rank)
    return WeightTransferTrainerFactory.trainer_init(
        info, client=SamplerClient(samplers, workers_a_sampler), source=Source()
    )
