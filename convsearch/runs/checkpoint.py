"""Checkpoints that are whole or absent: ``<run>/global_step_<N>/``, with weights and optimizer, without a pickle.

A folder is written under another name, its files' sizes are recorded in ``trainer.json``, and it is renamed last, so that a killed run leaves the
checkpoint before it. All randomness of the trainers derives from (seed, step), so that the step number is all the state besides tensors.

Two forms. ``safetensors``: a Hugging Face folder with ``optimizer.safetensors``, written by rank 0. ``dcp``: each rank its shards (``sharded.py``), in the
background on demand; ``convsearch.export`` makes a Hugging Face folder of it. Either is read by any number of ranks. The files ``latest`` and ``best``
hold a folder's name, for people and scripts: the trainers look at the folders themselves.
"""

import errno
import json
import math
import os
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from convsearch.config.base import TrainerSection
from convsearch.files import atomic_write, named_errors
from convsearch.model import distributed

_NAME = re.compile(r"global_step_(\d+)")
Form = Literal["auto", "safetensors", "dcp"]


@dataclass(frozen=True, slots=True)
class Score:
    """What a checkpoint is worth: ``Score("val_reward", "max", 1.2)``."""

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
        ValueError: one of its files has another size than it was written with.
    """
    found = checkpoints(run_dir)
    if not found:
        return None
    step, path = found[-1]
    check(path)
    return step, path


def check(path: Path) -> dict[str, Any]:
    """Reads ``trainer.json`` and compares every file's size with it."""
    try:
        state: dict[str, Any] = json.loads((path / "trainer.json").read_text())
        sizes: dict[str, int] = state["files"]
    except (ValueError, KeyError) as error:
        raise ValueError(
            f"checkpoint {path} is damaged: trainer.json does not parse; delete the folder to go on from the one before it"
        ) from error
    for name, size in sizes.items():
        actual = (path / name).stat().st_size if (path / name).is_file() else 0
        if actual != size:
            raise ValueError(
                f"checkpoint {path} is damaged: {name} has {actual} bytes where {size} were written; delete the folder to go on from the one before it"
            )
    return state


def is_sharded(path: Path) -> bool:
    """Whether the checkpoint is of the form ``dcp``."""
    return (path / "shards").is_dir()


def best_score(run_dir: Path, metric: str | None, mode: str) -> float | None:
    """The best value of ``metric`` among the checkpoints on disk, None where none has it."""
    values = [score.value for _, score in _scores(run_dir) if score.metric == metric]
    return (max(values) if mode == "max" else min(values)) if values else None


def save(
    run_dir: Path,
    step: int,
    policy: Any,
    tokenizer: Any,
    *,
    extra: dict[str, Any] | None = None,
    keep: int = 2,
    form: Form = "safetensors",
    background: bool = False,
    score: Score | None = None,
) -> Path:
    """Writes checkpoint ``step`` (all ranks call it) and removes all but the newest ``keep`` and the best one.

    Args:
        form: auto is dcp with several ranks.
        background: dcp returns once the tensors are copied to the CPU's memory; ``wait`` ends with what is being written.
        score: what the validation gave this checkpoint.
    """
    target, temporary = run_dir / f"global_step_{step}", run_dir / f".tmp-global_step_{step}"
    wait()
    state = {"step": step, **({"score": asdict(score)} if score else {}), **(extra or {})}

    def finish() -> None:
        files = {
            path.relative_to(temporary).as_posix(): path.stat().st_size
            for path in temporary.rglob("*")
            if path.is_file()
        }
        with atomic_write(temporary / "trainer.json") as file:
            json.dump({**state, "files": files}, file, indent=1)
        shutil.rmtree(target, ignore_errors=True)
        os.replace(temporary, target)
        _retain(run_dir, max(1, keep), target)

    if form == "dcp" or (form == "auto" and distributed.world_size() > 1):
        from convsearch.runs import sharded

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
        export(temporary, policy.causal_lm, tokenizer, weights)
        if optimizer:
            save_tensors(optimizer, temporary / "optimizer.safetensors")
        finish()
    distributed.barrier()
    return target


