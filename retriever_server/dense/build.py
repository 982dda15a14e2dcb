"""Building a dense index folder: the collection's texts, their vectors block by block, and the coarse codes.

A build lives in ``<output>.building`` until it is whole, so that a killed one goes on where it was: the texts are written once, then each block of
vectors goes into its place of a preallocated file and is noted in ``done/`` when it is on the disk. Under torchrun every rank takes every n-th block.
"""

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np

from convsearch.files import atomic_write, read_jsonl
from retriever_server.dense import codes as dense_codes
from retriever_server.storage import (
    Array,
    StringTable,
    StringTableWriter,
    load_array,
    load_strings,
    read_manifest,
    string_hash,
    write_dictionary,
    write_manifest,
)

FORMAT, FORMAT_VERSION = "convsearch-dense", 1
DTYPES = ("float32", "float16")


@dataclass(frozen=True, slots=True)
class Manifest:
    """manifest.json of a dense index folder; the counts fix every array's length."""

    format: str
    version: int
    retriever: str  # "ance" or "dense"
    dim: int
    dtype: str  # of vectors.npy
    num_passages: int
    texts: bool  # whether the passages' texts are there
    collection_sha256: str
    encoder: str  # as it was given; empty where vectors were imported
    encoder_sha256: str
    max_length: int  # tokens of a passage; 0 where vectors were imported

    @property
    def index_id(self) -> str:
        key = f"{self.version} {self.dim} {self.dtype} {self.encoder_sha256} {self.max_length} {self.collection_sha256}"
        return f"{self.retriever}-{hashlib.sha256(key.encode()).hexdigest()[:12]}"

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """Reads and checks a folder's manifest.

        Raises:
            ValueError: absent, damaged, or written by another kind or version of program.
        """
        found, path = read_manifest(folder), folder / "manifest.json"
        if found.get("format") != FORMAT or found.get("version") != FORMAT_VERSION:
            raise ValueError(
                f"{path} has format {found.get('format')!r} version {found.get('version')!r}, this program reads {FORMAT!r} {FORMAT_VERSION}"
            )
        for key, kind in cls.__annotations__.items():
            if type(found.get(key)) is not kind:
                raise ValueError(
                    f"{path}: field {key!r} must be {kind.__name__}, got {found.get(key)!r}: build the index again with --overwrite"
                )
        return cls(**{key: found[key] for key in cls.__annotations__})


