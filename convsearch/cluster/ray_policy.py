"""The policy in several processes, behind the verbs of one: Ray actors, each with a ``LocalPolicy`` sharded by FSDP2.

A micro-batch is split by rows, so packing, loss and step never see processes. Log-probs return in the order of the
micro-batch. The sums that a loss reports add up, because every token carries its weight in the whole mini-batch.
"""

import os
import socket
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from convsearch.cluster.weight_transfer import open_sender
from convsearch.cluster.workers import get_all
from convsearch.config import GrpoConfig
from convsearch.model import distributed
from convsearch.model.batch import Loss, MicroBatch, greedy_bins
from convsearch.model.loading import pick_device
from convsearch.policy.base import T
from convsearch.policy.build import grpo_policy

# One process's rows, and the positions of their response tokens in the micro-batch [R'].
Share = tuple[MicroBatch, Tensor]


def shares(micro: MicroBatch, processes: int) -> list[Share]:
    """One share per process, balanced by tokens (``greedy_bins``).

    A process without a row gets one row of two tokens and weight 0, because FSDP2's collectives need every process.
    """
    lengths = (micro.branch_BT >= 0).sum(dim=1).tolist()
    bins = greedy_bins(lengths, processes)
    return [_share(micro, rows, max((lengths[row] for row in rows), default=0)) for rows in bins]


def _share(micro: MicroBatch, rows: list[int], longest: int) -> Share:
    if not rows:
        return _idle(micro), torch.zeros(0, dtype=torch.long)
    kept_B = torch.tensor(rows)
    places_R = torch.isin(micro.row_R, kept_B).nonzero()[:, 0]
    changed: dict[str, Tensor] = {}
    for column in fields(micro):
        value = getattr(micro, column.name)
        if isinstance(value, Tensor):
            changed[column.name] = value[kept_B, :longest] if column.name.endswith("_BT") else value[places_R]
    changed["row_R"] = torch.searchsorted(kept_B, changed["row_R"])
    return replace(micro, **changed), places_R


def _idle(micro: MicroBatch) -> MicroBatch:
    """One row of a prompt token and a response token of weight 0."""
    changed: dict[str, Tensor] = {}
    for column in fields(micro):
        value = getattr(micro, column.name)
        if isinstance(value, Tensor):
            changed[column.name] = value.new_zeros((1, 2) if column.name.endswith("_BT") else (1,))
    changed["branch_BT"] = torch.tensor([[0, 1]])
    changed["position_ids_BT"] = torch.tensor([[0, 1]])
    return replace(micro, **changed)


