"""Dense vectors spread over the machines of a Ray cluster: an actor holds some of the rows, and counts add up.

Every machine reads the index folder itself, under the same path (a shared file system, or copies).
"""

from pathlib import Path
from typing import Any

import numpy as np

from convsearch.cli import Unavailable
from retriever_server.dense.build import Manifest
from retriever_server.dense.flat import Flat, Scanner
from retriever_server.storage import Array

ANSWER_S = 600.0  # an actor that takes longer is given up


class Part:
    """What an actor is: rows ``first`` to ``last`` of an index folder's vectors."""

    def __init__(self, folder: str, index_id: str, first: int, last: int, device: str) -> None:
        self._asked = folder, index_id, first, last, device
        self._scanner: Scanner | None = None

    def call(self, verb: str, *arguments: Any) -> Any:
        """``verb`` of the Scanner protocol; the first call opens the folder (an actor's constructor cannot raise to its user)."""
        assert verb in ("score", "count", "top"), verb
        if self._scanner is None:
            self._scanner = self._open(*self._asked)
        return getattr(self._scanner, verb)(*arguments)

    @staticmethod
    def _open(folder: str, index_id: str, first: int, last: int, device: str) -> Scanner:
        """ValueError where this machine's folder is absent, damaged, or another index than ``index_id``."""
        from retriever_server.dense.index import read_vectors

        manifest = Manifest.read(Path(folder))
        if manifest.index_id != index_id:
            raise ValueError(
                f"{folder} holds the index {manifest.index_id} on a machine of the cluster, not {index_id}: copy the folder there"
            )
        vectors, codes = read_vectors(Path(folder), manifest)
        if device.startswith("cuda"):
            from retriever_server.dense.device import Device

            return Device(
                vectors[first:last], codes.rows(first, last), "cuda:0"
            )  # the one that Ray shows to this actor
        return Flat(vectors[first:last], codes.rows(first, last))


class RayScanner:
    """A Part in another process, with the verbs of a Scanner. An actor that dies is started anew and asked again, twice."""

    def __init__(self, actor: Any, name: str) -> None:
        self._actor, self._name = actor, name

    def score(self, query: Array, rows: Array) -> Array:
        return np.asarray(self._ask("score", query, rows))

    def count(self, queries: Array, thresholds: Array, ties_before: Array, depth: int) -> Array:
        return np.array(
            self._ask("count", queries, thresholds, ties_before, depth)
        )  # Ray's arrays cannot be written to

    def top(self, queries: Array, k: int) -> list[tuple[Array, Array]]:
        return list(self._ask("top", queries, k))

    def _ask(self, verb: str, *arguments: Any) -> Any:
        import ray

        try:
            return ray.get(self._actor.call.remote(verb, *arguments), timeout=ANSWER_S)
        except ray.exceptions.RayTaskError as error:
            raise error.cause from error
        except ray.exceptions.RayError as error:
            raise Unavailable(
                f"{self._name} of the dense index does not answer ({type(error).__name__}): look at `ray status`"
            ) from error


def spread(
    folder: Path, manifest: Manifest, parts: int, device: str, address: str | None = None
) -> list[tuple[int, Scanner]]:
    """(first row, rows) of each of ``parts`` actors; with ``device`` cuda each takes a GPU, otherwise a CPU core.

    ``address``: of a running cluster (as for ``ray start``); a small one on this machine where it is None and none is named by RAY_ADDRESS.

    Raises:
        ValueError: Ray is not installed, the folder differs on a machine, or the cluster has not the devices.
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
    if (there := ray.cluster_resources().get(kind, 0)) < parts:
        raise ValueError(
            f"--ray_parts {parts} needs as many {kind}s, the Ray cluster has {there:g}: ask for fewer parts or add machines"
        )
    resources = {"num_gpus": 1} if kind == "GPU" else {"num_cpus": 1}
    actor = ray.remote(**resources, scheduling_strategy="SPREAD", max_restarts=2, max_task_retries=2)(Part)
    step = -(-manifest.num_passages // parts)
    found: list[tuple[int, Scanner]] = []
    for first in range(0, manifest.num_passages, step):
        last = min(first + step, manifest.num_passages)
        handle = actor.remote(str(folder.resolve()), manifest.index_id, first, last, device)
        found.append((first, RayScanner(handle, f"the part of rows {first} to {last}")))
    for _, scanner in found:  # a folder that differs is an error now, not at the first request
        scanner.score(np.zeros(manifest.dim, np.float32), np.zeros(1, np.int64))
    return found
