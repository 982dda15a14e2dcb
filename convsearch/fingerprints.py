"""Fingerprints of what results depend on: another content under the same name is found out, not mixed in."""

from collections.abc import Iterable, Mapping
from pathlib import Path

import xxhash

Fingerprints = Mapping[str, str]  # {what: fingerprint}: {"model": "xxh3-5c0f...", "index": "bm25-8e1d..."}

_WHOLE = 16 << 20  # bytes of a model's file that are read whole; of larger ones the beginning and samples
_SAMPLES, _SAMPLE = 64, 64 << 10
_MODEL_FILES = (".json", ".jinja", ".model", ".txt", ".safetensors", ".bin")


def of_files(paths: Iterable[str | Path]) -> str:
    """By the content of the files, whatever their names.

    Raises:
        ValueError: a file is missing.
    """
    digest = xxhash.xxh3_64()
    for path in paths:
        if not Path(path).is_file():
            raise ValueError(f"{path}: no such file")
        with open(path, "rb") as file:
            while block := file.read(1 << 22):
                digest.update(block)
        digest.update(b"\0end of file\0")
    return _shown(digest)


def of_model_folder(folder: Path) -> str:
    """By the names, sizes and contents of a model's files; of a large file its beginning and 64 samples are read."""
    digest = xxhash.xxh3_64()
    for path in sorted(path for path in folder.iterdir() if path.suffix in _MODEL_FILES and path.is_file()):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\0".encode())
        with open(path, "rb") as file:
            if size <= _WHOLE:
                digest.update(file.read())
                continue
            digest.update(file.read(1 << 20))  # the header of safetensors
            for number in range(1, _SAMPLES + 1):
                file.seek((size - _SAMPLE) * number // _SAMPLES)
                digest.update(file.read(_SAMPLE))
    return _shown(digest)


def of_texts(texts: Iterable[str]) -> str:
    """By the texts and their order."""
    digest = xxhash.xxh3_64()
    for text in texts:
        encoded = text.encode("utf-8", "surrogatepass")
        digest.update(f"{len(encoded)} ".encode())
        digest.update(encoded)
    return _shown(digest)


def check(made: str | Path, before: Fingerprints, now: Fingerprints, remedy: str) -> None:
    """Compares what a result was made of with what would go on with it; one that is not known before is not compared.

    Raises:
        ValueError: they differ; names both.
    """
    for name, value in now.items():
        if before.get(name, value) != value:
            raise ValueError(f"{made} was made with the {name} {before[name]}, now it is {value}: {remedy}")


def _shown(digest: xxhash.xxh3_64) -> str:
    return f"xxh3-{digest.hexdigest()}"
