"""A checkpoint -> a Hugging Face folder. Only one output file is in memory at a time."""

import json
import os
import shutil
from math import prod
from pathlib import Path
from typing import Any

import torch

from convsearch import checksums
from convsearch.files import read_json, sole_writer
from convsearch.runs import checkpoint, sharded

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
BESIDE = (".json", ".jinja", ".txt", ".model", ".py")  # files of a model folder beside its weights
INDEX = "model.safetensors.index.json"
UNITS = {"MB": 10**6, "GB": 10**9}
Shapes = dict[str, tuple[tuple[int, ...], torch.dtype]]


def size_of(text: str) -> int:
    """``5GB`` -> bytes. Raises ValueError for anything else."""
    number, unit = text[:-2], text[-2:].upper()
    if unit not in UNITS or not number.replace(".", "", 1).isdigit() or float(number) <= 0:
        raise ValueError(f"--max_shard_size {text} is not a size like 5GB or 500MB")
    return int(float(number) * UNITS[unit])


def find(folder: Path) -> Path:
    """The checkpoint folder: of a run folder its newest checkpoint, which is checked.

    Raises:
        ValueError: there are no weights, or they are damaged, or another trainer wrote them with
        torch.distributed.checkpoint.
    """
    if (folder / "trainer.json").is_file():
        checkpoint.check(folder)
        return folder
    if found := checkpoint.latest(folder):
        return found[1]
    if any(folder.glob("model*.safetensors")):
        return folder
    if (folder / ".metadata").is_file():
        command = f"python -m torch.distributed.checkpoint.format_utils dcp_to_torch {folder} model.pt"
        raise ValueError(
            f"{folder} was written by another trainer with torch.distributed.checkpoint: convert it by `{command}`"
        )
    raise ValueError(f"{folder} holds no checkpoint: it has neither global_step_N/trainer.json nor model*.safetensors")


def weights_of(folder: Path) -> tuple[Path, Shapes]:
    """The folder of the weight files, and the (shape, type) of every weight, sorted by name; without Adam's moments.

    Raises:
        ValueError: there are no weights, or adapters that are not merged.
    """
    source = folder / "shards" if checkpoint.is_sharded(folder) else folder
    shapes = sharded.shapes(source)
    if any(".lora_A." in name for name in shapes):
        remedy = "use the model/ of the run, which is merged, or save with trainer.checkpoint_format=safetensors"
        raise ValueError(f"{folder} holds adapters that are not merged into the weights: {remedy}")
    shapes = {name: shapes[name] for name in sorted(shapes) if "/" not in name}
    if not shapes:
        raise ValueError(f"{folder} holds no weights")
    return source, shapes


def partition(shapes: Shapes, itemsize: int | None, limit: int) -> list[list[str]]:
    """The names of each file of at most ``limit`` bytes; a larger tensor gets its own file.

    Args:
        itemsize: bytes per number; None: as saved.
    """
    parts: list[list[str]] = [[]]
    used = 0
    for name, (shape, dtype) in shapes.items():
        size = prod(shape) * (itemsize or dtype.itemsize)
        if parts[-1] and used + size > limit:
            parts.append([])
            used = 0
        parts[-1].append(name)
        used += size
    return parts


def write_weights(folder: Path, target: Path, dtype: torch.dtype | None, limit: int) -> tuple[list[str], torch.dtype]:
    """Writes the weights of ``folder`` into ``target``, with an index of several files; returns file names and type."""
    source, shapes = weights_of(folder)
    parts = partition(shapes, dtype.itemsize if dtype else None, limit)
    weight_map: dict[str, str] = {}
    total = 0
    for number, names in enumerate(parts, start=1):
        file = "model.safetensors" if len(parts) == 1 else f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        tensors = {name: torch.empty(shapes[name][0], dtype=shapes[name][1]) for name in names}
        sharded.load(source, tensors)
        if dtype:
            tensors = {name: value.to(dtype) if value.is_floating_point() else value for name, value in tensors.items()}
        checkpoint.save_tensors(tensors, target / file)
        weight_map |= dict.fromkeys(names, file)
        total += sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    if len(parts) > 1:
        _write_json(target / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    return list(dict.fromkeys(weight_map.values())), dtype or next(iter(shapes.values()))[1]


def export(
    source: Path, output: Path, dtype: str | None = None, limit: int = 5 * 10**9, base: Path | None = None
) -> list[Path]:
    """Writes the folder, which appears when it is complete; returns its weight files.

    Args:
        dtype: a key of ``DTYPES``; None: as saved.
        limit: bytes per weight file.
        base: the folder of config.json and the tokenizer; None: the checkpoint.

    Raises:
        ValueError: there is nothing to export, or ``output`` is not empty.
    """
    with sole_writer(output):
        return _export(source, output, dtype, limit, base)


def _export(source: Path, output: Path, dtype: str | None, limit: int, base: Path | None) -> list[Path]:
    if output.exists() and any(output.iterdir()):
        raise ValueError(f"--output {output} is not empty: name another folder, or remove it")
    folder = find(source)
    beside = base or folder
    if not (beside / "config.json").is_file():
        raise ValueError(f"{beside} has no config.json: give the folder of the model that was trained as --base")
    temporary = output.with_name(f"{output.name}.tmp-{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        for path in beside.iterdir():
            if path.is_file() and path.suffix in BESIDE and path.name not in ("trainer.json", checksums.NAME, INDEX):
                shutil.copy(path, temporary / path.name)
        files, stored = write_weights(folder, temporary, DTYPES[dtype] if dtype else None, limit)
        config: dict[str, Any] = read_json(temporary / "config.json", "export it again")
        config.pop("torch_dtype", None)
        _write_json(temporary / "config.json", config | {"dtype": str(stored).removeprefix("torch.")})
        checksums.seal(temporary)
        if output.exists():
            output.rmdir()
        os.replace(temporary, output)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return [output / name for name in files]


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
