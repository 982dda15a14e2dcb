"""Building a BM25 index folder: the collection is analysed by several processes, chunk by chunk, and inverted on disk, bucket by bucket.

Memory holds the vocabulary, the passages' offsets and hashes (24 bytes each) and one bucket of postings; never the collection.
"""

import hashlib
import math
import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from convsearch.files import line_blocks, read_jsonl
from retriever_server.bm25 import formula as bm25_formula
from retriever_server.bm25.chunks import CHUNK_BYTES, Chunk, invert
from retriever_server.storage import (
    Array,
    NpyAppender,
    StringTable,
    StringTableWriter,
    load_strings,
    read_manifest,
    string_hash,
    whole_folder,
    write_dictionary,
    write_manifest,
)
from retriever_server.text import analyzer

FORMAT, FORMAT_VERSION = "convsearch-bm25", 2
BUCKETS = 32  # the postings are inverted in as many parts: 0.5 GB of memory for each at 25.7 million passages


@dataclass(frozen=True, slots=True)
class Manifest:
    """manifest.json of an index folder; the counts fix every array's length."""

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
    collection_sha256: str  # of the files' own sha256, one after the other

    @property
    def index_id(self) -> str:
        key = f"{self.version} {self.analyzer} {self.k1!r} {self.b!r} {self.collection_sha256}"
        return f"bm25-{hashlib.sha256(key.encode()).hexdigest()[:12]}"

    @property
    def code_type(self) -> str:
        return "uint16" if self.num_codes <= 1 << 16 else "uint32"

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """Reads and checks a folder's manifest.

        Raises:
            ValueError: absent, damaged, or written by another kind or version of program.
        """
        found, path = read_manifest(folder), folder / "manifest.json"
        if found.get("format") != FORMAT:
            raise ValueError(
                f"{path} has format {found.get('format')!r}, not {FORMAT!r}: this is no BM25 index of ours"
            )
        for key, known in (("version", FORMAT_VERSION), ("analyzer", analyzer.NAME)):
            if found.get(key) != known:
                raise ValueError(
                    f"{path} has {key} {found.get(key)!r}, this program reads {known!r}: build the index again with --overwrite"
                )
        for key, kind in cls.__annotations__.items():
            if type(found.get(key)) is not kind:
                raise ValueError(
                    f"{path}: field {key!r} must be {kind.__name__}, got {found.get(key)!r}: build the index again with --overwrite"
                )
        return cls(**{key: found[key] for key in cls.__annotations__})


def build(
    collections: Sequence[str | Path],
    output: str | Path,
    k1: float,
    b: float,
    overwrite: bool = False,
    progress: bool = True,
    processes: int | None = None,
) -> bool:
    """Writes the index folder ``output``; returns False where it already holds the same collection and parameters.

    Args:
        collections: JSON-lines files of {"id", "contents"}, gzipped or not, indexed one after the other.
        k1: BM25's term frequency saturation, at least 0.
        b: BM25's length normalisation, from 0 to 1.
        overwrite: replace an index of another collection or other parameters.
        processes: how many analyse the text; one a core by default. The index does not depend on it.

    Raises:
        ValueError: a parameter is out of range, a line is malformed, a docid is given twice, the output is taken.
    """
    paths, folder = [Path(path) for path in collections], Path(output)
    if not (math.isfinite(k1) and k1 >= 0 and 0 <= b <= 1):
        raise ValueError(f"BM25 needs k1 >= 0 and 0 <= b <= 1, got k1 {k1} and b {b}")
    if processes is not None and processes < 1:
        raise ValueError(f"--processes is {processes}: it must be at least 1")
    processes = processes or len(os.sched_getaffinity(0))
    for path in paths:
        if not path.is_file():
            raise ValueError(f'there is no collection file {path}: give JSON lines of {{"id", "contents"}}')
    sha256 = _hash(paths, progress)
    if _already_built(folder, sha256, float(k1), float(b), overwrite):
        return False
    with whole_folder(folder, replace=overwrite) as temporary:
        writer = _Writer(temporary)
        with _bar(progress, desc="read passages", unit=" passages") as bar:
            for chunk in _chunks(paths, processes):
                writer.add(chunk)
                bar.update(len(chunk.docid_lengths))
        if writer.num_passages == 0:
            raise ValueError(f"{', '.join(map(str, paths))}: no passage in it")
        writer.finish_passages(paths)
        num_postings, num_codes = writer.finish_postings(float(k1), float(b), progress)
        counts = (
            writer.num_passages,
            writer.num_nonempty,
            writer.num_tokens,
            len(writer.vocabulary),
            num_postings,
            num_codes,
        )
        write_manifest(
            temporary, asdict(Manifest(FORMAT, FORMAT_VERSION, analyzer.NAME, float(k1), float(b), *counts, sha256))
        )
    return True


