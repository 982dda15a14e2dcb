"""Building a BM25 index folder from collection.jsonl; bm25s computes the scores (its "lucene" method)."""

import hashlib
import math
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from convsearch.files import read_jsonl
from retriever_server import analyzer
from retriever_server.storage import Array, NpyAppender, StringTableWriter, read_manifest, whole_folder, write_manifest

FORMAT, FORMAT_VERSION = "convsearch-bm25", 1


@dataclass(frozen=True, slots=True)
class Manifest:
    """manifest.json of an index folder; the counts fix every array's length."""

    format: str
    version: int
    analyzer: str
    k1: float
    b: float
    num_passages: int
    num_terms: int
    num_postings: int
    collection_sha256: str  # of the files' own sha256, one after the other

    @property
    def index_id(self) -> str:
        key = f"{self.version} {self.analyzer} {self.k1!r} {self.b!r} {self.collection_sha256}"
        return f"bm25-{hashlib.sha256(key.encode()).hexdigest()[:12]}"

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """Reads and checks a folder's manifest.

        Raises:
            ValueError: absent, damaged, or written by another kind or version of program.
        """
        found, path = read_manifest(folder), folder / "manifest.json"
        if found.get("format") != FORMAT:
            raise ValueError(f"{path} has format {found.get('format')!r}, not {FORMAT!r}: this is no BM25 index of ours")
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
    collections: Sequence[str | Path], output: str | Path, k1: float, b: float, overwrite: bool = False, progress: bool = True
) -> bool:
    """Writes the index folder ``output``; returns False where it already holds the same collection and parameters.

    Args:
        collections: JSON-lines files of {"id", "contents"}, gzipped or not, indexed one after the other.
        k1: BM25's term frequency saturation, at least 0.
        b: BM25's length normalisation, from 0 to 1.
        overwrite: replace an index of another collection or other parameters.

    Raises:
        ValueError: a parameter is out of range, a line is malformed, a docid is given twice, the output is taken.
    """
    paths, folder = [Path(path) for path in collections], Path(output)
    if not (math.isfinite(k1) and k1 >= 0 and 0 <= b <= 1):
        raise ValueError(f"BM25 needs k1 >= 0 and 0 <= b <= 1, got k1 {k1} and b {b}")
    for path in paths:
        if not path.is_file():
            raise ValueError(f'there is no collection file {path}: give JSON lines of {{"id", "contents"}}')
    sha256, num_lines = _hash_and_count(paths, progress)
    if _already_built(folder, sha256, float(k1), float(b), overwrite):
        return False
    with whole_folder(folder, replace=overwrite) as temporary:
        vocabulary = _read_passages(paths, temporary, num_lines, progress)
        num_passages = len(np.load(temporary / "tokens_offsets.npy", mmap_mode="r")) - 1
        if num_passages == 0:
            raise ValueError(f"{', '.join(map(str, paths))}: no passage in it")
        num_postings = _write_scores(temporary, vocabulary, k1, b, progress)
        for scratch in ("tokens.npy", "tokens_offsets.npy"):
            (temporary / scratch).unlink()
        manifest = Manifest(FORMAT, FORMAT_VERSION, analyzer.NAME, float(k1), float(b), num_passages, len(vocabulary), num_postings, sha256)
        write_manifest(temporary, asdict(manifest))
    return True


def _already_built(folder: Path, sha256: str, k1: float, b: float, overwrite: bool) -> bool:
    """True where ``folder`` can be used as it is; False where it may be written."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    if not (folder / "manifest.json").is_file():
        raise ValueError(f"{folder} exists and is no index folder, so it is left alone: choose another --output")
    from retriever_server.bm25 import Bm25Index

    try:
        found = Manifest.read(folder)
        Bm25Index.load(folder)  # a cut array must not be found out only when it is served
    except ValueError:
        if overwrite:
            return False
        raise
    differing = [
        f"{what} {old} (asked: {new})"
        for what, old, new in (("k1", found.k1, k1), ("b", found.b, b), ("collection", found.collection_sha256[:12], sha256[:12]))
        if old != new
    ]
    if differing and not overwrite:
        raise ValueError(f"{folder} holds an index with {', '.join(differing)}: choose another --output or add --overwrite")
    return not differing


def _bar(progress: bool, **options: Any) -> Any:
    from tqdm import tqdm

    return tqdm(disable=not progress, leave=False, mininterval=0.5, **options)


def _hash_and_count(paths: Sequence[Path], progress: bool) -> tuple[str, int]:
    """The collection's sha256 and about how many lines it has (for the progress bar; unknown, hence 0, where gzipped)."""
    digests, num_lines = hashlib.sha256(), 0
    with _bar(progress, desc="hash collection", unit="B", unit_scale=True, total=sum(path.stat().st_size for path in paths)) as bar:
        for path in paths:
            digest = hashlib.sha256()
            with open(path, "rb") as file:
                while block := file.read(1 << 22):
                    digest.update(block)
                    num_lines += block.count(b"\n")
                    bar.update(len(block))
            digests.update(digest.digest())
    return digests.hexdigest(), 0 if any(path.suffix == ".gz" for path in paths) else num_lines


