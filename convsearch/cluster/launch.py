"""The one place that knows Ray, placement groups and device counts.

In one process it hands back plain objects; otherwise actors that look the same: ``RayPolicy`` for the policy and the reference, ``RaySampler`` for
the samplers. On each node of ``trainer.n_gpus_per_node`` GPUs stands one policy rank a GPU; the samplers (one every
``rollout.tensor_model_parallel_size`` GPUs) share those GPUs, or have ``rollout.n_gpus_per_node`` of their own. On a CPU "GPU" reads "process".
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from convsearch.cluster.workers import WorkerLost, answers
from convsearch.config import GrpoConfig
from convsearch.sampling.hf import HfSampler, Sampler, SamplingConfig

STORE_BYTES = (
    1 << 30
)  # Ray's object store of a CPU run: micro-batches, samples, and the weights on their way to the samplers
INSTALL = "Ray is not installed: pip install ray==2.60.0 (it comes with .[gpu] and .[cluster])"
PASSED_ON = (
    "GLOO_",
    "HF_",
    "NCCL_",
    "OMP_",
    "TOKENIZERS_",
    "VLLM_",
    "TORCH",
    "PYTHONPATH",
)  # of the environment, to the workers


@dataclass(slots=True)
class Parts:
    """What a trainer is made of; the verbs are those of ``Policy`` and ``Sampler``, wherever the work is done."""

    first_step: int
    policy: Any
    ref: Any
    sampler: Sampler | None  # None where the samples are replayed

    def on_ranks(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """``function(policy, *arguments)`` where the model is, in every rank; rank 0's answer."""
        return (
            self.policy.run(function, *arguments)
            if hasattr(self.policy, "ranks")
            else function(self.policy, *arguments)
        )


def needs_workers(cfg: GrpoConfig) -> bool:
    """Whether more than this process takes part."""
    rollout = cfg.actor_rollout_ref.rollout
    return cfg.trainer.world_size > 1 or (
        not rollout.replay_from and (rollout.name == "vllm" or rollout.n_gpus_per_node > 0)
    )


@contextmanager
def open_cluster(cfg: GrpoConfig, run_dir: Path, tokenizer: Any) -> Iterator[Parts]:
    """The parts of a trainer, at the newest checkpoint of ``run_dir``; what was started is stopped in the end.

    Raises:
        ValueError: Ray or vLLM is missing, or the cluster has fewer GPUs than are asked for.
        WorkerLost: a worker died or fell silent, now or under one of the verbs.
    """
    from convsearch.model.loading import pick_device
    from convsearch.trainers.grpo import build_policy

    if not needs_workers(cfg):
        import torch

        if cfg.trainer.num_threads:
            torch.set_num_threads(cfg.trainer.num_threads)
        step, policy, ref = build_policy(cfg, run_dir, pick_device(cfg.trainer.device))
        replay = cfg.actor_rollout_ref.rollout.replay_from
        yield Parts(step, policy, ref, None if replay else hf_sampler(cfg, policy.causal_lm, tokenizer))
        return
    with _ray(cfg) as ray:
        yield _place(ray, cfg, run_dir, on_gpu=pick_device(cfg.trainer.device).type == "cuda")


def hf_sampler(cfg: GrpoConfig, causal_lm: Any, tokenizer: Any) -> HfSampler:
    from convsearch.model.loading import stop_token_ids

    bf16 = cfg.actor_rollout_ref.rollout.dtype == "bf16"
    return HfSampler(causal_lm, tokenizer, _sampling(cfg), stop_token_ids(causal_lm, tokenizer), bf16=bf16)


