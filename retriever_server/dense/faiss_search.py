"""faiss (IndexFlatIP) for searches, not for gold ranks. It sums in float32, so scores of equal vectors may differ."""

from typing import Any

import numpy as np

from retriever_server.dense.flat import Flat, best_first
from retriever_server.storage import Array


class FaissTop(Flat):
    """Flat, with faiss for ``top``. Its candidates are scored again, so their scores and ties are those of Flat."""

    def __init__(self, vectors: Array, n_gpu: int = 0) -> None:
        """Copies the vectors into faiss, on the CPU or sharded over ``n_gpu`` devices.

        Raises:
            ValueError: faiss is not installed.
        """
        super().__init__(vectors)
        try:
            import faiss  # type: ignore[import-not-found, unused-ignore]
        except ImportError as error:
            remedy = "pip install faiss-cpu==1.15.1 (or faiss-gpu-cuvs==1.15.1)"
            raise ValueError(f"the faiss backend needs faiss: {remedy}") from error
        index: Any = faiss.IndexFlatIP(vectors.shape[1])
        if n_gpu:
            options = faiss.GpuMultipleClonerOptions()
            options.shard = True
            index = faiss.index_cpu_to_all_gpus(index, options, ngpu=n_gpu)
        for start in range(0, len(vectors), 1 << 16):
            index.add(np.ascontiguousarray(vectors[start : start + (1 << 16)], np.float32))
        self._index = index

    def top(self, queries: Array, k: int) -> list[tuple[Array, Array]]:
        queries = np.ascontiguousarray(queries, np.float32)
        _, rows = self._index.search(queries, min(k, len(self.vectors)))
        return [best_first(self.score(query, found), found) for query, found in zip(queries, rows, strict=True)]
