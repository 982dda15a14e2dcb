"""Searchers: their protocol, opening index folders of every kind, and fusing several indexes into one."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from retriever_server.base import Hits
from retriever_server.bm25.index import Bm25Index
from retriever_server.lucene import LuceneIndex
from retriever_server.storage import read_manifest

# In a fusion each index contributes its best max(k, FUSED_DEPTH), so that a longer list begins with a shorter one.
FUSED_DEPTH = 100


class Searcher(Protocol):
    """What the server and the evaluation need of an index. Thread-safe.

    Docids are strings; ties are broken by index order, in ``search`` and ``gold_ranks`` alike.
    """

    name: str  # "bm25", ...
    index_id: str  # the same for the same collection and parameters
    num_passages: int

    def search(self, queries: Sequence[str], k: int) -> list[Hits]:
        """The best ``k`` (docid, score) per query, best first; BM25 returns only passages that score above 0."""

    def gold_ranks(self, queries: Sequence[str], golds: Sequence[Sequence[str]], depth: int) -> list[int | None]:
        """The exact 1-based rank of each query's best gold passage; None below ``depth``, or if BM25 scores it 0.

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


def _open_dense(folder: Path, **options: Any) -> Searcher:
    from retriever_server.dense.index import DenseIndex  # loads torch, which a server of BM25 must do without

    return DenseIndex.load(folder, **options)


# "format" of manifest.json -> how to open such a folder; only dense indexes take options
OPENERS: dict[str, Callable[..., Searcher]] = {
    "convsearch-bm25": lambda folder, **_: Bm25Index.load(folder),
    "convsearch-dense": _open_dense,
    "lucene": lambda folder, **_: LuceneIndex.load(folder),
}


def open_searcher(folder: str | Path, **dense_options: Any) -> Searcher:
    """Opens an index folder of any known kind: BM25, dense, or Lucene's own.

    Args:
        dense_options: for a dense index, as DenseIndex.load takes them; other kinds ignore them.

    Raises:
        ValueError: the folder is no index, is damaged, or of a kind or version that this program does not read.
    """
    folder = Path(folder)
    kind = "lucene" if any(folder.glob("segments_*")) else read_manifest(folder).get("format")
    return OPENERS.get(str(kind), OPENERS["convsearch-bm25"])(folder, **dense_options)


def open_indexes(
    arguments: Sequence[str],
    k1: float | None,
    b: float | None,
    retriever_name: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> dict[str, Searcher]:
    """name -> index, from NAME=DIR or DIR (whose last part is the name). ``options``: for dense indexes.

    Raises:
        ValueError: an index cannot be opened, two have one name, or k1, b or ``retriever_name`` do not match.
    """
    indexes: dict[str, Searcher] = {}
    for argument in arguments:
        name, separator, folder = argument.partition("=")
        if not separator or Path(argument).is_dir():
            name, folder = Path(argument).resolve().name, argument
        if name in indexes:
            raise ValueError(f"two indexes are called {name!r}: name them with --index_path NAME=DIR")
        index = open_searcher(folder, **(options or {}))
        if retriever_name is not None and not indexes and index.name != retriever_name:
            remedy = "leave the flag out, or name another index"
            raise ValueError(f"--retriever_name {retriever_name}, but {folder} is an index of {index.name}: {remedy}")
        if isinstance(index, Bm25Index):
            _check_bm25(index, folder, k1, b)
        indexes[name] = index
    if (k1, b) != (None, None) and not any(index.name == "bm25" for index in indexes.values()):
        raise ValueError("--bm25_k1 and --bm25_b are given, but no index here is of bm25: leave them out")
    return indexes


def _check_bm25(index: Bm25Index, folder: str, k1: float | None, b: float | None) -> None:
    for name, wanted, found in (("k1", k1, index.k1), ("b", b, index.b)):
        if wanted is not None and wanted != found:
            remedy = (
                f"leave the flag out, or build one with `python -m retriever_server.index bm25 --{name} {wanted} ...`"
            )
            raise ValueError(f"--bm25_{name} {wanted}, but {folder} was built with {name} {found}: {remedy}")


def fuse(lists: Sequence[Sequence[str]], rrf_k: int) -> list[tuple[str, float]]:
    """Reciprocal rank fusion (Cormack, Clarke and Büttcher, SIGIR 2009): (docid, score) in the fused order.

    A score is the sum of 1 / (rrf_k + rank) over the lists that hold the passage. Equal scores are ordered by rank in
    the first list (a passage that is not in it comes last), then by rank in the second, and so on.
    ``fuse([["a", "b"], ["b", "c"]], 60)`` is ``[("b", 1/62 + 1/61), ("a", 1/61), ("c", 1/62)]``.
    """
    ranks: dict[str, list[float]] = {}
    for number, docids in enumerate(lists):
        for rank, docid in enumerate(docids, start=1):
            ranks.setdefault(docid, [math.inf] * len(lists))[number] = rank
    # fsum rounds once, whatever the order of the lists: sums that are equal stay equal
    scores = {docid: math.fsum(1 / (rrf_k + rank) for rank in of_lists) for docid, of_lists in ranks.items()}
    return [(docid, scores[docid]) for docid in sorted(ranks, key=lambda docid: (-scores[docid], ranks[docid]))]


class Fusion:
    """A searcher whose lists are fused from those of others. A passage is in it if it is in one of them."""

    name = "rrf"

    def __init__(self, searchers: Sequence[Searcher], rrf_k: int = 60) -> None:
        assert len(searchers) > 1
        self._searchers, self._rrf_k = searchers, rrf_k
        self.index_id = f"rrf{rrf_k}({'+'.join(searcher.index_id for searcher in searchers)})"
        self.num_passages = max(searcher.num_passages for searcher in searchers)

    def search(self, queries: Sequence[str], k: int) -> list[Hits]:
        """The first ``k`` of the fused order, of lists that are cut at max(k, FUSED_DEPTH)."""
        found = [searcher.search(queries, max(k, FUSED_DEPTH)) for searcher in self._searchers]
        docids = [[[docid for docid, _ in hits] for hits in of_query] for of_query in zip(*found, strict=True)]
        return [fuse(lists, self._rrf_k)[:k] for lists in docids]

    def gold_ranks(self, queries: Sequence[str], golds: Sequence[Sequence[str]], depth: int) -> list[int | None]:
        """The rank of the best gold in what ``search`` returns for k = ``depth``; None if none of them is there."""
        ranks: list[int | None] = []
        for hits, docids in zip(self.search(queries, depth), golds, strict=True):
            ranks.append(next((rank for rank, (docid, _) in enumerate(hits, start=1) if docid in docids), None))
        return ranks

    def contents(self, docids: Sequence[str]) -> list[str]:
        texts: dict[str, str] = {}
        for searcher in self._searchers:
            left = [docid for docid in docids if docid not in texts]
            absent = set(searcher.missing(left))
            known = [docid for docid in left if docid not in absent]
            texts |= zip(known, searcher.contents(known), strict=True)
        if left := [docid for docid in docids if docid not in texts]:
            raise ValueError(f"docid {left[0]!r} is not in the indexes {self.index_id}")
        return [texts[docid] for docid in docids]

    def missing(self, docids: Sequence[str]) -> list[str]:
        for searcher in self._searchers:
            docids = searcher.missing(docids) if docids else []
        return list(docids)
