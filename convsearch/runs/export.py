"""A checkpoint -> a Hugging Face folder: ``python -m convsearch.export outputs/run/grpo --output MODEL [--dtype bf16]``.

The checkpoint is a run folder (its newest one), a ``global_step_N`` of either form (whole tensors, or the shards of several ranks), any Hugging Face folder
of safetensors, or a folder of torch.distributed.checkpoint by another trainer (``--base``: whose configuration and tokenizer go with it). Tensors are read
one output file at a time: a model larger than the memory can be exported.
"""

import argparse
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
MOMENTS = ("exp_avg/", "exp_avg_sq/")
BESIDE = (".json", ".jinja", ".txt", ".model", ".py")  # what a model's folder has beside its weights
UNITS = {"MB": 10**6, "GB": 10**9}


def size_of(text: str) -> int:
    """``5GB`` -> bytes. Raises ValueError for anything else."""
    number, unit = text[:-2], text[-2:].upper()
    if unit not in UNITS or not number.replace(".", "", 1).isdigit() or float(number) <= 0:
        raise ValueError(f"--max_shard_size {text} is no size such as 5GB or 500MB")
    return int(float(number) * UNITS[unit])


def find(checkpoint: Path) -> Path:
    """The folder that holds the weights; a run folder stands for its newest checkpoint, which is checked.

    Raises:
        ValueError: there are no weights, or they are damaged.
    """
    from convsearch.runs import checkpoint as checkpoints

    if (checkpoint / "trainer.json").is_file():
        checkpoints.check(checkpoint)
        return checkpoint
    if found := checkpoints.latest(checkpoint):
        return found[1]
    if (checkpoint / "config.json").is_file() and any(checkpoint.glob("*.safetensors")):
        return checkpoint
    if (checkpoint / ".metadata").is_file():
        return checkpoint
    raise ValueError(
        f"{checkpoint} holds no checkpoint: no global_step_N/trainer.json, and no config.json with *.safetensors, no .metadata of DCP"
    )


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of the source: its shape, its type, the file it stands in (None: in shards), and its name there where that is another."""

    shape: tuple[int, ...]
    dtype: "torch.dtype"
    file: Path | None
    alias: str | None = None

    @property
    def elements(self) -> int:
        return prod(self.shape)


def entries(folder: Path) -> dict[str, Entry]:
    """Every weight by name, in the order of the names; the optimizer's moments are left out. Raises ValueError where adapters are not merged."""
    from convsearch.runs.checkpoint import is_sharded

    if (folder / ".metadata").is_file():
        from convsearch.runs.dcp_reader import weights_of

        found = {name: Entry(shape, dtype, None, alias) for name, (alias, shape, dtype) in weights_of(folder).items()}
    elif is_sharded(folder):
        from convsearch.runs.sharded import shapes

        found = {name: Entry(shape, dtype, None) for name, (shape, dtype) in shapes(folder / "shards").items()}
    else:
        from safetensors import safe_open
        from safetensors.torch import _getdtype

        found = {}
        for path in sorted(folder.glob("model*.safetensors")):
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118  # no mapping
                    piece = file.get_slice(name)
                    found[name] = Entry(tuple(piece.get_shape()), _getdtype(piece.get_dtype()), path)
    if any(".lora_A." in name for name in found):
        raise ValueError(
            f"{folder} holds adapters beside their base, which are not merged here: take the run's own model/, which is, or save with "
            "trainer.checkpoint_format=safetensors"
        )
    return {name: found[name] for name in sorted(found) if not name.startswith(MOMENTS)}


def read(folder: Path, names: Sequence[str], known: dict[str, Entry]) -> "dict[str, torch.Tensor]":
    """The named tensors, as they were saved."""
    if known[names[0]].file is None:
        import torch

        from convsearch.runs.sharded import load

        state = {name: torch.empty(known[name].shape, dtype=known[name].dtype) for name in names}
        if known[names[0]].alias is None:
            load(folder / "shards", state)
        else:
            from convsearch.runs.dcp_reader import TorchDcpReader

            load(folder, {known[name].alias or name: state[name] for name in names}, reader=TorchDcpReader(folder))
        return state
    from safetensors import safe_open

    tensors: dict[str, torch.Tensor] = {}
    for path in sorted({known[name].file for name in names}, key=str):
        assert path is not None
        with safe_open(path, framework="pt") as file:
            tensors |= {name: file.get_tensor(name) for name in names if known[name].file == path}
    return tensors


