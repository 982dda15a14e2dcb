"""Dense retrieval over an index folder: exact flat search by inner product, and exact gold ranks without a ranking.

A score is kernels.dot (float64 sum, rounded to float32). Every passage has a rank, whatever the sign of its score;
equal scores are ordered by row.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

from retriever_server.base import Hits, Index
from retriever_server.dense import device as devices
from retriever_server.dense.faiss_search import FaissTop
from retriever_server.dense.flat import Flat, Scanner, count_beating
from retriever_server.dense.manifest import Manifest, read_matrix, read_vectors
from retriever_server.dense.ray_shards import spread
from retriever_server.encoder import Encoder, choose_device
from retriever_server.storage import Array, load_dictionary, load_strings

QUERY_LENGTH = 512  # tokens, as in the paper
Encode = Callable[[Sequence[str]], Array]  # texts -> float32 [n, dim]


class DenseIndex(Index):
    """An opened index folder. Thread-safe.

    Example: ``DenseIndex.load("outputs/ance", "castorini/ance-msmarco-passage").search(["who wrote Hamlet?"], k=3)``
    """

    def __init__(self, folder: str | Path, encode: Encode, scanner: Scanner | None = None) -> None:
        """``scanner``: over the folder's vectors, by default a Flat.

        Raises:
            ValueError: something is missing, damaged, of another version, or does not fit the manifest.
        """
        self.folder, self._encode = Path(folder), encode
        self.manifest = manifest = Manifest.read(self.folder)
        self.name, self.index_id, self.num_passages = manifest.retriever, manifest.index_id, manifest.num_passages
        self._docids = load_strings(self.folder, "docids", manifest.num_passages)
        self._row_of = load_dictionary(self.folder, "docids", self._docids)
        self._contents = load_strings(self.folder, "contents", manifest.num_passages) if manifest.texts else None
        self._scanner = scanner or Flat(*read_vectors(self.folder, manifest))

    @classmethod
    def load(
        cls,
        folder: str | Path,
        model_name_or_path: str | None = None,
        device: str = "auto",
        n_gpu: int = 1,
        max_length: int = QUERY_LENGTH,
        batch_size: int = 64,
        backend: str = "flat",
        ray_parts: int = 0,
        ray_address: str | None = None,
    ) -> "DenseIndex":
        """Opens the folder and the encoder of its queries (by default the one that the manifest names).

        Args:
            n_gpu: CUDA devices that share the vectors.
            backend: "flat" (ours), or "faiss" for searches (see faiss_search).
            ray_parts: spread the vectors over this many actors of the Ray cluster at ``ray_address`` (see ray_shards).

        Raises:
            ValueError: as the constructor; the encoder is not that of the passages, or its vectors have another size.
            Unavailable: the encoder cannot be fetched.
        """
        folder, device = Path(folder), choose_device(device)
        manifest = Manifest.read(folder)
        encoder = _encoder_of(folder, manifest, model_name_or_path, device)
        on_gpu = device.startswith("cuda")
        scanner: Scanner | None = None
        if backend not in ("flat", "faiss"):
            raise ValueError(f"backend must be flat or faiss, got {backend!r}")
        if backend == "faiss" and ray_parts:
            raise ValueError("the faiss backend searches in this process: leave out --ray_parts, or --faiss_gpu")
        if backend == "faiss":
            scanner = FaissTop(read_matrix(folder, manifest), n_gpu if on_gpu else 0)
        elif ray_parts:
            scanner = spread(folder, manifest, ray_parts, device, ray_address)
        elif on_gpu:
            scanner = devices.split(*read_vectors(folder, manifest), n_gpu)
        return cls(folder, lambda texts: encoder.encode(texts, max_length, batch_size), scanner)

    def _find(self, docid: str) -> int | None:
        return self._row_of.find(docid)

    def _text(self, row: int) -> str:
        if self._contents is None:
            raise ValueError(f"{self.folder} was imported without --collection, so it has no texts")
        return self._contents[row]

    def _search(self, queries: Sequence[str], k: int) -> list[Hits]:
        found = self._scanner.top(self._encode(queries), k)
        pairs = [zip(scores.tolist(), rows.tolist(), strict=True) for scores, rows in found]
        return [[(self._docids[row], score) for score, row in of_query] for of_query in pairs]

    def _gold_ranks(self, queries: Sequence[str], golds: Sequence[Sequence[int]], depth: int) -> list[int | None]:
        counts = count_beating(self._scanner, self._encode(queries), golds, depth)
        return [None if count >= depth else count + 1 for count in counts.tolist()]


def _encoder_of(folder: Path, manifest: Manifest, name: str | None, device: str) -> Encoder:
    name = name or manifest.encoder
    if not name:
        remedy = "name the encoder of the queries with --model_name_or_path"
        raise ValueError(f"the vectors of {folder} were imported: {remedy}")
    encoder = Encoder.load(name, device)
    if encoder.dim != manifest.dim:
        what = f"{name} makes vectors of {encoder.dim} numbers, the index {folder} has {manifest.dim}"
        raise ValueError(f"{what}: use the encoder of the passages")
    if manifest.encoder_sha256 and encoder.sha256 != manifest.encoder_sha256:
        what = f"{name} is not the encoder of the index {folder}, which was built with {manifest.encoder}"
        raise ValueError(f"{what}: its files differ")
    return encoder
