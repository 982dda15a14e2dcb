"""The policy spread over processes: one Ray actor a rank, each with today's ``Policy`` sharded by FSDP2, behind the verbs of a single one.

A micro-batch is split by rows, so that packing, loss and step never see ranks: log-probs come back in the micro-batch's order, and the named sums
of a loss add up, because every token carries its weight of the whole mini-batch.
"""

import os
import socket
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from convsearch.cluster.workers import answers
from convsearch.model.batch import MicroBatch

Share = tuple[
    MicroBatch, Tensor
]  # the rows of one rank, and which of the micro-batch's response tokens are theirs [R']


def shares(micro: MicroBatch, ranks: int) -> list[Share]:
    """One share a rank, balanced by tokens: the longest row goes where the least is, again and again.

    A rank without a row gets one of two tokens and weight 0, because FSDP2's collectives need every rank.
    """
    rows: list[list[int]] = [[] for _ in range(ranks)]
    loads = [0] * ranks
    lengths = (micro.branch_BT >= 0).sum(dim=1).tolist()
    for row in sorted(range(len(lengths)), key=lambda r: (-lengths[r], r)):
        least = loads.index(min(loads))
        rows[least].append(row)
        loads[least] += lengths[row]
    return [_share(micro, sorted(mine), max((lengths[row] for row in mine), default=0)) for mine in rows]


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
    """A row of a prompt token and a response token that weighs nothing."""
    changed: dict[str, Tensor] = {}
    for column in fields(micro):
        value = getattr(micro, column.name)
        if isinstance(value, Tensor):
            changed[column.name] = value.new_zeros((1, 2) if column.name.endswith("_BT") else (1,))
    changed["branch_BT"] = torch.tensor([[0, 1]])
    changed["position_ids_BT"] = torch.tensor([[0, 1]])
    return replace(micro, **changed)


