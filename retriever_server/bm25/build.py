"""Building a BM25 index folder: processes analyse the collection chunk by chunk; buckets sort the postings on disk.

Memory holds the vocabulary, 24 bytes per passage (offsets and hash) and one bucket of postings, never the collection.
"""

import math
import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from convsearch import checksums
from convsearch.cli import Unavailable
from convsearch.files import line_blocks, read_jsonl, sole_writer
from retriever_server import storage
from retriever_server.bm25 import formula
from retriever_server.bm25.chunks import CHUNK_BYTES, Chunk, invert
from retriever_server.bm25.index import Bm25Index
from retriever_server.bm25.manifest import FORMAT, FORMAT_VERSION, Manifest
from retriever_server.parent import exit_with_parent
from retriever_server.storage import Array, NpyAppender, StringTableWriter
from retriever_server.text import analyzer

BUCKETS = 32  # in which the postings are inverted: 0.5 GB of memory for one of them at 25.7 million passages
_SCRATCH = {"terms": "int32", "docs": "int32", "pairs": "uint32"}


def build(
    collections: str | Path | Sequence[str | Path],
    output: str | Path,
    k1: float = 0.9,
    b: float = 0.4,
    overwrite: bool = False,
    progress: bool = True,
    processes: int | None = None,
) -> bool:
    """Writes the index folder ``output``; returns False if it already holds the same collection and parameters.

    Args:
        collections: JSON-lines files of {"id", "contents"}, gzipped or not, indexed one after the other.
        k1: BM25's term frequency saturation, at least 0.
        b: BM25's length normalisation, from 0 to 1.
        overwrite: replace an index of another collection or other parameters.
        processes: how many analyse the text; one per core by default. The index does not depend on it.

    Raises:
        ValueError: a parameter is out of range, a line is malformed, a docid is given twice, the output is taken.
    """
    k1, b, folder = float(k1), float(b), Path(output)
    if not (math.isfinite(k1) and k1 >= 0 and 0 <= b <= 1):
        raise ValueError(f"BM25 needs k1 >= 0 and 0 <= b <= 1, got k1 {k1} and b {b}")
    if processes is not None and processes < 1:
        raise ValueError(f"--processes is {processes}: it must be at least 1")
    paths = storage.collection_paths(collections)
    sha256 = storage.hash_files(paths, progress)
    with sole_writer(folder):
        if storage.already_built(folder, lambda: _differences(folder, k1, b, sha256), overwrite):
            return False
        _write(paths, folder, k1, b, sha256, overwrite, progress, processes)
    return True


def _write(
    paths: Sequence[Path],
    folder: Path,
    k1: float,
    b: float,
    sha256: str,
    overwrite: bool,
    progress: bool,
    processes: int | None,
) -> None:
    with storage.whole_folder(folder, replace=overwrite) as temporary:
        writer = _Writer(temporary)
        with storage.bar(progress, desc="read passages", unit=" passages") as bar:
            for chunk in _chunks(paths, processes or len(os.sched_getaffinity(0))):
                writer.add(chunk)
                bar.update(len(chunk.docid_lengths))
        if writer.num_passages == 0:
            raise ValueError(f"{', '.join(map(str, paths))}: no passage in it")
        writer.finish_passages(paths)
        num_postings, num_codes = writer.finish_postings(k1, b, progress)
        counts = writer.num_passages, writer.num_nonempty, writer.num_tokens, len(writer.vocabulary)
        manifest = Manifest(FORMAT, FORMAT_VERSION, analyzer.NAME, k1, b, *counts, num_postings, num_codes, sha256)
        storage.write_manifest(temporary, asdict(manifest))


def _differences(folder: Path, k1: float, b: float, sha256: str) -> list[str]:
    """What differs in the index of a folder; ValueError if it is damaged, so that the server does not find it out."""
    found = Manifest.read(folder)
    checksums.check(folder, storage.AGAIN)
    Bm25Index.load(folder)
    pairs = {
        "k1": (found.k1, k1),
        "b": (found.b, b),
        "collection": (found.collection_sha256[:12], sha256[:12]),
    }
    return [f"{name} {old} (asked: {new})" for name, (old, new) in pairs.items() if old != new]