def build_engine(cfg: GrpoConfig, transfer: str | None) -> Any:
    """The engine of a sampler that has a process to itself."""
    from transformers import GenerationConfig

    from convsearch.model.loading import load_model, load_tokenizer, pick_device, stop_token_ids
    from convsearch.sampling.vllm import VllmSampler

    model, rollout = cfg.actor_rollout_ref.model, cfg.actor_rollout_ref.rollout
    tokenizer, device = (
        load_tokenizer(model.path, trust_remote_code=model.trust_remote_code),
        pick_device(cfg.trainer.device),
    )
    if rollout.name == "hf":
        return hf_sampler(cfg, load_model(model.path, trust_remote_code=model.trust_remote_code).to(device), tokenizer)
    try:
        ends = SimpleNamespace(generation_config=GenerationConfig.from_pretrained(model.path))
    except OSError:  # a folder without one
        ends = SimpleNamespace()
    return VllmSampler(
        model.path,
        tokenizer,
        _sampling(cfg),
        stop_token_ids(ends, tokenizer),
        model_len=cfg.max_tokens,
        device="cuda" if device.type == "cuda" else "cpu",
        bf16=rollout.dtype == "bf16",
        stop=rollout.stop,
        tensor_parallel=rollout.tensor_model_parallel_size,
        memory_share=rollout.gpu_memory_utilization,
        transfer=transfer,  # type: ignore[arg-type]
        trust_remote_code=model.trust_remote_code,
    )


def _sampling(cfg: GrpoConfig) -> SamplingConfig:
    rollout = cfg.actor_rollout_ref.rollout
    return SamplingConfig(rollout.temperature, rollout.top_p, 0, cfg.data.max_response_length, rollout.max_num_seqs)


@contextmanager
def _ray(cfg: GrpoConfig) -> Iterator[Any]:
    """Ray: the cluster that $RAY_ADDRESS or several nodes imply, else one of this machine's own that ends with this process."""
    try:
        import ray
    except ImportError as error:
        raise ValueError(INSTALL) from error
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ray.shutdown()  # what is left of a cluster that was lost
    try:
        if os.environ.get("RAY_ADDRESS") or cfg.trainer.nnodes > 1:
            ray.init(address=os.environ.get("RAY_ADDRESS", "auto"), log_to_driver=True)
        else:
            options = {"object_store_memory": STORE_BYTES} if cfg.trainer.device == "cpu" else {}
            ray.init(address="local", num_cpus=_seats(cfg)[0], include_dashboard=False, log_to_driver=True, **options)
    except ConnectionError as error:
        raise ValueError(
            f"trainer.nnodes={cfg.trainer.nnodes} needs a Ray cluster: `ray start --head` on this node and `ray start --address=...` on the others ({error})"
        ) from error
    try:
        yield ray
    finally:
        ray.shutdown()


def _seats(cfg: GrpoConfig) -> tuple[int, int]:
    """Processes (ranks and samplers) and GPUs a node."""
    rollout, ranks = cfg.actor_rollout_ref.rollout, cfg.trainer.n_gpus_per_node
    samplers = 0 if rollout.replay_from else (rollout.n_gpus_per_node or ranks) // rollout.tensor_model_parallel_size
    return ranks + samplers, ranks + rollout.n_gpus_per_node