@dataclass(frozen=True, slots=True)
class Settings:
    """How to build; none of these but ``dtype`` and ``max_length`` changes what the index answers."""

    dtype: str = "float32"
    block: int = 50_000  # passages a block, which is what a killed build may lose
    max_length: int = 384
    batch_size: int = 64
    device: str = "auto"
    overwrite: bool = False
    progress: bool = True

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}")
        for name in ("block", "max_length", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


def build(
    collections: Sequence[str | Path], output: str | Path, encoder_name: str, settings: Settings | None = None
) -> bool:
    """Writes the index folder ``output``; returns False where it already holds the same collection, encoder and settings.

    Run it again after a kill: blocks that were done stay. Under torchrun call it in every rank.

    Raises:
        ValueError: a line is malformed, a docid is given twice, the output is taken, another build of it is under way.
    """
    from retriever_server.encoder import Encoder

    settings = settings or Settings()
    paths, folder = [Path(path) for path in collections], Path(output)
    for path in paths:
        if not path.is_file():
            raise ValueError(f'there is no collection file {path}: give JSON lines of {{"id", "contents"}}')
    rank, ranks = _join()
    device = (
        f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
        if ranks > 1 and settings.device in ("auto", "cuda") and _cuda()
        else settings.device
    )
    encoder = Encoder.load(encoder_name, device)
    building = folder.with_name(f"{folder.name}.building")
    if rank:
        _meet(ranks)
        if folder.exists() and not building.exists():
            return False
        _encode(building, encoder, settings, rank, ranks)
        _meet(ranks)
        return True
    with locked(building):
        sha256 = hash_files(paths)
        manifest = Manifest(
            FORMAT,
            FORMAT_VERSION,
            encoder.kind,
            encoder.dim,
            settings.dtype,
            0,
            True,
            sha256,
            encoder.name,
            encoder.sha256,
            settings.max_length,
        )
        if already_built(folder, manifest, settings.overwrite):
            shutil.rmtree(building)
            _meet(ranks)
            return False
        count = _start(building, paths, manifest, settings)
        _meet(ranks)
        _encode(building, encoder, settings, 0, ranks)
        _meet(ranks)
        finish(building, folder, Manifest(**(asdict(manifest) | {"num_passages": count})), settings.progress)
    return True


def _cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def _join() -> tuple[int, int]:
    """(rank, ranks); joins the group that torchrun announces, whose only use is to wait for each other."""
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if ranks > 1:
        import torch.distributed as dist

        if not dist.is_initialized():
            dist.init_process_group(
                "gloo", timeout=timedelta(days=2)
            )  # rank 0 may hash and copy a large collection for long
    return int(os.environ.get("RANK", "0")), ranks


def _meet(ranks: int) -> None:
    if ranks > 1:
        import torch.distributed as dist

        dist.barrier()


@contextmanager
def locked(building: Path) -> Iterator[None]:
    """Holds ``building`` (made where it is not there) for this process.

    Raises:
        ValueError: another process builds there.
    """
    building.mkdir(parents=True, exist_ok=True)
    with open(building / "lock", "wb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(
                f"another process is building in {building}: wait for it, or choose another --output"
            ) from error
        yield


def hash_files(paths: Sequence[Path]) -> str:
    """sha256 of the files' own sha256, one after the other."""
    digests = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            digests.update(hashlib.file_digest(file, "sha256").digest())
    return digests.hexdigest()


def already_built(folder: Path, asked: Manifest, overwrite: bool) -> bool:
    """True where ``folder`` can be used as it is; False where it may be written; ValueError where it is something else."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    if not (folder / "manifest.json").is_file():
        raise ValueError(f"{folder} exists and is no index folder, so it is left alone: choose another --output")
    try:
        found = Manifest.read(folder)
    except ValueError:
        if overwrite:
            return False
        raise
    if found.index_id != asked.index_id and not overwrite:
        raise ValueError(
            f"{folder} holds another index ({found.index_id}, asked: {asked.index_id}): choose another --output or add --overwrite"
        )
    return found.index_id == asked.index_id


def _start(building: Path, paths: Sequence[Path], manifest: Manifest, settings: Settings) -> int:
    """Writes the texts and makes room for the vectors, unless a build that was cut short has done so; returns the number of passages."""
    plan_path, asked = building / "plan.json", {**asdict(manifest), "block": settings.block, "encoder": ""}
    if plan_path.is_file():
        plan = json.loads(plan_path.read_bytes())
        count = plan.pop("count")
        if plan == asked:
            return int(count)
        if not settings.overwrite:
            raise ValueError(
                f"{building} holds an unfinished build of another collection, encoder or settings: remove it, or add --overwrite"
            )
    for path in building.iterdir():
        if path.name != "lock":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    count = write_texts(building, paths, settings.progress)
    room = np.lib.format.open_memmap(building / "vectors.npy", "w+", np.dtype(manifest.dtype), (count * manifest.dim,))  # type: ignore[no-untyped-call]
    room.flush()
    (building / "done").mkdir()
    with atomic_write(plan_path) as file:
        json.dump(asked | {"count": count}, file)
    return count


def write_texts(folder: Path, paths: Sequence[Path], progress: bool) -> int:
    """Streams a collection into the tables of docids and contents; returns the number of passages.

    Raises:
        ValueError: a line is malformed, a docid is given twice, or there is no passage.
    """
    from tqdm import tqdm

    docids, contents = StringTableWriter(folder, "docids"), StringTableWriter(folder, "contents")
    with tqdm(desc="read passages", unit=" passages", disable=not progress, leave=False, mininterval=0.5) as bar:
        for path in paths:
            for line, record in read_jsonl(path):
                docid, text = record.get("id"), record.get("contents")
                if not isinstance(docid, str) or not docid or docid != docid.encode("utf-8", "replace").decode():
                    raise ValueError(
                        f"{path}:{line}: field 'id' must be a non-empty string of valid Unicode, got {docid!r}"
                    )
                if not isinstance(text, str):
                    raise ValueError(f"{path}:{line}: field 'contents' must be a string, got {text!r}")
                docids.append(docid.encode())
                contents.append(text.encode("utf-8", "replace"))
                bar.update()
    docids.close()
    contents.close()
    count = len(np.load(folder / "docids_offsets.npy", mmap_mode="r")) - 1
    if count == 0:
        raise ValueError(f"{', '.join(map(str, paths))}: no passage in it")
    write_docid_dictionary(folder, count)
    return count


def write_docid_dictionary(folder: Path, count: int) -> None:
    """ValueError where a docid stands twice."""
    table = load_strings(folder, "docids", count)
    hashes = np.fromiter((string_hash(table.bytes_at(i)) for i in range(count)), np.uint64, count)
    if twice := write_dictionary(folder, "docids", hashes, table):
        raise ValueError(
            f"docid {table[twice[0]]!r} is given twice (passages {twice[0] + 1} and {twice[1] + 1}): docids must be unique"
        )


def _encode(building: Path, encoder: Any, settings: Settings, rank: int, ranks: int) -> None:
    """This rank's blocks, but for those that are done."""
    from tqdm import tqdm

    count = json.loads((building / "plan.json").read_bytes())["count"]
    texts: StringTable = load_strings(building, "contents", count)
    room = np.load(building / "vectors.npy", mmap_mode="r+")
    vectors = room.reshape(count, encoder.dim)
    mine = list(range(0, count, settings.block))[rank::ranks]
    left = [start for start in mine if not _mark(building, start).exists()]
    bar = tqdm(
        total=len(mine),
        initial=len(mine) - len(left),
        desc="encode",
        unit=" blocks",
        disable=not settings.progress or rank > 0,
    )
    with bar:
        for start in left:
            end = min(start + settings.block, count)
            block = encoder.encode(
                [texts[i] for i in range(start, end)],
                settings.max_length,
                settings.batch_size,
                progress=settings.progress and rank == 0,
            )
            vectors[start:end] = check(block.astype(settings.dtype), start)
            room.flush()  # before the mark: a block that is marked is on the disk
            with atomic_write(_mark(building, start)) as file:
                file.write(f"{end}\n")
            bar.update()


def _mark(building: Path, start: int) -> Path:
    return building / "done" / f"{start:010d}"


def check(vectors: Array, first: int) -> Array:
    """The vectors themselves; ValueError where a value is not finite."""
    bad = np.flatnonzero(~np.isfinite(vectors).all(axis=1))
    if len(bad):
        raise ValueError(
            f"the vector of passage {first + int(bad[0]) + 1} has values that are not finite in {vectors.dtype}: use --dtype float32, or check the encoder"
        )
    return vectors


def finish(building: Path, folder: Path, manifest: Manifest, progress: bool) -> None:
    """Adds codes and manifest, and gives the folder its name; what stood there before is removed (the caller has checked that it may be)."""
    from tqdm import tqdm

    vectors = load_array(building / "vectors.npy", manifest.dtype, manifest.num_passages * manifest.dim).reshape(
        -1, manifest.dim
    )
    with tqdm(
        total=len(vectors), desc="codes", unit=" passages", disable=not progress, leave=False, mininterval=0.5
    ) as bar:
        dense_codes.write(building, vectors, bar.update)
    write_manifest(building, asdict(manifest))
    shutil.rmtree(building / "done", ignore_errors=True)
    (building / "plan.json").unlink(missing_ok=True)
    for path in building.iterdir():
        with open(path, "rb") as file:
            os.fsync(file.fileno())
    if folder.exists():
        aside = folder.with_name(f"{folder.name}.tmp-old-{os.getpid()}")
        os.replace(folder, aside)
        os.replace(building, folder)
        shutil.rmtree(aside)
    else:
        os.replace(building, folder)
    (folder / "lock").unlink()
