"""The one place that knows Ray, placement groups and device counts.

In one process it returns plain objects; otherwise actors behind the same protocols: ``RayPolicy`` for the policy and
the reference, ``RaySampler`` for the samplers. Each node has ``trainer.n_gpus_per_node`` policy processes, one per GPU.
The samplers (one per ``rollout.tensor_model_parallel_size`` GPUs) share those GPUs, or have ``rollout.n_gpus_per_node``
of their own. On a CPU, read "process" for "GPU".
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from convsearch.cluster.ray_policy import PolicyProcess, RayPolicy
from convsearch.cluster.ray_sampler import RaySampler, SamplerWorker, Transfer
from convsearch.cluster.workers import WorkerLost, get_all
from convsearch.config import GrpoConfig
from convsearch.model.loading import pick_device
from convsearch.policy.base import Policy, Reference
from convsearch.policy.build import grpo_policy
from convsearch.sampling.base import Sampler
from convsearch.sampling.build import hf_sampler

# Ray's object store in a CPU run: micro-batches, samples, and weights on their way to the samplers.
STORE_BYTES = 1 << 30
INSTALL = "Ray is not installed: pip install ray==2.60.0 (it comes with .[gpu] and .[cluster])"
# The environment variables that workers inherit.
PASSED_ON = ("GLOO_", "HF_", "NCCL_", "OMP_", "TOKENIZERS_", "VLLM_", "TORCH", "PYTHONPATH")


@dataclass(slots=True)
class TrainerParts:
    """What a trainer needs, wherever the work is done."""

    first_step: int
    policy: Policy
    ref: Reference | None
    sampler: Sampler | None  # None if the samples are replayed


def needs_workers(cfg: GrpoConfig) -> bool:
    """Whether the run needs other processes."""
    rollout = cfg.actor_rollout_ref.rollout
    own_sampler = rollout.name == "vllm" or rollout.n_gpus_per_node > 0
    return cfg.trainer.world_size > 1 or (own_sampler and not rollout.replay_from)


@contextmanager
def open_cluster(cfg: GrpoConfig, run_dir: Path, tokenizer: Any) -> Iterator[TrainerParts]:
    """The parts of a trainer, at the newest checkpoint of ``run_dir``; stops at the end what it started.

    Raises:
        ValueError: Ray or vLLM is missing, or the cluster has too few GPUs.
        WorkerLost: a worker died or did not answer, now or in one of the verbs.
    """
    device = pick_device(cfg.trainer.device)
    if not needs_workers(cfg):
        if cfg.trainer.num_threads:
            torch.set_num_threads(cfg.trainer.num_threads)
        step, policy, ref = grpo_policy(cfg, run_dir, device)
        replay = cfg.actor_rollout_ref.rollout.replay_from
        yield TrainerParts(step, policy, ref, None if replay else hf_sampler(cfg, policy.causal_lm, tokenizer))
        return
    with _ray(cfg) as ray:
        yield _Launch(ray, cfg, run_dir, on_gpu=device.type == "cuda").parts()


@contextmanager
def _ray(cfg: GrpoConfig) -> Iterator[Any]:
    """Ray: the cluster of $RAY_ADDRESS or of several nodes, else one on this machine that ends with this process."""
    try:
        import ray
    except ImportError as error:
        raise ValueError(INSTALL) from error
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ray.shutdown()  # the rest of a lost cluster
    try:
        if os.environ.get("RAY_ADDRESS") or cfg.trainer.nnodes > 1:
            ray.init(address=os.environ.get("RAY_ADDRESS", "auto"), log_to_driver=True)
        else:
            options = {"object_store_memory": STORE_BYTES} if cfg.trainer.device == "cpu" else {}
            processes, _ = _per_node(cfg)
            ray.init(address="local", num_cpus=processes, include_dashboard=False, log_to_driver=True, **options)
    except ConnectionError as error:
        remedy = "`ray start --head` on this node and `ray start --address=...` on the others"
        raise ValueError(f"trainer.nnodes={cfg.trainer.nnodes} needs a Ray cluster: {remedy} ({error})") from error
    try:
        yield ray
    finally:
        ray.shutdown()


def _per_node(cfg: GrpoConfig) -> tuple[int, int]:
    """Processes (of the policy and samplers) and GPUs of one node."""
    rollout, policies = cfg.actor_rollout_ref.rollout, cfg.trainer.n_gpus_per_node
    samplers = 0 if rollout.replay_from else (rollout.n_gpus_per_node or policies) // rollout.tensor_model_parallel_size
    return policies + samplers, policies + rollout.n_gpus_per_node


class _Launch:
    """Starts the actors of all nodes, one bundle of a placement group per node, and connects them."""

    def __init__(self, ray: Any, cfg: GrpoConfig, run_dir: Path, *, on_gpu: bool):
        self.ray, self.cfg, self.run_dir, self.on_gpu = ray, cfg, run_dir, on_gpu
        self.limit_s, self.json = cfg.trainer.worker_timeout_s, cfg.model_dump_json()
        self.processes, self.gpus = _per_node(cfg)
        self.shared, self.width = self._rollout.n_gpus_per_node == 0, self._rollout.tensor_model_parallel_size
        self.group = self._reserve()

    @property
    def _rollout(self) -> Any:
        return self.cfg.actor_rollout_ref.rollout

    def parts(self) -> TrainerParts:
        cfg, per_node = self.cfg, self.cfg.trainer.n_gpus_per_node
        world, run_dir = cfg.trainer.world_size, str(self.run_dir)
        policies = [
            self._start(PolicyProcess, rank // per_node, 1, self.json, run_dir, rank, world) for rank in range(world)
        ]
        transfer: Transfer = None
        if self.on_gpu and self._rollout.name == "vllm":
            transfer = "ipc" if self.shared else "nccl"
        samplers, gpus = self.processes - per_node, 0 if self.shared else self.width
        workers = [
            self._start(SamplerWorker, number // samplers, gpus, self.json, transfer)
            for number in range(cfg.trainer.nnodes * samplers)
        ]
        step, model_config, generation_config = self._build(policies, workers)
        if transfer is not None:
            self._connect(policies, workers, transfer)
        model = SimpleNamespace(config=model_config, generation_config=generation_config)
        policy, reference = (RayPolicy(policies, name, model, self.limit_s) for name in ("policy", "reference"))
        sampler = None
        if workers:
            options = {"transfer": transfer is not None, "shared": self.shared}
            sampler = RaySampler(workers, **options, timeout_s=self.limit_s)
        return TrainerParts(step, policy, reference if cfg.actor_rollout_ref.actor.use_kl_loss else None, sampler)

    def _reserve(self) -> Any:
        """The placement group of all nodes."""
        from ray.util.placement_group import placement_group

        nodes = self.cfg.trainer.nnodes
        bundle = {"CPU": self.processes} | ({"GPU": self.gpus} if self.on_gpu else {})
        group = placement_group([bundle] * nodes, "STRICT_SPREAD" if nodes > 1 else "PACK")
        if not group.wait(min(self.limit_s, 300)):
            wanted = f"trainer.nnodes={nodes} with {self.gpus} GPUs and {self.processes} processes each"
            raise ValueError(
                f"{wanted}: the Ray cluster has {self.ray.cluster_resources()}; "
                "start more nodes, or lower trainer.n_gpus_per_node or actor_rollout_ref.rollout.n_gpus_per_node"
            )
        return group

    def _start(self, kind: Any, node: int, num_gpus: int, *arguments: Any) -> Any:
        """An actor on a node, with the driver's working folder as its first argument."""
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        where = PlacementGroupSchedulingStrategy(self.group, placement_group_bundle_index=node)
        options: dict[str, Any] = {"num_cpus": 1, "num_gpus": num_gpus if self.on_gpu else 0, "max_restarts": 0}
        options |= {"scheduling_strategy": where, "runtime_env": {"env_vars": self._environment()}}
        return self.ray.remote(kind).options(**options).remote(os.getcwd(), *arguments)

    def _environment(self) -> dict[str, str]:
        """Environment variables of a worker: threads and vLLM's switches must be set before any import."""
        passed = {name: value for name, value in os.environ.items() if name.startswith(PASSED_ON)}
        # With offload, Adam's step runs on the CPU, beside a GPU.
        share = max(1, (os.cpu_count() or 1) // self.processes) if self.on_gpu else 1
        threads = {"OMP_NUM_THREADS": str(self.cfg.trainer.num_threads or share)}
        # On a CPU compiling costs more than it saves, and several processes share the cores.
        on_cpu = {} if self.on_gpu else {"TORCHDYNAMO_DISABLE": "1", "OMP_WAIT_POLICY": "PASSIVE"}
        return {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"} | on_cpu | passed | threads

    def _build(self, policies: list[Any], workers: list[Any]) -> tuple[int, Any, Any]:
        """Loads all models; returns what ``PolicyProcess.build`` of the first process returns."""
        master = get_all([policies[0].address.remote()], "the first policy process", self.limit_s)[0]
        building = [process.build.remote(master) for process in policies]
        devices: list[list[str]] = [[] for _ in workers]
        if self.on_gpu and self.shared:  # the sampler measures the free memory of its GPUs: the policy must be there
            get_all(building, "loading the policy", self.limit_s)
            owned = get_all([process.devices.remote() for process in policies], "the GPUs of the policy", self.limit_s)
            spans = [owned[start : start + self.width] for start in range(0, len(owned), self.width)]
            devices = [[gpu for gpus in span for gpu in gpus] for span in spans]
        building += [worker.build.remote(own) for worker, own in zip(workers, devices, strict=True)]
        built: tuple[int, Any, Any] = get_all(building, "loading the models", self.limit_s)[0]
        return built

    def _connect(self, policies: list[Any], workers: list[Any], transfer: Transfer) -> None:
        meeting = get_all([policies[0].address.remote()], "the first policy process", self.limit_s)[0]
        arguments = (transfer, self._rollout.dtype == "bf16", workers, self.width, meeting)
        calls = [process.connect.remote(*arguments) for process in policies]
        get_all(calls, "connecting policy and samplers", self.limit_s)


def with_restarts(max_restarts: int, run_once: Callable[[], None]) -> None:
    """``run_once``; after a lost worker once more from the newest checkpoint, at most ``max_restarts`` times.

    Raises:
        WorkerLost: the last attempt failed, too.
    """
    for attempt in range(max_restarts + 1):
        try:
            run_once()
            return
        except WorkerLost as lost:
            if attempt == max_restarts:
                used = f"restart {attempt} of {max_restarts}"
                raise WorkerLost(f"{lost} ({used}: run the same command again to go on)") from lost
            number = f"{attempt + 1} of {max_restarts}"
            print(f"cluster: {lost}: starting the workers again from the newest checkpoint ({number})")