def _place(ray: Any, cfg: GrpoConfig, run_dir: Path, *, on_gpu: bool) -> Parts:
    """Starts the actors of all nodes, a bundle of the placement group a node, and connects them."""
    from ray.util.placement_group import placement_group
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    from convsearch.cluster.ray_policy import PolicyRank, RayPolicy
    from convsearch.cluster.ray_sampler import RaySampler, SamplerWorker

    rollout, nodes, ranks_a_node = cfg.actor_rollout_ref.rollout, cfg.trainer.nnodes, cfg.trainer.n_gpus_per_node
    limit_s, config = cfg.trainer.worker_timeout_s, cfg.model_dump_json()
    processes, gpus = _seats(cfg)
    group = placement_group(
        [{"CPU": processes} | ({"GPU": gpus} if on_gpu else {})] * nodes, "STRICT_SPREAD" if nodes > 1 else "PACK"
    )
    if not group.wait(min(limit_s, 300)):
        raise ValueError(
            f"trainer.nnodes={nodes} with {gpus} GPUs and {processes} processes each: the Ray cluster has {ray.cluster_resources()}; "
            "start more nodes, or lower trainer.n_gpus_per_node or actor_rollout_ref.rollout.n_gpus_per_node"
        )

    def start(kind: Any, node: int, num_gpus: int, *arguments: Any) -> Any:
        where = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=node)
        environment = {"env_vars": _environment(cfg, on_gpu=on_gpu)}
        options = {"num_cpus": 1, "num_gpus": num_gpus if on_gpu else 0, "max_restarts": 0}
        return (
            ray.remote(kind)
            .options(**options, scheduling_strategy=where, runtime_env=environment)
            .remote(os.getcwd(), *arguments)
        )

    world = cfg.trainer.world_size
    ranks = [start(PolicyRank, rank // ranks_a_node, 1, config, str(run_dir), rank, world) for rank in range(world)]
    shared, width = rollout.n_gpus_per_node == 0, rollout.tensor_model_parallel_size
    transfer = ("ipc" if shared else "nccl") if on_gpu and rollout.name == "vllm" else None
    samplers_a_node = processes - ranks_a_node
    workers = [
        start(SamplerWorker, s // samplers_a_node, 0 if shared else width, config, transfer)
        for s in range(nodes * samplers_a_node)
    ]

    master = answers([ranks[0].address.remote()], "the first rank", limit_s)[0]
    building = [rank.build.remote(master) for rank in ranks]
    devices: list[list[str]] = [[] for _ in workers]
    if on_gpu and shared:  # the sampler measures what is free on its GPUs: the policy has to be there first
        answers(building, "loading the policy", limit_s)
        owned = answers([rank.devices.remote() for rank in ranks], "the ranks' devices", limit_s)
        devices = [[gpu for mine in owned[s * width : (s + 1) * width] for gpu in mine] for s in range(len(workers))]
    building += [worker.build.remote(mine) for worker, mine in zip(workers, devices, strict=True)]
    built = answers(building, "loading the models", limit_s)
    if transfer is not None:
        meeting = answers([ranks[0].address.remote()], "the first rank", limit_s)[0]
        calls = [rank.connect.remote(transfer, rollout.dtype == "bf16", workers, width, meeting) for rank in ranks]
        answers(calls, "connecting policy and samplers", limit_s)

    step, model_config, generation_config = built[0]
    model = SimpleNamespace(config=model_config, generation_config=generation_config)
    policy, reference = (RayPolicy(ranks, name, model, limit_s) for name in ("policy", "reference"))
    sampler = RaySampler(workers, transfer=transfer is not None, shared=shared, timeout_s=limit_s) if workers else None
    return Parts(step, policy, reference if cfg.actor_rollout_ref.actor.use_kl_loss else None, sampler)


def _environment(cfg: GrpoConfig, *, on_gpu: bool) -> dict[str, str]:
    """What a worker process is started with: threads have to be counted, and vLLM told, before anything is imported."""
    passed = {name: value for name, value in os.environ.items() if name.startswith(PASSED_ON)}
    share = (
        max(1, (os.cpu_count() or 1) // _seats(cfg)[0]) if on_gpu else 1
    )  # Adam's step runs on CPUs where its state is kept there
    threads = {"OMP_NUM_THREADS": str(cfg.trainer.num_threads or share)}
    # compiling costs more than it brings there, and several processes share the cores
    on_cpu = {"TORCHDYNAMO_DISABLE": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    return {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"} | ({} if on_gpu else on_cpu) | passed | threads


def with_restarts(cfg: GrpoConfig, work: Callable[[], None]) -> None:
    """``work``, again from the newest checkpoint where a worker was lost, ``trainer.max_restarts`` times at most.

    Raises:
        WorkerLost: the last attempt failed too.
    """
    for attempt in range(cfg.trainer.max_restarts + 1):
        try:
            work()
            return
        except WorkerLost as lost:
            if attempt == cfg.trainer.max_restarts:
                raise WorkerLost(
                    f"{lost} (restart {attempt} of {cfg.trainer.max_restarts}: run the same command again to go on)"
                ) from lost
            print(
                f"cluster: {lost}: starting the workers again from the newest checkpoint ({attempt + 1} of {cfg.trainer.max_restarts})"
            )