def save_by(
    policy: Any, run_dir: Path, tokenizer: Any, cfg: TrainerSection, done: int, value: float | None, last: bool
) -> None:
    """``save`` as the configuration has it: ``value`` is the validation's figure, where there is one; ``last`` says that nothing follows."""
    score = Score(cfg.best_metric, cfg.best_mode, value) if cfg.best_metric and value is not None else None
    background = cfg.async_checkpoints and not last
    save(
        run_dir,
        done,
        policy,
        tokenizer,
        keep=cfg.keep_checkpoints,
        form=cfg.checkpoint_format,
        background=background,
        score=score,
    )


def wait() -> None:
    """Ends when no checkpoint is being written in the background any more; raises what went wrong with it."""
    if "convsearch.runs.sharded" in sys.modules:  # else there is none, and importing DCP takes a second
        from convsearch.runs import sharded

        sharded.wait()


def model_folder(found: tuple[int, Path] | None, base: str) -> str:
    """Where the model to go on with is built from: the checkpoint itself, or ``base`` where its weights are sharded and ``restore`` brings them."""
    return base if found is None or is_sharded(found[1]) else str(found[1])


def restore(path: Path, policy: Any) -> None:
    """Loads what ``model_folder`` has not: the optimizer's moments, and the weights of a sharded checkpoint.

    Raises:
        ValueError: the checkpoint is one of another model.
    """
    if is_sharded(path):
        from convsearch.runs import sharded

        sharded.read(path, policy, check(path).get("optimizer_steps"))
        return
    from safetensors.torch import load_file

    if (path / "optimizer.safetensors").is_file():
        policy.load_optimizer_state(load_file(path / "optimizer.safetensors"))


def export(folder: Path, causal_lm: Any, tokenizer: Any, weights: dict[str, Any]) -> None:
    """A folder that ``AutoModelForCausalLM.from_pretrained`` and vLLM load; the weights come last, so that a folder with weights is whole."""
    _describe(folder, causal_lm, tokenizer)
    save_tensors(weights, folder / "model.safetensors")


def _describe(folder: Path, causal_lm: Any, tokenizer: Any) -> None:
    """The files of a Hugging Face folder that stand beside the weights."""
    folder.mkdir(parents=True, exist_ok=True)
    with _writing(folder):
        causal_lm.config.save_pretrained(folder)
        if getattr(causal_lm, "generation_config", None) is not None:
            causal_lm.generation_config.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def _scores(run_dir: Path) -> list[tuple[Path, Score]]:
    states = [(path, _state(path)) for _, path in checkpoints(run_dir)]
    return [(path, Score(**state["score"])) for path, state in states if "score" in state]


def _state(path: Path) -> dict[str, Any]:
    try:
        state: dict[str, Any] = json.loads((path / "trainer.json").read_text())
    except ValueError:  # a damaged one is named where it is loaded
        return {}
    return state


def _retain(run_dir: Path, keep: int, newest: Path) -> None:
    scores = [(path, score) for path, score in _scores(run_dir) if math.isfinite(score.value)]
    pointers = {"latest": newest}
    if scores:
        same = [(path, score) for path, score in scores if score.metric == scores[-1][1].metric]
        sign = 1 if scores[-1][1].mode == "max" else -1
        pointers["best"] = max(same, key=lambda pair: sign * pair[1].value)[0]
    for name, path in pointers.items():
        with atomic_write(run_dir / name) as file:
            file.write(f"{path.name}\n")
    for _, old in checkpoints(run_dir)[:-keep]:
        if old != pointers.get("best"):
            shutil.rmtree(old)


def save_tensors(tensors: dict[str, Any], path: Path) -> None:
    """A safetensors file that is whole or not there."""
    from safetensors.torch import save_file

    temporary = path.with_name(f"{path.name}.tmp")  # a name that is there means a file that is whole
    try:
        with _writing(path):
            save_file(
                {name: tensor.contiguous() for name, tensor in tensors.items()}, temporary, metadata={"format": "pt"}
            )
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """A write that fails is an OSError that names ``path``: safetensors has an error of its own for it, tokenizers the bare Exception."""
    try:
        with named_errors(path):
            yield
    except Exception as error:
        if type(error) is not Exception and type(error).__name__ != "SafetensorError":
            raise
        raise OSError(errno.ENOSPC, f"could not write the checkpoint ({error})", str(path)) from error
