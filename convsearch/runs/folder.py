"""A run folder belongs to one configuration: the first start records it, every resume compares with it."""

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from convsearch import checksums, fingerprints
from convsearch.config import GrpoConfig, SftConfig
from convsearch.files import atomic_write, read_json, sole_writer
from convsearch.model import distributed
from convsearch.model.loading import fingerprint
from convsearch.runs import checkpoint

# Keys that may change when a run resumes: addresses, speed, and how much is kept and shown.
_FREE_BY_SECTION = {
    "retriever.": "url timeout_s max_wait_s",
    "trainer.": "logger save_freq keep_checkpoints num_threads n_gpus_per_node nnodes resume_mode default_local_dir "
    "max_restarts worker_timeout_s best_metric best_mode checkpoint_format async_checkpoints max_skipped_steps "
    "peak_tflops sample_table_freq",
    "actor_rollout_ref.rollout.": "n_gpus_per_node tensor_model_parallel_size gpu_memory_utilization",
}
MADE_OF = "made_of.json"
_FREE = {section + name for section, names in _FREE_BY_SECTION.items() for name in names.split()}


_ELSEWHERE = "set it back, or choose another trainer.default_local_dir"


@contextmanager
def owned(run_dir: Path) -> Iterator[None]:
    """The run folder belongs to this job for the block. Raises ValueError if another job is training in it."""
    with sole_writer(run_dir, inside=True) if distributed.rank() == 0 else nullcontext():
        yield


def made_of(model: str, prompts: Iterable[Sequence[int]], train: Sequence[str], val: Sequence[str]) -> dict[str, str]:
    """The fingerprints of the model to start from, the encoded prompts, and the files of the data."""
    files = {"training data": train, "validation data": val}
    return {
        "model": fingerprint(model),
        "prompts": fingerprints.of_texts(str(tuple(ids)) for ids in prompts),
        **{name: fingerprints.of_files(paths) for name, paths in files.items() if paths},
    }


def claim(run_dir: Path, cfg: SftConfig | GrpoConfig, made_of: fingerprints.Fingerprints) -> None:
    """Writes ``config.json`` into a new run folder; for a folder with checkpoints, compares it with the configuration.

    Args:
        made_of: the fingerprints of ``made_of``.

    Raises:
        ValueError: a key that changes the results has another value now (the message has both values), or model, data
            or prompts another content. Or there are checkpoints and ``trainer.resume_mode=disable`` demands a new
            start, which would mix two runs.
    """
    path, now = run_dir / "config.json", _flat(json.loads(cfg.model_dump_json()))
    saved = checkpoint.checkpoints(run_dir)
    if saved and cfg.trainer.resume_mode == "disable":
        fault = f"{run_dir} has checkpoints up to {saved[-1][1].name} and trainer.resume_mode=disable starts anew"
        raise ValueError(f"{fault}: delete the folder, or choose another trainer.default_local_dir")
    if saved and path.is_file():
        before = _flat(read_json(path, _ELSEWHERE))
        for key in sorted(now.keys() | before.keys()):
            if now.get(key) != before.get(key) and key not in _FREE and not key.startswith("guard."):
                fault = f"{run_dir} was made with {key}={before.get(key)}, now it is {now.get(key)}"
                raise ValueError(f"{fault}: {_ELSEWHERE}")
    elif distributed.rank() == 0:
        with atomic_write(path) as file:
            file.write(cfg.model_dump_json(indent=1))
        (run_dir / MADE_OF).unlink(missing_ok=True)
    check_made_of(run_dir, made_of)


def check_made_of(run_dir: Path, made_of: fingerprints.Fingerprints) -> None:
    """Compares the fingerprints of what the run is made of with those of its start; adds what is new.

    Raises:
        ValueError: something has another content now; names both.
    """
    path = run_dir / MADE_OF
    if distributed.rank() > 0:  # the first process may be writing the file
        return
    before = read_json(path, _ELSEWHERE) if path.is_file() else {}
    fingerprints.check(run_dir, before, made_of, _ELSEWHERE)
    if made_of.keys() - before.keys():
        with atomic_write(path) as file:
            json.dump({**before, **made_of}, file, indent=1)


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def trained(run_dir: Path, total_steps: int) -> bool:
    """Whether the run has taken its last step and exported its model; prints it."""
    model, last = run_dir / "model", run_dir / f"global_step_{total_steps}"
    written = last / "trainer.json", model / "model.safetensors", model / checksums.NAME
    done = all(path.is_file() for path in written)
    if done and distributed.rank() == 0:
        print(f"{run_dir}: all {total_steps} steps are done already; the model is in {model}")
    return done
