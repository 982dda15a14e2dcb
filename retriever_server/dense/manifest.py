"""manifest.json of a dense index folder, and the vectors that it describes."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from retriever_server.dense.codes import Codes
from retriever_server.storage import Array, load_array, load_manifest

FORMAT, FORMAT_VERSION = "convsearch-dense", 1


@dataclass(frozen=True, slots=True)
class Manifest:
    """The counts fix the length of every array."""

    format: str
    version: int
    retriever: str  # "ance" or "dense"
    dim: int
    dtype: str  # of vectors.npy
    num_passages: int
    texts: bool  # whether the folder has the passages' texts
    collection_sha256: str
    encoder: str  # as it was given; empty if vectors were imported
    encoder_sha256: str
    max_length: int  # tokens of a passage; 0 if vectors were imported

    @property
    def index_id(self) -> str:
        key = f"{self.version} {self.dim} {self.dtype} {self.encoder_sha256} {self.max_length} {self.collection_sha256}"
        return f"{self.retriever}-{hashlib.sha256(key.encode()).hexdigest()[:12]}"

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """Reads and checks the manifest of a folder; ValueError as storage.load_manifest."""
        return load_manifest(cls, folder, format=FORMAT, version=FORMAT_VERSION)


def read_matrix(folder: Path, manifest: Manifest) -> Array:
    """The vectors [N, D] of an index folder, memory-mapped."""
    size = manifest.num_passages * manifest.dim
    return load_array(folder / "vectors.npy", manifest.dtype, size).reshape(-1, manifest.dim)


def read_vectors(folder: Path, manifest: Manifest) -> tuple[Array, Codes]:
    """(vectors [N, D], their codes) of an index folder, memory-mapped."""
    return read_matrix(folder, manifest), Codes.load(folder, manifest.num_passages, manifest.dim)
