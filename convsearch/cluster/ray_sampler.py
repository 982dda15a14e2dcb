"""Samplers in processes of their own, and the one that the step sees."""

import os
from collections.abc import Iterator, Sequence
from typing import Any

from convsearch.cluster.workers import answers, streamed
from convsearch.sampling.hf import Finished, Tensors, collect
from convsearch.types import Completion


class SamplerWorker:
    """One engine in a process of its own: vLLM, or ``HfSampler`` with a copy of the model."""

    def __init__(self, folder: str, cfg_json: str, transfer: str | None):
        os.chdir(folder)  # the driver's: paths may be relative
        self.cfg_json, self.transfer = cfg_json, transfer
        self.sampler: Any = None

    def pid(self) -> int:
        return os.getpid()

    def build(self, devices: list[str]) -> None:
        """Loads the engine; ``devices`` are the GPUs to use where Ray has given this process none of its own."""
        if devices:
            os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(devices)
        from convsearch.cluster.launch import build_engine
        from convsearch.config import GrpoConfig

        self.sampler = build_engine(GrpoConfig.model_validate_json(self.cfg_json), self.transfer)

    def stream(self, prompts: list[tuple[int, ...]], n: int, seed: int, keys: list[int]) -> Iterator[Finished]:
        yield from self.sampler.stream(prompts, n, seed, keys)

    def load(self, tensors: dict[str, Any], version: int) -> None:
        self.sampler.load_weights(Tensors(tensors), version)

    def stamp(self, version: int) -> None:
        self.sampler.stamp(version)

    def sleep(self) -> None:
        self.sampler.sleep()

    def wake_up(self, tags: list[str]) -> None:
        self.sampler.wake_up(tags)

    # The four verbs of vLLM's weight transfer, which its sending end calls on this actor.

    def init_weight_transfer_engine(self, request: Any) -> None:
        self.sampler.llm.init_weight_transfer_engine(request)

    def start_weight_update(self) -> None:
        self.sampler.llm.start_weight_update()

    def update_weights(self, request: Any) -> None:
        self.sampler.llm.update_weights(request)

    def finish_weight_update(self) -> None:
        self.sampler.llm.finish_weight_update()


class RaySampler:
    """Implements ``convsearch.sampling.hf.Sampler`` over several workers.

    Args:
        transfer: weights go over by vLLM's transfer (on GPUs) instead of Ray's store.
        shared: the workers stand on the policy's GPUs, and sleep while it trains.
        timeout_s: the longest silence of a worker.
    """

    def __init__(self, workers: Sequence[Any], *, transfer: bool, shared: bool, timeout_s: float):
        self.workers, self.transfer, self.shared, self.timeout_s = list(workers), transfer, shared, timeout_s

    def generate(self, prompts: Sequence[tuple[int, ...]], n: int, seed: int) -> list[Completion]:
        return collect(self.stream(prompts, n, seed), len(prompts), n)

    def stream(self, prompts: Sequence[tuple[int, ...]], n: int, seed: int) -> Iterator[Finished]:
        """A prompt's place is its key, so that its samples are the same whichever worker draws them."""
        parts = [part for part in split(prompts, len(self.workers)) if part]
        calls = [
            worker.stream.options(num_returns="streaming").remote([prompts[p] for p in part], n, seed, part)
            for worker, part in zip(self.workers, parts, strict=False)
        ]
        for call, (places, completions) in streamed(calls, "sampling", self.timeout_s):
            yield [parts[call][place] for place in places], completions
        if self.transfer and self.shared:
            self._all("sleep")

    def load_weights(self, source: Any, version: int) -> None:
        """Takes over the weights of a ``RayPolicy``; completions carry ``version`` from now on."""
        if not self.transfer:
            self._all("load", source.weights_ref(), version)
            return
        if self.shared:
            self._all("wake_up", ["weights"])
        source.send_weights()
        if self.shared:
            self._all("wake_up", ["kv_cache", "scheduling"])
        self._all("stamp", version)

    def _all(self, verb: str, *arguments: Any) -> None:
        answers(
            [getattr(worker, verb).remote(*arguments) for worker in self.workers], f"sampler {verb}", self.timeout_s
        )


def split(prompts: Sequence[tuple[int, ...]], workers: int) -> list[list[int]]:
    """Places of the prompts of each worker, balanced by tokens."""
    parts: list[list[int]] = [[] for _ in range(workers)]
    loads = [0] * workers
    for p in sorted(range(len(prompts)), key=lambda p: (-len(prompts[p]), p)):
        least = loads.index(min(loads))
        parts[least].append(p)
        loads[least] += len(prompts[p])
    return [sorted(part) for part in parts]