def _read_passages(paths: Sequence[Path], folder: Path, num_lines: int, progress: bool) -> dict[str, int]:
    """Streams the collection into docids, contents and token ids on disk; returns the vocabulary in order of appearance."""
    vocabulary: dict[str, int] = {}
    docids: list[bytes] = []
    seen: set[bytes] = set()
    docid_table, contents_table = StringTableWriter(folder, "docids"), StringTableWriter(folder, "contents")
    tokens, offsets = NpyAppender(folder / "tokens.npy", "int32"), array("q", [0])
    with _bar(progress, desc="read passages", unit=" passages", total=num_lines or None) as bar:
        for path in paths:
            for line, record in read_jsonl(path):
                docid, contents = _passage(record, f"{path}:{line}")
                if docid in seen:
                    raise ValueError(f"{path}:{line}: docid {record['id']!r} is given twice: docids must be unique in a collection")
                seen.add(docid)
                docids.append(docid)
                docid_table.append(docid)
                contents_table.append(contents.encode("utf-8", "replace"))
                ids = [vocabulary.setdefault(term, len(vocabulary)) for term in analyzer.analyze(contents)]
                tokens.append(np.array(ids, np.int32))
                offsets.append(offsets[-1] + len(ids))
                bar.update()
    for writer in (docid_table, contents_table, tokens):
        writer.close()
    np.save(folder / "tokens_offsets.npy", np.frombuffer(offsets, np.int64))
    np.save(folder / "docids_order.npy", np.array(sorted(range(len(docids)), key=docids.__getitem__), np.int32))
    return vocabulary


def _passage(record: dict[str, Any], where: str) -> tuple[bytes, str]:
    docid, contents = record.get("id"), record.get("contents")
    if not isinstance(docid, str) or not docid:
        raise ValueError(f"{where}: field 'id' must be a non-empty string, got {docid!r}")
    if not isinstance(contents, str):
        raise ValueError(f"{where}: field 'contents' must be a string, got {contents!r}")
    try:
        return docid.encode("utf-8"), contents
    except UnicodeEncodeError as error:
        raise ValueError(f"{where}: field 'id' is not valid Unicode: {docid!r}") from error


class _TokenIds(Sequence[list[int]]):
    """The passages' token ids as bm25s wants them, renumbered, read from disk one passage at a time."""

    def __init__(self, folder: Path, renumber: Array) -> None:
        self._offsets = np.load(folder / "tokens_offsets.npy")
        tokens = np.load(folder / "tokens.npy", mmap_mode="r")
        self._tokens, self._renumber = np.asarray(tokens), renumber

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __getitem__(self, index: Any) -> Any:
        ids: list[int] = self._renumber[self._tokens[self._offsets[index] : self._offsets[index + 1]]].tolist()
        return ids

    def __iter__(self) -> Iterator[list[int]]:
        return (self[index] for index in range(len(self)))


def _write_scores(folder: Path, vocabulary: dict[str, int], k1: float, b: float, progress: bool) -> int:
    """Writes the sorted vocabulary and, term by term, the postings with their scores; returns the number of postings."""
    terms = sorted((term.encode("utf-8", "surrogatepass"), number) for term, number in vocabulary.items())
    table = StringTableWriter(folder, "terms")
    renumber = np.empty(len(terms), np.int32)
    for new, (term, old) in enumerate(terms):
        table.append(term)
        renumber[old] = new
    table.close()
    if terms:
        import bm25s

        model = bm25s.BM25(k1=k1, b=b, method="lucene", csc_backend="scipy")
        scores = model.build_index_from_ids(range(len(terms)), _TokenIds(folder, renumber), show_progress=progress)
    else:
        scores = {"data": [], "indices": [], "indptr": [0]}
    np.save(folder / "impacts.npy", np.asarray(scores["data"], np.float32))
    np.save(folder / "postings.npy", np.asarray(scores["indices"], np.int32))
    np.save(folder / "postings_offsets.npy", np.asarray(scores["indptr"], np.int64))
    return len(scores["data"])