def _already_built(folder: Path, sha256: str, k1: float, b: float, overwrite: bool) -> bool:
    """True where ``folder`` can be used as it is; False where it may be written."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    if not (folder / "manifest.json").is_file():
        raise ValueError(f"{folder} exists and is no index folder, so it is left alone: choose another --output")
    from retriever_server.bm25.index import Bm25Index

    try:
        found = Manifest.read(folder)
        Bm25Index.load(folder)  # a cut array must not be found out only when it is served
    except ValueError:
        if overwrite:
            return False
        raise
    differing = [
        f"{what} {old} (asked: {new})"
        for what, old, new in (
            ("k1", found.k1, k1),
            ("b", found.b, b),
            ("collection", found.collection_sha256[:12], sha256[:12]),
        )
        if old != new
    ]
    if differing and not overwrite:
        raise ValueError(
            f"{folder} holds an index with {', '.join(differing)}: choose another --output or add --overwrite"
        )
    return not differing


def _bar(progress: bool, **options: Any) -> Any:
    from tqdm import tqdm

    return tqdm(disable=not progress, leave=False, mininterval=0.5, **options)


def _hash(paths: Sequence[Path], progress: bool) -> str:
    digests = hashlib.sha256()
    with _bar(
        progress, desc="hash collection", unit="B", unit_scale=True, total=sum(path.stat().st_size for path in paths)
    ) as bar:
        for path in paths:
            digest = hashlib.sha256()
            with open(path, "rb") as file:
                while block := file.read(1 << 22):
                    digest.update(block)
                    bar.update(len(block))
            digests.update(digest.digest())
    return digests.hexdigest()


def _chunks(paths: Sequence[Path], processes: int) -> Iterator[Chunk]:
    """The collection's chunks in order, inverted by ``processes`` at a time; a collection of one chunk needs no process of its own."""
    blocks = ((str(path), line, block) for path in paths for line, block in line_blocks(path, CHUNK_BYTES))
    if processes == 1 or sum(path.stat().st_size for path in paths) <= CHUNK_BYTES:
        yield from (invert(*block) for block in blocks)
        return
    # spawned, not forked: the caller may have threads
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        waiting: deque[Future[Chunk]] = deque()
        try:
            for block in blocks:
                waiting.append(pool.submit(invert, *block))
                if len(waiting) > 2 * processes:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


