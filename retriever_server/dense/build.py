"""Building a dense index folder: the collection's texts, their vectors block by block, and the coarse codes.

A build is in ``<output>.building`` until it is finished, so that a killed one can resume. It writes the texts once.
Then it writes each block of vectors to its place in a preallocated file, and notes it in ``done/``. Under torchrun
every process takes every n-th block.
"""

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from convsearch.files import atomic_write, read_json, sole_writer
from retriever_server import storage
from retriever_server.dense import folder as folders
from retriever_server.dense.manifest import FORMAT, FORMAT_VERSION, Manifest
from retriever_server.encoder import Encoder


@dataclass(frozen=True, slots=True)
class Settings:
    """How to build; only ``dtype`` and ``max_length`` change what the index answers."""

    dtype: str = "float32"
    block: int = 50_000  # passages per block, which is what a killed build may lose
    max_length: int = 384
    batch_size: int = 64
    device: str = "auto"
    overwrite: bool = False
    progress: bool = True

    def __post_init__(self) -> None:
        folders.check_dtype(self.dtype)
        for name in ("block", "max_length", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


def build(
    collections: str | Path | Sequence[str | Path],
    output: str | Path,
    encoder_name: str,
    settings: Settings | None = None,
) -> bool:
    """Writes the index folder ``output``; returns False if it already holds the same collection, encoder and settings.

    Run it again after a kill: finished blocks stay. Under torchrun call it in every process.

    Raises:
        ValueError: a line is malformed, a docid is given twice, the output is taken, another build of it is running.
    """
    settings, output = settings or Settings(), Path(output)
    paths = storage.collection_paths(collections)
    process, world_size = _join()
    device = settings.device
    if world_size > 1 and device in ("auto", "cuda") and torch.cuda.is_available():
        device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    encoder = Encoder.load(encoder_name, device)
    building = output.with_name(f"{output.name}.building")
    if process:
        _wait_for_all(world_size)
        if output.exists() and not building.exists():
            return False
        _encode(building, encoder, settings, process, world_size)
        _wait_for_all(world_size)
        return True
    with sole_writer(output):
        building.mkdir(exist_ok=True)
        about = encoder.kind, encoder.dim, settings.dtype, 0, True, storage.hash_files(paths, settings.progress)
        manifest = Manifest(FORMAT, FORMAT_VERSION, *about, encoder.name, encoder.sha256, settings.max_length)
        if folders.already_built(output, manifest, settings.overwrite):
            shutil.rmtree(building)
            _wait_for_all(world_size)
            return False
        count = _start(building, paths, manifest, settings)
        _wait_for_all(world_size)
        _encode(building, encoder, settings, 0, world_size)
        _wait_for_all(world_size)
        folders.finish(building, output, replace(manifest, num_passages=count), settings.progress)
    return True


def _join() -> tuple[int, int]:
    """(number of this process, world size); joins torchrun's group, which is only used to wait for each other."""
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size > 1 and not dist.is_initialized():
        # process 0 may take long to hash and copy a large collection
        dist.init_process_group("gloo", timeout=timedelta(days=2))
    return int(os.environ.get("RANK", "0")), world_size


def _wait_for_all(world_size: int) -> None:
    if world_size > 1:
        dist.barrier()


def _start(building: Path, paths: Sequence[Path], manifest: Manifest, settings: Settings) -> int:
    """Writes the texts and makes room for the vectors, unless a killed build did; returns the number of passages."""
    plan_path, wanted = building / "plan.json", {**asdict(manifest), "block": settings.block, "encoder": ""}
    if plan_path.is_file():
        plan = read_json(plan_path, f"remove {building}")
        count = int(plan.pop("count"))
        if plan == wanted:
            return count
        if not settings.overwrite:
            what = f"{building} holds an unfinished build of another collection, encoder or settings"
            raise ValueError(f"{what}: remove it, or add --overwrite")
    for path in building.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    count = folders.write_texts(building, paths, settings.progress)
    path, kind = building / "vectors.npy", np.dtype(manifest.dtype)
    np.lib.format.open_memmap(path, "w+", kind, (count * manifest.dim,)).flush()  # type: ignore[no-untyped-call]
    (building / "done").mkdir()
    with atomic_write(plan_path) as file:
        json.dump(wanted | {"count": count}, file)
    return count


def _encode(building: Path, encoder: Encoder, settings: Settings, process: int, world_size: int) -> None:
    """Encodes the blocks of this process that are not done."""
    count, size = read_json(building / "plan.json", f"remove {building}")["count"], settings.batch_size
    texts = storage.load_strings(building, "contents", count)
    room = np.load(building / "vectors.npy", mmap_mode="r+")
    vectors = room.reshape(count, encoder.dim)
    mine = range(0, count, settings.block)[process::world_size]
    left = [start for start in mine if not _mark(building, start).exists()]
    progress, done = settings.progress and process == 0, len(mine) - len(left)
    with tqdm(total=len(mine), initial=done, desc="encode", unit=" blocks", disable=not progress) as bar:
        for start in left:
            end = min(start + settings.block, count)
            block = encoder.encode([texts[i] for i in range(start, end)], settings.max_length, size, progress)
            vectors[start:end] = folders.check_vectors(block.astype(settings.dtype), start)
            room.flush()  # before the mark: a marked block is on the disk
            with atomic_write(_mark(building, start)) as file:
                file.write(f"{end}\n")
            bar.update()


def _mark(building: Path, start: int) -> Path:
    return building / "done" / f"{start:010d}"
