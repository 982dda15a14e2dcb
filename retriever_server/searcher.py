"""What the server and the evaluation ask of an index, whatever stands behind it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from retriever_server.storage import read_manifest


class Searcher(Protocol):
    """Thread-safe. Docids are strings; ties are broken by index order, in ``search`` and ``gold_ranks`` alike."""

    name: str  # "bm25", ...
    index_id: str  # the same for the same collection and parameters
    num_passages: int

    def search(self, queries: Sequence[str], k: int) -> list[list[tuple[str, float]]]:
        """The best ``k`` (docid, score) of each query, best first; of BM25 only passages that score above 0."""

    def gold_ranks(self, queries: Sequence[str], golds: Sequence[Sequence[str]], depth: int) -> list[int | None]:
        """The exact 1-based rank of each query's best gold passage; None below ``depth``, or where BM25 scores it 0.

        Raises:
            ValueError: a gold docid is not in the index.
        """

    def contents(self, docids: Sequence[str]) -> list[str]:
        """The passages' text.

        Raises:
            ValueError: a docid is not in the index.
        """

    def missing(self, docids: Sequence[str]) -> list[str]:
        """Those docids that are not in the index."""


def open_searcher(folder: str | Path, **dense_options: Any) -> Searcher:
    """Opens an index folder of any known kind: BM25 or dense of ours, or Lucene's own.

    Args:
        dense_options: for a dense index, as DenseIndex.load takes them; other kinds need none and pass over them.

    Raises:
        ValueError: the folder is no index, is damaged, or of a kind or version that this program does not know.
    """
    folder = Path(folder)
    if any(folder.glob("segments_*")):
        from retriever_server.lucene import LuceneIndex

        return LuceneIndex.load(folder)
    if read_manifest(folder).get("format") == "convsearch-dense":
        from retriever_server.dense.index import DenseIndex

        return DenseIndex.load(folder, **dense_options)
    from retriever_server.bm25.index import Bm25Index

    return Bm25Index.load(folder)