def _chunks(paths: Sequence[Path], processes: int) -> Iterator[Chunk]:
    """The collection's chunks in order, inverted by several processes, or by this one if there is only one chunk."""
    blocks = ((str(path), line, block) for path in paths for line, block in line_blocks(path, CHUNK_BYTES))
    if processes == 1 or sum(path.stat().st_size for path in paths) <= CHUNK_BYTES:
        yield from (invert(*block) for block in blocks)
        return
    # spawned, not forked: the caller may have threads
    spawn, parent = get_context("spawn"), os.getpid()
    with ProcessPoolExecutor(processes, spawn, initializer=exit_with_parent, initargs=(parent,)) as pool:
        waiting: deque[Future[Chunk]] = deque()
        try:
            for block in blocks:
                waiting.append(pool.submit(invert, *block))
                if len(waiting) > 2 * processes:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool as error:
            remedy = "run the same command again; if memory was short, with fewer --processes"
            raise Unavailable(f"a worker process was killed: {remedy}") from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


class _Writer:
    """The folder being written: passages go to tables, postings to BUCKETS scratch files by their term's number."""

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
        """Writes the dictionary of docids; ValueError if two are equal."""
        self._docids.close()
        self._contents.close()
        docids = storage.load_strings(self.folder, "docids", self.num_passages)
        twice = storage.write_dictionary(self.folder, "docids", np.concatenate(self._hashes), docids)
        if twice is not None:
            docid = docids[twice[0]]
            found = [f"{path}:{line}" for path in paths for line, record in read_jsonl(path) if record["id"] == docid]
            raise ValueError(f"{found[1]}: docid {docid!r} is given twice (first in {found[0]}): make docids unique")

    def finish_postings(self, k1: float, b: float, progress: bool) -> tuple[int, int]:
        """Inverts bucket after bucket; returns the numbers of postings and of codes."""
        inverse_norms = formula.inverse_norms(k1, b, self.num_tokens, self.num_nonempty)
        tf, inverse_norm = (self._pairs >> 8).astype(np.float32), inverse_norms[self._pairs & 255]
        gain = formula.gain(tf, inverse_norm)
        by_gain = np.argsort(gain, kind="stable")
        codes = np.empty(len(gain), np.uint16 if len(gain) <= 1 << 16 else np.uint32)
        codes[by_gain] = np.arange(len(gain))
        for name, values in (("tf", tf), ("inverse_norm", inverse_norm), ("gain", gain)):
            np.save(self.folder / f"code_{name}.npy", values[by_gain])
        lists = _Lists(len(self.vocabulary), codes.dtype)
        docs_file = NpyAppender(self.folder / "postings_docs.npy", "int32")
        codes_file = NpyAppender(self.folder / "postings_codes.npy", codes.dtype.name)
        with storage.bar(progress, desc="invert", unit=" buckets", total=BUCKETS) as bar:
            for bucket in range(BUCKETS):
                terms, docs, pairs = self._read_bucket(bucket)
                order = np.argsort(terms, kind="stable")  # passages ascend already
                docs_file.append(docs[order])
                of_posting = codes[np.searchsorted(self._pairs, pairs[order])]
                codes_file.append(of_posting)
                lists.add(terms[order], of_posting)
                bar.update()
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
        """Terms in the order of their numbers, and the dictionary to look them up."""
        terms = [term.encode("utf-8", "surrogatepass") for term in self.vocabulary]
        writer = StringTableWriter(self.folder, "terms")
        writer.extend(b"".join(terms), np.fromiter(map(len, terms), np.int64))
        writer.close()
        table = storage.load_strings(self.folder, "terms", len(terms))
        hashes = np.fromiter(map(storage.string_hash, terms), np.uint64, len(terms))
        twice = storage.write_dictionary(self.folder, "terms", hashes, table)
        assert twice is None, twice
        np.save(self.folder / "term_starts.npy", lists.starts)
        np.save(self.folder / "term_frequencies.npy", lists.frequencies)
        np.save(self.folder / "term_max_codes.npy", lists.max_codes)
        np.save(self.folder / "term_idf.npy", formula.idf(self.num_nonempty, lists.frequencies))


class _Lists:
    """Where the postings of each term start, how many there are, and their largest code."""

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