class PolicyProcess:
    """One process: its shard of the policy, the reference, and the sending side of the weight transfer."""

    def __init__(self, folder: str, cfg_json: str, run_dir: str, rank: int, world_size: int):
        os.chdir(folder)  # the driver's: paths may be relative
        # Ray makes only the process's own GPU visible, so it is always the first one.
        os.environ.update({"RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_RANK": "0"})
        self.cfg_json, self.run_dir, self.rank = cfg_json, Path(run_dir), rank
        self.models: dict[str, Any] = {}
        self.sender: Any = None

    def address(self) -> tuple[str, int]:
        """Where the other processes reach this one: its address and a free port."""
        import ray

        with socket.socket() as probe:
            probe.bind(("", 0))
            return ray.util.get_node_ip_address(), probe.getsockname()[1]

    def devices(self) -> list[str]:
        """The GPUs of this process, by their numbers on its node."""
        import ray

        return [str(number) for number in ray.get_gpu_ids()]

    def pid(self) -> int:
        return os.getpid()

    def build(self, master: tuple[str, int]) -> tuple[int, Any, Any]:
        """Joins the others and loads the models; returns (steps done, model config, generation config)."""
        os.environ.update({"MASTER_ADDR": master[0], "MASTER_PORT": str(master[1])})
        cfg = GrpoConfig.model_validate_json(self.cfg_json)
        if cfg.trainer.num_threads:
            torch.set_num_threads(cfg.trainer.num_threads)
        device = distributed.start(pick_device(cfg.trainer.device))
        step, policy, reference = grpo_policy(cfg, self.run_dir, device)
        self.models = {"policy": policy, "reference": reference}
        return step, policy.causal_lm.config, getattr(policy.causal_lm, "generation_config", None)

    def call(self, model: str, verb: str, *arguments: Any) -> Any:
        """Calls a verb of the policy or reference. All processes take part; only the first returns a large result."""
        result = getattr(self.models[model], verb)(*arguments)
        return result if self.rank == 0 or verb in ("logprobs", "forward_backward") else None

    def run(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """``function(policy, *arguments)`` in this process."""
        return function(self.models["policy"], *arguments)

    def connect(
        self,
        backend: Literal["ipc", "nccl"],
        bf16: bool,
        samplers: Sequence[Any],
        workers_per_sampler: int,
        master: tuple[str, int],
    ) -> None:
        """Prepares the transfer of weights to the samplers' GPUs; see ``convsearch.cluster.weight_transfer``."""
        policy = self.models["policy"]
        self.sender = open_sender(policy, backend, bf16, self.rank, samplers, workers_per_sampler, master)

    def send_weights(self) -> None:
        """Sends the weights; all processes take part."""
        self.sender.send_weights()
        torch.cuda.empty_cache()


class RayPolicy:
    """Implements ``convsearch.policy.base.Policy`` with several processes.

    Args:
        processes: the actors, in the order of their ranks.
        model: "policy" or "reference"; both are in the same actors.
        causal_lm: an object with the model's ``config`` and ``generation_config``.
        timeout_s: a call that takes longer counts as lost.
    """

    def __init__(self, processes: Sequence[Any], model: str, causal_lm: Any, timeout_s: float):
        self.processes, self.model, self.causal_lm, self.timeout_s = list(processes), model, causal_lm, timeout_s

    def _all(self, verb: str, arguments: Sequence[Sequence[Any]] | None = None) -> list[Any]:
        """The results of a verb in all processes; ``arguments``: those of each process, by default none."""
        each = arguments or [()] * len(self.processes)
        calls = [process.call.remote(self.model, verb, *own) for process, own in zip(self.processes, each, strict=True)]
        return get_all(calls, f"{self.model} {verb}", self.timeout_s)

    def logprobs(self, micro: MicroBatch) -> Tensor:
        """[R], on the CPU, in the order of the micro-batch."""
        split = shares(micro, len(self.processes))
        found_R = torch.zeros(len(micro.row_R))
        for (_, places_R), logprobs_R in zip(split, self._all("logprobs", [(part,) for part, _ in split]), strict=True):
            found_R[places_R] = logprobs_R[: len(places_R)]
        return found_R

    def forward_backward(self, micro: MicroBatch, loss: Loss) -> dict[str, float]:
        """Adds the micro-batch's gradient; the report is the sum over the processes."""
        reports = self._all("forward_backward", [(part, loss) for part, _ in shares(micro, len(self.processes))])
        return {name: sum(report[name] for report in reports) for name in reports[0]}

    def optim_step(self, lr: float) -> dict[str, float]:
        report: dict[str, float] = self._all("optim_step", [(lr,)] * len(self.processes))[0]
        return report

    def weights(self) -> dict[str, Tensor]:
        """Full tensors on the CPU."""
        tensors: dict[str, Tensor] = self._all("weights")[0]
        return tensors

    def weights_ref(self) -> Any:
        """The reference in Ray's store to the full tensors, for samplers to read."""
        first, *others = [process.call.remote(self.model, "weights") for process in self.processes]
        get_all(others, "policy weights", self.timeout_s)
        return first

    def run(self, function: Callable[..., T], *arguments: Any) -> T:
        """``function(local policy, *arguments)`` in every process; the result of the first."""
        calls = [process.run.remote(function, *arguments) for process in self.processes]
        result: T = get_all(calls, getattr(function, "__name__", "a call"), self.timeout_s)[0]
        return result

    def send_weights(self) -> None:
        calls = [process.send_weights.remote() for process in self.processes]
        get_all(calls, "the transfer of weights", self.timeout_s)