class PolicyRank:
    """One rank, in a process of its own: the policy, the frozen reference, and the sending end of the weights' way to the samplers."""

    def __init__(self, folder: str, cfg_json: str, run_dir: str, rank: int, world_size: int):
        os.chdir(folder)  # the driver's: paths may be relative
        # Ray shows a rank its own GPU alone, so that it is the first one.
        os.environ.update({"RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_RANK": "0"})
        self.cfg_json, self.run_dir, self.rank = cfg_json, Path(run_dir), rank
        self.models: dict[str, Any] = {}
        self.sender: Any = None

    def address(self) -> tuple[str, int]:
        """Where the other ranks find this one: its address and a free port."""
        import ray

        with socket.socket() as probe:
            probe.bind(("", 0))
            return ray.util.get_node_ip_address(), probe.getsockname()[1]

    def devices(self) -> list[str]:
        """The GPUs of this rank, by their numbers on its node."""
        import ray

        return [str(number) for number in ray.get_gpu_ids()]

    def pid(self) -> int:
        return os.getpid()

    def build(self, master: tuple[str, int]) -> tuple[int, Any, Any]:
        """Joins the other ranks and loads the models; returns (step of the checkpoint, the model's config, its generation config)."""
        from convsearch.config import GrpoConfig
        from convsearch.model import distributed
        from convsearch.model.loading import pick_device
        from convsearch.trainers.grpo import build_policy

        os.environ.update({"MASTER_ADDR": master[0], "MASTER_PORT": str(master[1])})
        cfg = GrpoConfig.model_validate_json(self.cfg_json)
        if cfg.trainer.num_threads:
            torch.set_num_threads(cfg.trainer.num_threads)
        device = distributed.start(pick_device(cfg.trainer.device))
        step, policy, reference = build_policy(cfg, self.run_dir, device)
        self.models = {"policy": policy, "reference": reference}
        return step, policy.causal_lm.config, getattr(policy.causal_lm, "generation_config", None)

    def call(self, model: str, verb: str, *arguments: Any) -> Any:
        """A verb of the policy or of the reference; large answers come from rank 0 alone, though all take part."""
        answer = getattr(self.models[model], verb)(*arguments)
        return answer if self.rank == 0 or verb in ("logprobs", "forward_backward") else None

    def run(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """``function(policy, *arguments)`` in every rank."""
        return function(self.models["policy"], *arguments)

    def connect(
        self, backend: str, bf16: bool, samplers: Sequence[Any], workers_a_sampler: int, master: tuple[str, int]
    ) -> None:
        """Prepares the transfer of weights to the samplers' GPUs; see ``convsearch.cluster.weight_transfer``."""
        from convsearch.cluster.weight_transfer import open_sender

        self.sender = open_sender(self.models["policy"], backend, bf16, self.rank, samplers, workers_a_sampler, master)

    def send_weights(self) -> None:
        """Hands the weights over; all ranks take part."""
        self.sender.send_weights()
        torch.cuda.empty_cache()


class RayPolicy:
    """The verbs of ``convsearch.policy.policy.Policy`` over all ranks.

    Args:
        ranks: the actors, in the order of their ranks.
        model: "policy" or "reference"; both live in the same actors.
        causal_lm: something with the model's ``config`` and ``generation_config``.
        timeout_s: an answer that takes longer counts as lost.
    """

    def __init__(self, ranks: Sequence[Any], model: str, causal_lm: Any, timeout_s: float):
        self.ranks, self.model, self.causal_lm, self.timeout_s = list(ranks), model, causal_lm, timeout_s

    def _all(self, verb: str, arguments: Sequence[Sequence[Any]]) -> list[Any]:
        refs = [rank.call.remote(self.model, verb, *mine) for rank, mine in zip(self.ranks, arguments, strict=True)]
        return answers(refs, f"{self.model} {verb}", self.timeout_s)

    def logprobs(self, micro: MicroBatch) -> Tensor:
        """[R], on the CPU, in the micro-batch's order."""
        parts = shares(micro, len(self.ranks))
        found_R = torch.zeros(len(micro.row_R))
        for (_, places_R), logprobs_R in zip(parts, self._all("logprobs", [(part,) for part, _ in parts]), strict=True):
            found_R[places_R] = logprobs_R[: len(places_R)]
        return found_R

    def forward_backward(self, micro: MicroBatch, loss: Any) -> dict[str, float]:
        """Adds the micro-batch's gradient; the report is the sum over the ranks."""
        reports = self._all("forward_backward", [(part, loss) for part, _ in shares(micro, len(self.ranks))])
        return {name: sum(report[name] for report in reports) for name in reports[0]}

    def optim_step(self, lr: float) -> dict[str, float]:
        report: dict[str, float] = self._all("optim_step", [(lr,)] * len(self.ranks))[0]
        return report

    def weights(self) -> dict[str, Tensor]:
        """Full tensors on the CPU."""
        tensors: dict[str, Tensor] = self._all("weights", [()] * len(self.ranks))[0]
        return tensors

    def weights_ref(self) -> Any:
        """Where in Ray's store the full tensors are, for samplers to read."""
        refs = [rank.call.remote(self.model, "weights") for rank in self.ranks]
        answers(refs[1:], "policy weights", self.timeout_s)
        return refs[0]

    def optimizer_state(self) -> dict[str, Tensor]:
        state: dict[str, Tensor] = self._all("optimizer_state", [()] * len(self.ranks))[0]
        return state

    def load_optimizer_state(self, state: dict[str, Tensor]) -> None:
        self._all("load_optimizer_state", [(state,)] * len(self.ranks))

    def run(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """``function(policy, *arguments)`` in every rank's process; the answer of rank 0."""
        return answers(
            [rank.run.remote(function, *arguments) for rank in self.ranks],
            getattr(function, "__name__", "a call"),
            self.timeout_s,
        )[0]

    def send_weights(self) -> None:
        answers([rank.send_weights.remote() for rank in self.ranks], "the transfer of weights", self.timeout_s)
