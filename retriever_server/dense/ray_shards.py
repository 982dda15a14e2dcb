"""Dense vectors spread over the machines of a Ray cluster: each actor holds some of the rows, and counts add up.

Every machine reads the index folder itself, under the same path (a shared file system, or copies).
"""

from pathlib import Path
from typing import Any

import numpy as np

from convsearch.cli import Unavailable
from retriever_server.dense.device import Device
from retriever_server.dense.flat import Flat, Scanner, Shards
from retriever_server.dense.manifest import Manifest, read_vectors
from retriever_server.storage import Array

ANSWER_S = 600.0  # longest wait for an actor


class Shard:
    """What an actor is: rows ``first`` to ``last`` of an index folder's vectors."""

    def __init__(self, folder: str, index_id: str, first: int, last: int, device: str) -> None:
        self._arguments = folder, index_id, first, last, device
        self._scanner: Scanner | None = None

    def call(self, method: str, *arguments: Any) -> Any:
        """A method of Scanner; the first call opens the folder (an actor's constructor cannot raise to its user)."""
        assert method in ("score", "count", "top"), method
        if self._scanner is None:
            self._scanner = self._open(*self._arguments)
        return getattr(self._scanner, method)(*arguments)

    @staticmethod
    def _open(folder: str, index_id: str, first: int, last: int, device: str) -> Scanner:
        """ValueError if this machine's folder is missing, damaged, or another index than ``index_id``."""
        manifest = Manifest.read(Path(folder))
        if manifest.index_id != index_id:
            what = f"{folder} holds the index {manifest.index_id} on a machine of the cluster, not {index_id}"
            raise ValueError(f"{what}: copy the folder there")
        vectors, codes = read_vectors(Path(folder), manifest)
        vectors, codes = vectors[first:last], codes.rows(first, last)
        # cuda:0 is the device that Ray assigned to this actor
        return Device(vectors, codes, "cuda:0") if device.startswith("cuda") else Flat(vectors, codes)


class RayScanner:
    """A Shard in another process, as a Scanner. Ray restarts an actor that dies, and asks it again, twice."""

    def __init__(self, actor: Any, name: str) -> None:
        self._actor, self._name = actor, name

    def score(self, query: Array, rows: Array) -> Array:
        return np.asarray(self._call("score", query, rows))

    def count(self, queries: Array, thresholds: Array, ties_before: Array, depth: int) -> Array:
        # a copy: Ray's arrays are read-only
        return np.array(self._call("count", queries, thresholds, ties_before, depth))

    def top(self, queries: Array, k: int) -> list[tuple[Array, Array]]:
        return list(self._call("top", queries, k))

    def _call(self, method: str, *arguments: Any) -> Any:
        import ray

        try:
            return ray.get(self._actor.call.remote(method, *arguments), timeout=ANSWER_S)
        except ray.exceptions.RayTaskError as error:
            raise error.cause from error
        except ray.exceptions.RayError as error:
            what = f"{self._name} of the dense index does not answer ({type(error).__name__})"
            raise Unavailable(f"{what}: look at `ray status`") from error


def spread(folder: Path, manifest: Manifest, shards: int, device: str, address: str | None = None) -> Shards:
    """The index's rows over ``shards`` actors; with ``device`` cuda each takes a GPU, otherwise a CPU core.

    ``address``: of a running cluster; None: that of RAY_ADDRESS, else a small one on this machine.

    Raises:
        ValueError: Ray is not installed, the folder differs on a machine, or the cluster has too few devices.
        Unavailable: no cluster answers.
    """
    try:
        import ray
    except ImportError as error:
        raise ValueError("dense indexes over several machines need Ray: pip install ray==2.60.0") from error
    if not ray.is_initialized():
        try:
            ray.init(address=address, include_dashboard=False, log_to_driver=False)
        except ConnectionError as error:
            raise Unavailable(f"no Ray cluster at {address}: start one with `ray start --head`") from error
    kind = "GPU" if device.startswith("cuda") else "CPU"
    if (there := ray.cluster_resources().get(kind, 0)) < shards:
        what = f"--ray_parts {shards} needs as many {kind}s, the Ray cluster has {there:g}"
        raise ValueError(f"{what}: ask for fewer parts or add machines")
    resources = {"num_gpus": 1} if kind == "GPU" else {"num_cpus": 1}
    actor = ray.remote(**resources, scheduling_strategy="SPREAD", max_restarts=2, max_task_retries=2)(Shard)
    step = -(-manifest.num_passages // shards)
    found: list[tuple[int, Scanner]] = []
    for first in range(0, manifest.num_passages, step):
        last = min(first + step, manifest.num_passages)
        handle = actor.remote(str(folder.resolve()), manifest.index_id, first, last, device)
        found.append((first, RayScanner(handle, f"the shard of rows {first} to {last}")))
    for _, scanner in found:  # a folder that differs is an error now, not at the first request
        scanner.score(np.zeros(manifest.dim, np.float32), np.zeros(1, np.int64))
    return Shards(found)
