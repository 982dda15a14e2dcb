"""Checkpoints that are whole or absent: ``<run>/global_step_<N>/`` is a Hugging Face folder plus the optimizer, without a pickle.

A folder is written under another name, its files' sizes are recorded in ``trainer.json``, and it is renamed last, so that a killed run leaves the
checkpoint before it. All randomness of the trainers derives from (seed, step), so that the step number is all the state besides tensors.
"""

import errno
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from convsearch import distributed
from convsearch.files import atomic_write, named_errors

_NAME = re.compile(r"global_step_(\d+)")


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


def save(run_dir: Path, step: int, policy: Any, tokenizer: Any, *, extra: dict[str, Any] | None = None, keep: int = 2) -> Path:
    """Writes checkpoint ``step`` (all ranks call it, rank 0 writes) and removes all but the newest ``keep``."""
    target = run_dir / f"global_step_{step}"
    temporary = run_dir / f".tmp-global_step_{step}"
    weights, optimizer = policy.weights(), policy.optimizer_state()
    if distributed.rank() == 0:
        shutil.rmtree(temporary, ignore_errors=True)
        export(temporary, policy.causal_lm, tokenizer, weights)
        if optimizer:
            _save_tensors(optimizer, temporary / "optimizer.safetensors")
        files = {path.name: path.stat().st_size for path in temporary.iterdir()}
        with atomic_write(temporary / "trainer.json") as file:
            json.dump({"step": step, "files": files, **(extra or {})}, file, indent=1)
        shutil.rmtree(target, ignore_errors=True)
        os.replace(temporary, target)
        for _, old in checkpoints(run_dir)[: -max(1, keep)]:
            shutil.rmtree(old)
    distributed.barrier()
    return target


def restore_optimizer(path: Path, policy: Any) -> None:
    """Loads the moments that stand beside the weights of a checkpoint (its weights load as any Hugging Face folder)."""
    from safetensors.torch import load_file

    if (path / "optimizer.safetensors").is_file():
        policy.load_optimizer_state(load_file(path / "optimizer.safetensors"))


def export(folder: Path, causal_lm: Any, tokenizer: Any, weights: dict[str, Any]) -> None:
    """A folder that ``AutoModelForCausalLM.from_pretrained`` and vLLM load; the weights come last, so that a folder with weights is whole."""
    folder.mkdir(parents=True, exist_ok=True)
    with _writing(folder):
        causal_lm.config.save_pretrained(folder)
        if getattr(causal_lm, "generation_config", None) is not None:
            causal_lm.generation_config.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    _save_tensors(weights, folder / "model.safetensors")


def _save_tensors(tensors: dict[str, Any], path: Path) -> None:
    from safetensors.torch import save_file

    temporary = path.with_name(f"{path.name}.tmp")  # a name that is there means a file that is whole
    try:
        with _writing(path):
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary, metadata={"format": "pt"})
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
