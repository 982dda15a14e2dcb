"""A run folder belongs to one configuration: the first start records it, every resume compares with it."""

import json
from pathlib import Path
from typing import Any

from convsearch.config import GrpoConfig, SftConfig
from convsearch.files import atomic_write
from convsearch.model import distributed
from convsearch.runs import checkpoint

# Keys that may change when a run resumes: addresses, speed, and how much is kept and shown.
_FREE_BY_SECTION = {
    "retriever.": "url timeout_s max_wait_s",
    "trainer.": "logger save_freq keep_checkpoints num_threads n_gpus_per_node nnodes resume_mode default_local_dir "
    "max_restarts worker_timeout_s best_metric best_mode checkpoint_format async_checkpoints max_skipped_steps "
    "peak_tflops sample_table_freq",
    "actor_rollout_ref.rollout.": "n_gpus_per_node tensor_model_parallel_size gpu_memory_utilization",
}
_FREE = {section + name for section, names in _FREE_BY_SECTION.items() for name in names.split()}


def claim(run_dir: Path, cfg: SftConfig | GrpoConfig) -> None:
    """Writes ``config.json`` into a new run folder; for a folder with checkpoints, compares it with the configuration.

    Raises:
        ValueError: a key that changes the results has another value now (the message has both values). Or there are
            checkpoints and ``trainer.resume_mode=disable`` demands a new start, which would mix two runs.
    """
    path, now = run_dir / "config.json", _flat(json.loads(cfg.model_dump_json()))
    saved = checkpoint.checkpoints(run_dir)
    if saved and cfg.trainer.resume_mode == "disable":
        fault = f"{run_dir} has checkpoints up to {saved[-1][1].name} and trainer.resume_mode=disable starts anew"
        raise ValueError(f"{fault}: delete the folder, or choose another trainer.default_local_dir")
    if saved and path.is_file():
        before = _flat(json.loads(path.read_text()))
        for key in sorted(now.keys() | before.keys()):
            if now.get(key) != before.get(key) and key not in _FREE and not key.startswith("guard."):
                fault = f"{run_dir} was made with {key}={before.get(key)}, now it is {now.get(key)}"
                raise ValueError(f"{fault}: set it back, or choose another trainer.default_local_dir")
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
    """Whether the run has taken its last step and exported its model; prints it."""
    model, last = run_dir / "model", run_dir / f"global_step_{total_steps}"
    done = (last / "trainer.json").is_file() and (model / "model.safetensors").is_file()
    if done and distributed.rank() == 0:
        print(f"{run_dir}: all {total_steps} steps are done already; the model is in {model}")
    return done
