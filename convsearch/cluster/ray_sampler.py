"""Samplers in processes of their own, and the one sampler that the step sees."""

import os
from collections.abc import Iterator, Sequence
from typing import Any, Literal

from convsearch.cluster.ray_policy import RayPolicy
from convsearch.cluster.workers import get_all, streamed
from convsearch.config import GrpoConfig
from convsearch.model.batch import greedy_bins
from convsearch.sampling.base import Finished, Prompt, Tensors, WeightSource, collect
from convsearch.sampling.build import build_engine
from convsearch.types import Completion

Transfer = Literal["ipc", "nccl"] | None


class SamplerWorker:
    """One engine in a process of its own: vLLM, or ``HfSampler`` with a copy of the model."""

    def __init__(self, folder: str, cfg_json: str, transfer: Transfer):
        os.chdir(folder)  # the driver's: paths may be relative
        self.cfg_json, self.transfer = cfg_json, transfer
        self.sampler: Any = None

    def pid(self) -> int:
        return os.getpid()

    def build(self, devices: list[str]) -> None:
        """Loads the engine; ``devices``: the GPUs to use if Ray has given this process none."""
        if devices:
            os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(devices)
        self.sampler = build_engine(GrpoConfig.model_validate_json(self.cfg_json), self.transfer)

    def stream(self, prompts: list[Prompt], n: int, seed: int, keys: list[int]) -> Iterator[Finished]:
        yield from self.sampler.stream(prompts, n, seed, keys)

    def load(self, tensors: dict[str, Any], version: int) -> None:
        self.sampler.load_weights(Tensors(tensors), version)

    def stamp(self, version: int) -> None:
        self.sampler.stamp(version)

    def sleep(self) -> None:
        self.sampler.sleep()

    def wake_up(self, tags: list[str]) -> None:
        self.sampler.wake_up(tags)

    # The four verbs of vLLM's weight transfer; the sending side calls them on this actor.

    def init_weight_transfer_engine(self, request: Any) -> None:
        self.sampler.llm.init_weight_transfer_engine(request)

    def start_weight_update(self) -> None:
        self.sampler.llm.start_weight_update()

    def update_weights(self, request: Any) -> None:
        self.sampler.llm.update_weights(request)

    def finish_weight_update(self) -> None:
        self.sampler.llm.finish_weight_update()


class RaySampler:
    """Implements ``convsearch.sampling.base.Sampler`` with several workers.

    Args:
        transfer: weights travel by vLLM's transfer (on GPUs) instead of Ray's store.
        shared: the workers use the policy's GPUs, and sleep while it trains.
        timeout_s: longest silence of a worker.
    """

    def __init__(self, workers: Sequence[Any], *, transfer: bool, shared: bool, timeout_s: float):
        self.workers, self.transfer, self.shared, self.timeout_s = list(workers), transfer, shared, timeout_s

    def generate(self, prompts: Sequence[Prompt], n: int, seed: int) -> list[list[Completion]]:
        return collect(self.stream(prompts, n, seed), len(prompts))

    def stream(self, prompts: Sequence[Prompt], n: int, seed: int) -> Iterator[Finished]:
        """A prompt's position is its key, so that its samples are the same whichever worker draws them."""
        bins = [places for places in greedy_bins(list(map(len, prompts)), len(self.workers)) if places]
        calls = [
            worker.stream.options(num_returns="streaming").remote([prompts[p] for p in places], n, seed, places)
            for worker, places in zip(self.workers, bins, strict=False)
        ]
        for call, finished in streamed(calls, "sampling", self.timeout_s):
            yield {bins[call][place]: completions for place, completions in finished.items()}
        if self.transfer and self.shared:
            self._all("sleep")

    def load_weights(self, source: WeightSource, version: int) -> None:
        """Takes over the weights of a ``RayPolicy``; completions carry ``version`` from now on."""
        assert isinstance(source, RayPolicy), "samplers in processes of their own get weights from such policies"
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
        calls = [getattr(worker, verb).remote(*arguments) for worker in self.workers]
        get_all(calls, f"sampler {verb}", self.timeout_s)
