"""Checkpoints that are complete or absent: ``<run>/global_step_<N>/``, with weights and optimizer, without a pickle.

A folder is written under another name, the checksums of its files are recorded, and it is renamed last. A killed run
therefore leaves the previous checkpoint. All randomness of the trainers derives from (seed, step), so that
the step number is the only state besides tensors.

Two forms. ``safetensors``: a Hugging Face folder with ``optimizer.safetensors``, written by rank 0. ``dcp``: each rank
writes its shards (``sharded.py``), optionally in the background; ``convsearch.export`` makes a Hugging Face folder of
it. Any number of ranks can read either form. The files ``latest`` and ``best`` hold the name of a folder, for people
and scripts: the trainers do not read them.
"""

import errno
import json
import math
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from convsearch import checksums
from convsearch.config.base import TrainerSection
from convsearch.files import atomic_write, named_errors, read_json
from convsearch.model import distributed
from convsearch.runs import sharded
from convsearch.runs.sharded import Checkpointed

_NAME = re.compile(r"global_step_(\d+)")
_REMEDY = "delete the folder to go on from the one before it"
Form = Literal["auto", "safetensors", "dcp"]


@dataclass(frozen=True, slots=True)
class CheckpointScore:
    """The validation metric of a checkpoint: ``CheckpointScore("val_reward", "max", 1.2)``."""

    metric: str
    mode: Literal["max", "min"]
    value: float


def checkpoints(run_dir: Path) -> list[tuple[int, Path]]:
    """(step, folder) of every complete checkpoint, oldest first."""
    found = [(int(match[1]), path) for path in run_dir.glob("global_step_*") if (match := _NAME.fullmatch(path.name))]
    return sorted((step, path) for step, path in found if (path / "trainer.json").is_file())


def latest(run_dir: Path) -> tuple[int, Path] | None:
    """The newest complete checkpoint, checked.

    Raises:
        ValueError: one of its files has other bytes than were written.
    """
    found = checkpoints(run_dir)
    if not found:
        return None
    check(found[-1][1])
    return found[-1]


def check(path: Path) -> dict[str, Any]:
    """Reads ``trainer.json``; the first process compares all files with their checksums. Raises like ``latest``."""
    if not (path / checksums.NAME).is_file():
        raise ValueError(f"checkpoint {path} has no {checksums.NAME}: {_REMEDY}")
    if distributed.rank() == 0:
        checksums.check(path, _REMEDY)
    return read_json(path / "trainer.json", _REMEDY)


def is_sharded(path: Path) -> bool:
    """Whether the checkpoint has the form ``dcp``."""
    return (path / "shards").is_dir()


def best(run_dir: Path, metric: str | None, mode: str) -> tuple[Path, CheckpointScore] | None:
    """The (first) checkpoint on disk with the best value of ``metric``; None if no checkpoint has it."""
    scores = [(path, score) for path, score in _scores(run_dir) if score.metric == metric]
    sign = 1 if mode == "max" else -1
    return max(scores, key=lambda pair: sign * pair[1].value) if scores else None


def save(
    run_dir: Path,
    step: int,
    policy: Checkpointed,
    tokenizer: Any,
    *,
    keep: int = 2,
    form: Form = "safetensors",
    background: bool = False,
    score: CheckpointScore | None = None,
) -> Path:
    """Writes checkpoint ``step`` (all ranks call it) and removes all but the newest ``keep`` and the best one.

    Args:
        form: auto is dcp with several ranks.
        background: dcp returns once the tensors are copied to CPU memory; ``wait`` returns once the files are written.
        score: the validation metric of this checkpoint.
    """
    target, temporary = run_dir / f"global_step_{step}", run_dir / f".tmp-global_step_{step}"
    sharded.wait()
    state: dict[str, Any] = {"step": step} | ({"score": asdict(score)} if score else {})

    def finish() -> None:
        with atomic_write(temporary / "trainer.json") as file:
            json.dump(state, file, indent=1)
        checksums.seal(temporary)
        shutil.rmtree(target, ignore_errors=True)
        os.replace(temporary, target)
        _retain(run_dir, max(1, keep), target)

    if form == "dcp" or (form == "auto" and distributed.world_size() > 1):
        if distributed.rank() == 0:
            shutil.rmtree(temporary, ignore_errors=True)
            _describe(temporary, policy.causal_lm, tokenizer)
        distributed.barrier()
        state |= {"optimizer_steps": sharded.optimizer_steps(policy)}
        sharded.write(temporary / "shards", policy, finish, background=background)
        return target
    weights, optimizer = policy.weights(), policy.optimizer_state()
    if distributed.rank() == 0:
        shutil.rmtree(temporary, ignore_errors=True)
        _write_model(temporary, policy.causal_lm, tokenizer, weights)
        if optimizer:
            save_tensors(optimizer, temporary / "optimizer.safetensors")
        finish()
    distributed.barrier()
    return target


