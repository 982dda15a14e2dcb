"""manifest.json of a BM25 index folder."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from retriever_server.storage import load_manifest
from retriever_server.text import analyzer

FORMAT, FORMAT_VERSION = "convsearch-bm25", 2


@dataclass(frozen=True, slots=True)
class Manifest:
    """The counts fix the length of every array."""

    format: str
    version: int
    analyzer: str
    k1: float
    b: float
    num_passages: int
    num_nonempty: int  # passages with at least one term
    num_tokens: int
    num_terms: int
    num_postings: int
    num_codes: int  # distinct (tf, length byte) pairs
    collection_sha256: str  # of the files' sha256 digests, one after the other

    @property
    def index_id(self) -> str:
        key = f"{self.version} {self.analyzer} {self.k1!r} {self.b!r} {self.collection_sha256}"
        return f"bm25-{hashlib.sha256(key.encode()).hexdigest()[:12]}"

    @property
    def code_type(self) -> str:
        return "uint16" if self.num_codes <= 1 << 16 else "uint32"

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """Reads and checks the manifest of a folder; ValueError as storage.load_manifest."""
        return load_manifest(cls, folder, format=FORMAT, version=FORMAT_VERSION, analyzer=analyzer.NAME)