class _Writer:
    """The folder being written: passages go straight to their tables, postings to BUCKETS scratch files by their term's number."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.vocabulary: dict[str, int] = {}
        self.num_passages = self.num_nonempty = self.num_tokens = 0
        self._hashes: list[Array] = []
        self._pairs = np.empty(0, np.uint32)
        self._docids, self._contents = StringTableWriter(folder, "docids"), StringTableWriter(folder, "contents")
        self._buckets = [
            [NpyAppender(folder / f"scratch_{name}_{bucket}.npy", kind) for name, kind in _SCRATCH.items()]
            for bucket in range(BUCKETS)
        ]

    def add(self, chunk: Chunk) -> None:
        self._docids.extend(chunk.docids, chunk.docid_lengths)
        self._contents.extend(chunk.contents, chunk.content_lengths)
        self._hashes.append(chunk.docid_hashes)
        self._pairs = np.union1d(self._pairs, chunk.postings_pair)
        vocabulary = self.vocabulary
        numbers = np.array([vocabulary.setdefault(term, len(vocabulary)) for term in chunk.terms], np.int32)
        terms = numbers[chunk.postings_term] if len(numbers) else chunk.postings_term
        bucket_of = (terms % BUCKETS).astype(np.uint8)
        order = np.argsort(bucket_of, kind="stable")
        ends = np.cumsum(np.bincount(bucket_of, minlength=BUCKETS))
        columns = (terms[order], chunk.postings_doc[order] + np.int32(self.num_passages), chunk.postings_pair[order])
        for bucket, files in enumerate(self._buckets):
            part = slice(ends[bucket - 1] if bucket else 0, ends[bucket])
            for file, column in zip(files, columns, strict=True):
                file.append(column[part])
        self.num_passages += len(chunk.docid_lengths)
        self.num_nonempty += chunk.num_nonempty
        self.num_tokens += chunk.num_tokens

    def finish_passages(self, paths: Sequence[Path]) -> None:
        """Writes the dictionary of docids; ValueError where two are equal."""
        self._docids.close()
        self._contents.close()
        docids = load_strings(self.folder, "docids", self.num_passages)
        twice = write_dictionary(self.folder, "docids", np.concatenate(self._hashes), docids)
        if twice is not None:
            docid = docids[twice[0]]
            found = [f"{path}:{line}" for path in paths for line, record in read_jsonl(path) if record["id"] == docid]
            raise ValueError(
                f"{found[1]}: docid {docid!r} is given twice (first in {found[0]}): docids must be unique in a collection"
            )

    def finish_postings(self, k1: float, b: float, progress: bool) -> tuple[int, int]:
        """Inverts bucket after bucket; returns the numbers of postings and of codes."""
        inverse_norms = bm25_formula.inverse_norms(k1, b, self.num_tokens, self.num_nonempty)
        tf, inverse_norm = (self._pairs >> 8).astype(np.float32), inverse_norms[self._pairs & 255]
        gain = bm25_formula.gain(tf, inverse_norm)
        by_gain = np.argsort(gain, kind="stable")
        codes = np.empty(len(gain), np.uint16 if len(gain) <= 1 << 16 else np.uint32)
        codes[by_gain] = np.arange(len(gain))
        for name, values in (("tf", tf), ("inverse_norm", inverse_norm), ("gain", gain)):
            np.save(self.folder / f"code_{name}.npy", values[by_gain])
        lists = _Lists(len(self.vocabulary), codes.dtype)
        docs_file = NpyAppender(self.folder / "postings_docs.npy", "int32")
        codes_file = NpyAppender(self.folder / "postings_codes.npy", codes.dtype.name)
        for bucket in _bar_over(range(BUCKETS), progress, "invert"):
            terms, docs, pairs = self._read_bucket(bucket)
            order = np.argsort(terms, kind="stable")  # passages ascend already
            docs_file.append(docs[order])
            of_posting = codes[np.searchsorted(self._pairs, pairs[order])]
            codes_file.append(of_posting)
            lists.add(terms[order], of_posting)
        docs_file.close()
        codes_file.close()
        self._write_terms(lists)
        return lists.num_postings, len(gain)

    def _read_bucket(self, bucket: int) -> list[Array]:
        columns = []
        for file, name in zip(self._buckets[bucket], _SCRATCH, strict=True):
            file.close()
            path = self.folder / f"scratch_{name}_{bucket}.npy"
            columns.append(np.load(path))
            path.unlink()
        return columns

    def _write_terms(self, lists: "_Lists") -> None:
        """Terms in the order of their numbers, with a dictionary to find them by."""
        terms = [term.encode("utf-8", "surrogatepass") for term in self.vocabulary]
        writer = StringTableWriter(self.folder, "terms")
        writer.extend(b"".join(terms), np.fromiter(map(len, terms), np.int64))
        writer.close()
        table: StringTable = load_strings(self.folder, "terms", len(terms))
        twice = write_dictionary(
            self.folder, "terms", np.fromiter(map(string_hash, terms), np.uint64, len(terms)), table
        )
        assert twice is None, twice
        idf = bm25_formula.idf(self.num_nonempty, lists.frequencies)
        columns: dict[str, Array] = {
            "starts": lists.starts,
            "frequencies": lists.frequencies,
            "max_codes": lists.max_codes,
            "idf": idf,
        }
        for name, values in columns.items():
            np.save(self.folder / f"term_{name}.npy", values)


_SCRATCH = {"terms": "int32", "docs": "int32", "pairs": "uint32"}


class _Lists:
    """Where each term's postings stand, how many there are, and their largest code."""

    def __init__(self, num_terms: int, code_type: Any) -> None:
        self.starts, self.frequencies = np.zeros(num_terms, np.int64), np.zeros(num_terms, np.int32)
        self.max_codes = np.zeros(num_terms, code_type)
        self.num_postings = 0

    def add(self, terms: Array, codes: Array) -> None:
        """The next postings: ``terms`` ascend."""
        if len(terms) == 0:
            return
        firsts = np.flatnonzero(np.r_[True, terms[1:] != terms[:-1]])
        self.starts[terms[firsts]] = self.num_postings + firsts
        self.frequencies[terms[firsts]] = np.diff(np.r_[firsts, len(terms)])
        self.max_codes[terms[firsts]] = np.maximum.reduceat(codes, firsts)
        self.num_postings += len(terms)


def _bar_over(items: Sequence[int], progress: bool, desc: str) -> Iterator[int]:
    with _bar(progress, desc=desc, unit=" buckets", total=len(items)) as bar:
        for item in items:
            yield item
            bar.update()