def save_by(
    policy: Checkpointed, run_dir: Path, tokenizer: Any, cfg: TrainerSection, done: int, value: float | None, last: bool
) -> None:
    """``save`` with the configured options. ``value``: the validation metric, if any; ``last``: no step follows."""
    score = CheckpointScore(cfg.best_metric, cfg.best_mode, value) if cfg.best_metric and value is not None else None
    background, form = cfg.async_checkpoints and not last, cfg.checkpoint_format
    keep = cfg.keep_checkpoints
    save(run_dir, done, policy, tokenizer, keep=keep, form=form, background=background, score=score)


def model_folder(found: tuple[int, Path] | None, base: str) -> str:
    """The folder to build the model from: the checkpoint, or ``base`` if ``restore`` will load sharded weights."""
    return base if found is None or is_sharded(found[1]) else str(found[1])


def restore(path: Path, policy: Checkpointed) -> None:
    """Loads what ``model_folder`` does not have: the moments of the optimizer, and the weights of a sharded checkpoint.

    Raises:
        ValueError: the checkpoint belongs to another model.
    """
    if is_sharded(path):
        sharded.read(path / "shards", policy, check(path).get("optimizer_steps"))
    elif (path / "optimizer.safetensors").is_file():
        policy.load_optimizer_state(load_file(path / "optimizer.safetensors"))


def export(folder: Path, causal_lm: Any, tokenizer: Any, weights: dict[str, Tensor]) -> None:
    """A folder that transformers and vLLM load; with its checksums it is complete."""
    _write_model(folder, causal_lm, tokenizer, weights)
    checksums.seal(folder)


def _write_model(folder: Path, causal_lm: Any, tokenizer: Any, weights: dict[str, Tensor]) -> None:
    _describe(folder, causal_lm, tokenizer)
    save_tensors(weights, folder / "model.safetensors")


def _describe(folder: Path, causal_lm: Any, tokenizer: Any) -> None:
    """The files of a Hugging Face folder beside the weights."""
    folder.mkdir(parents=True, exist_ok=True)
    with _writing(folder):
        causal_lm.config.save_pretrained(folder)
        if getattr(causal_lm, "generation_config", None) is not None:
            causal_lm.generation_config.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def _scores(run_dir: Path) -> list[tuple[Path, CheckpointScore]]:
    found = []
    for _, path in checkpoints(run_dir):
        with suppress(ValueError):  # ``check`` names a damaged one when it is loaded
            state = read_json(path / "trainer.json", _REMEDY)
            found += [(path, CheckpointScore(**state["score"]))] if "score" in state else []
    return [(path, score) for path, score in found if math.isfinite(score.value)]


def _retain(run_dir: Path, keep: int, newest: Path) -> None:
    pointers = {"latest": newest}
    if scores := _scores(run_dir):
        found = best(run_dir, scores[-1][1].metric, scores[-1][1].mode)
        assert found is not None
        pointers["best"] = found[0]
    for name, path in pointers.items():
        with atomic_write(run_dir / name) as file:
            file.write(f"{path.name}\n")
    for _, old in checkpoints(run_dir)[:-keep]:
        if old != pointers.get("best"):
            shutil.rmtree(old)


def save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """A safetensors file that is complete or absent."""
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        with _writing(path):
            whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
            save_file(whole, temporary, metadata={"format": "pt"})
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """A failed write raises OSError with ``path``: safetensors has its own error type, tokenizers raise Exception."""
    try:
        with named_errors(path):
            yield
    except Exception as error:
        if type(error) is not Exception and not isinstance(error, SafetensorError):
            raise
        raise OSError(errno.ENOSPC, f"could not write the checkpoint ({error})", str(path)) from error
