"""What several test files of the server share: a searcher without an index, and a real server of an application."""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import uvicorn
from fastapi import FastAPI

from convsearch.pages import listen
from retriever_server.bm25.build import build
from retriever_server.bm25.index import Bm25Index


def build_bm25(collections: Any, output: Path, *parameters: float, **options: Any) -> Bm25Index:
    """Builds the folder unless it exists, and opens it; ``parameters``: k1, b."""
    build(collections, output, *parameters, **{"progress": False, **options})
    return Bm25Index.load(output)


class Lengths:
    """A searcher whose ranks are the queries' lengths and whose hits are all its docids; it can be made to wait or to
    fail."""

    def __init__(self, name: str = "lengths", docids: str = "ab") -> None:
        self.name, self.index_id, self.num_passages = name, f"{name}-1", len(docids)
        self.docids, self.seen = docids, list[str]()
        self.begun, self.gate, self.pause_s = threading.Event(), threading.Event(), 0.0
        self.gate.set()

    def _work(self, queries: Sequence[str]) -> None:
        self.seen += queries
        self.begun.set()
        assert self.gate.wait(20)
        time.sleep(self.pause_s)
        if "crash" in queries:
            raise MemoryError("no memory")
        if "refuse" in queries:
            raise ValueError("this query is refused")

    def gold_ranks(self, queries: Sequence[str], golds: Sequence[Sequence[str]], depth: int) -> list[int | None]:
        self._work(queries)
        return [len(query) if 0 < len(query) <= depth else None for query in queries]

    def search(self, queries: Sequence[str], k: int) -> list[list[tuple[str, float]]]:
        self._work(queries)
        return [[(docid, 1.0) for docid in self.docids[:k]] for _ in queries]

    def contents(self, docids: Sequence[str]) -> list[str]:
        return [f"text of {docid}" for docid in docids]

    def missing(self, docids: Sequence[str]) -> list[str]:
        return [docid for docid in docids if docid not in self.docids]


@contextmanager
def running(app: FastAPI) -> Iterator[httpx.Client]:
    bound = listen("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, access_log=False))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]})
    thread.start()
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{bound.getsockname()[1]}", timeout=20, trust_env=False) as client:
            yield client
    finally:
        server.should_exit = True
        thread.join()


def body(*queries: str, **more: Any) -> dict[str, Any]:
    return {"items": [{"id": str(i), "query": query, "gold_docids": ["a"]} for i, query in enumerate(queries)]} | more


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)