def partition(known: dict[str, Entry], itemsize: int | None, limit: int) -> list[list[str]]:
    """Names in files of at most ``limit`` bytes (a larger tensor has its own); ``itemsize``: bytes a number, None: as saved."""
    parts: list[list[str]] = [[]]
    used = 0
    for name, entry in known.items():
        size = entry.elements * (itemsize or entry.dtype.itemsize)
        if parts[-1] and used + size > limit:
            parts.append([])
            used = 0
        parts[-1].append(name)
        used += size
    return parts


def write_weights(
    folder: Path, target: Path, known: dict[str, Entry], wanted: "torch.dtype | None", limit: int
) -> list[str]:
    """The tensors of ``folder`` into ``target``, in the type ``wanted``; returns the names of the files, and writes their index where there are several."""
    from convsearch.runs.checkpoint import save_tensors

    parts = partition(known, wanted.itemsize if wanted else None, limit)
    files: list[str] = []
    weight_map: dict[str, str] = {}
    total = 0
    for number, names in enumerate(parts, start=1):
        file = "model.safetensors" if len(parts) == 1 else f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        tensors = read(folder, names, known)
        if wanted:
            tensors = {
                name: tensor.to(wanted) if tensor.is_floating_point() else tensor for name, tensor in tensors.items()
            }
        save_tensors(tensors, target / file)
        files.append(file)
        weight_map |= dict.fromkeys(names, file)
        total += sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    if len(parts) > 1:
        _write_json(
            target / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map}
        )
    return files


def export(
    source: Path, output: Path, dtype: str | None = None, limit: int = 5 * 10**9, base: Path | None = None
) -> list[Path]:
    """Writes the folder and returns its weight files; it appears when it is whole. ``base``: where configuration and tokenizer come from.

    Raises:
        ValueError: there is nothing to export, or ``output`` holds something already.
    """
    import torch

    if output.exists() and any(output.iterdir()):
        raise ValueError(f"--output {output} is not empty: name another folder, or remove it")
    folder = find(source)
    wanted = getattr(torch, DTYPES[dtype]) if dtype else None
    known = entries(folder)
    if not known:
        raise ValueError(f"{folder} holds no weights")
    beside = base or folder
    if not (beside / "config.json").is_file():
        raise ValueError(f"{beside} has no config.json: name the model that was trained by --base")
    temporary = output.with_name(f"{output.name}.tmp-{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        for path in beside.iterdir():
            if (
                path.is_file()
                and path.suffix in BESIDE
                and path.name not in ("trainer.json", "model.safetensors.index.json")
            ):
                shutil.copy(path, temporary / path.name)
        files = write_weights(folder, temporary, known, wanted, limit)
        stored = wanted or next(iter(known.values())).dtype
        config: dict[str, Any] = json.loads((temporary / "config.json").read_text(encoding="utf-8"))
        _write_json(
            temporary / "config.json",
            {key: value for key, value in config.items() if key != "torch_dtype"} | {"dtype": str(stored)[6:]},
        )
        if output.exists():
            output.rmdir()
        os.replace(temporary, output)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return [output / name for name in files]


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m convsearch.export", description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path, help="run folder, global_step_N, or Hugging Face folder")
    parser.add_argument("--output", type=Path, required=True, help="folder to write, which must not exist or be empty")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default=None, help="type of the weights; as saved by default")
    parser.add_argument(
        "--base", type=Path, default=None, help="folder of config.json and the tokenizer; the checkpoint by default"
    )
    parser.add_argument("--max_shard_size", default="5GB", help="size of a weight file at most")
    args = parser.parse_args()
    files = export(args.checkpoint, args.output, args.dtype, size_of(args.max_shard_size), args.base)
    print(
        f"{args.output}: {len(files)} weight file{'s' if len(files) > 1 else ''}, {sum(file.stat().st_size for file in files) / 10**9:.2f} GB"
    )
