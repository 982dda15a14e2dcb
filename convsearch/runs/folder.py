"""A run folder belongs to one configuration: the first start writes it down, every resume compares."""

import json
from pathlib import Path
from typing import Any

from convsearch.config import GrpoConfig, SftConfig
from convsearch.files import atomic_write
from convsearch.model import distributed
from convsearch.runs import checkpoint

# What may differ when a run goes on: where it talks to, how fast it works, how much of it is kept and shown.
_FREE = (
    "retriever.url",
    "retriever.timeout_s",
    "retriever.max_wait_s",
    "trainer.logger",
    "trainer.save_freq",
    "trainer.keep_checkpoints",
    "trainer.num_threads",
    "trainer.n_gpus_per_node",
    "trainer.nnodes",
    "trainer.resume_mode",
    "trainer.default_local_dir",
    "trainer.max_restarts",
    "trainer.worker_timeout_s",
    "actor_rollout_ref.rollout.n_gpus_per_node",
    "actor_rollout_ref.rollout.tensor_model_parallel_size",
    "actor_rollout_ref.rollout.gpu_memory_utilization",
    "trainer.best_metric",
    "trainer.best_mode",
    "trainer.checkpoint_format",
    "trainer.async_checkpoints",
    "trainer.max_skipped_steps",
    "trainer.peak_tflops",
    "trainer.sample_table_freq",
)
_FREE_SECTIONS = ("guard.",)


def claim(run_dir: Path, cfg: SftConfig | GrpoConfig) -> None:
    """Writes ``config.json`` into a new run folder; in one with checkpoints, checks that the configuration is the one it was made with.

    Raises:
        ValueError: a key that the results depend on has another value now; names it and both values. Or there are checkpoints and
            ``trainer.resume_mode=disable`` asks for a new start: it would mix two runs.
    """
    path, now = run_dir / "config.json", _flat(json.loads(cfg.model_dump_json()))
    saved = checkpoint.checkpoints(run_dir)
    if saved and cfg.trainer.resume_mode == "disable":
        raise ValueError(
            f"{run_dir} has checkpoints up to {saved[-1][1].name} and trainer.resume_mode=disable asks for a new start: delete the folder, "
            "or choose another trainer.default_local_dir"
        )
    if saved and path.is_file():
        before = _flat(json.loads(path.read_text()))
        for key in sorted(now.keys() | before.keys()):
            if now.get(key) != before.get(key) and key not in _FREE and not key.startswith(_FREE_SECTIONS):
                raise ValueError(
                    f"{run_dir} was made with {key}={before.get(key)}, now it is {now.get(key)}: set it back, or choose another trainer.default_local_dir"
                )
        return
    if distributed.rank() == 0:
        with atomic_write(path) as file:
            file.write(cfg.model_dump_json(indent=1))


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def trained(run_dir: Path, total_steps: int) -> bool:
    """Whether the run has taken its last step and exported its model; says so."""
    model = run_dir / "model"
    done = (run_dir / f"global_step_{total_steps}" / "trainer.json").is_file() and (
        model / "model.safetensors"
    ).is_file()
    if done and distributed.rank() == 0:
        print(f"{run_dir}: all {total_steps} steps are done already; the model is in {model}")
    return done
