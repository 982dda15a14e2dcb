"""The HTTP interface: /rank, /search, /retrieve and /health over one or several indexes (see docs/serve.md)."""

import asyncio
import json
import os
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from retriever_server import VERSION
from retriever_server.searcher import Searcher

T = TypeVar("T")
Positive = Annotated[int, Field(ge=1)]


@dataclass(frozen=True, slots=True)
class Limits:
    """What one request may ask for; a larger one is refused with 413 (bytes) or 422 (the others)."""

    request_bytes: int = 64 << 20
    items: int = 10_000  # queries or items a request
    query_chars: int = 1_000_000
    results: int = 500_000  # queries x k


class RankItem(BaseModel):
    model_config = ConfigDict(extra="forbid")
    id: str
    query: str
    gold_docids: list[str] | None = None
    qid: str | None = None


class RankRequest(BaseModel):
    model_config = ConfigDict(extra="forbid")
    items: list[RankItem]
    depth: Positive = 100
    index: str | None = None


class SearchRequest(BaseModel):
    model_config = ConfigDict(extra="forbid")
    queries: list[str]
    k: Positive
    index: str | None = None
    contents: bool = False


class RetrieveRequest(BaseModel):
    """The reference server's wire; unknown fields are passed over, as it does."""

    queries: list[str]
    query_ids: list[str]
    topk: Positive | None = None
    return_scores: bool = False
    max_length: Positive | None = None  # words (split at spaces) that are kept of a query; the reference cuts at 1024 where none is given


class Service:
    """The work behind the endpoints, without HTTP but for the status of a refusal."""

    def __init__(self, indexes: Mapping[str, Searcher], qrels: Mapping[str, Sequence[str]] | None, limits: Limits) -> None:
        """``indexes``: name -> index, the first being the default. ``qrels``: query id -> gold docids; None where none were loaded."""
        assert indexes
        self.indexes, self.qrels, self.limits = indexes, qrels, limits
        self.default = next(iter(indexes.values()))

    def searcher(self, name: str | None) -> Searcher:
        if name is None:
            return self.default
        if name not in self.indexes:
            raise HTTPException(404, f"there is no index {name!r} here: this server has {', '.join(self.indexes)}")
        return self.indexes[name]

    def check(self, queries: Sequence[str], results_each: int = 1) -> None:
        if len(queries) > self.limits.items:
            raise HTTPException(422, f"{len(queries)} queries in one request, the limit is {self.limits.items}: send them in several")
        for number, query in enumerate(queries):
            if len(query) > self.limits.query_chars:
                raise HTTPException(422, f"query {number} has {len(query)} characters, the limit is {self.limits.query_chars}: shorten it")
        if len(queries) * results_each > self.limits.results:
            raise HTTPException(
                422, f"{len(queries)} queries x {results_each} results, the limit is {self.limits.results} a request: send them in several"
            )

    def golds_of(self, qid: str) -> list[str]:
        if self.qrels is None:
            raise ValueError(f"qid {qid!r} is unknown: the server was started without --trec_path, so send gold_docids")
        if qid not in self.qrels:
            raise ValueError(f"qid {qid!r} is not in the server's qrels ({len(self.qrels)} queries)")
        return list(self.qrels[qid])

    def resolve(self, searcher: Searcher, gold_docids: Sequence[str] | None, qid: str | None) -> list[str]:
        """An item's gold docids; ValueError says why there are none."""
        if (gold_docids is None) == (qid is None):
            raise ValueError("give exactly one of gold_docids and qid")
        golds = list(gold_docids) if qid is None and gold_docids is not None else self.golds_of(qid or "")
        if not golds:
            raise ValueError("gold_docids is empty")
        if missing := searcher.missing(golds):
            raise ValueError(f"docid {missing[0]!r} is not in the index {searcher.index_id}")
        return golds

    def rank(self, request: RankRequest) -> dict[str, Any]:
        searcher = self.searcher(request.index)
        golds: dict[str, list[str]] = {}
        errors: dict[str, str] = {}
        for item in request.items:
            try:
                golds[item.id] = self.resolve(searcher, item.gold_docids, item.qid)
            except ValueError as error:
                errors[item.id] = str(error)
        queries = [item.query for item in request.items if item.id in golds]
        ranks = searcher.gold_ranks(queries, list(golds.values()), request.depth)
        return {"index_id": searcher.index_id, "ranks": dict(zip(golds, ranks, strict=True)), "errors": errors}

    def search(self, request: SearchRequest) -> dict[str, Any]:
        searcher = self.searcher(request.index)
        results = []
        for hits in searcher.search(request.queries, request.k):
            answers: list[dict[str, Any]] = [{"docid": docid, "score": score} for docid, score in hits]
            if request.contents:
                for answer, text in zip(answers, searcher.contents([docid for docid, _ in hits]), strict=True):
                    answer["contents"] = text
            results.append(answers)
        return {"index_id": searcher.index_id, "results": results}

    def retrieve(self, request: RetrieveRequest) -> dict[str, Any]:
        """Ranks by position (-1: not found). An unknown query id gets -1 and an entry in "errors", and spoils no other answer."""
        depth = request.topk or 100
        queries = [" ".join(query.split(" ")[: request.max_length]) for query in request.queries]
        items = [RankItem(id=str(i), query=query, qid=qid) for i, (query, qid) in enumerate(zip(queries, request.query_ids, strict=True))]
        answer = self.rank(RankRequest(items=items, depth=depth))
        ranks = [-1 if (rank := answer["ranks"].get(item.id)) is None else rank for item in items]
        result: list[Any] = ranks
        if request.return_scores:
            result = [ranks, [[score for _, score in hits] for hits in self.default.search(queries, depth)]]
        return {"result": result} | ({"errors": answer["errors"]} if answer["errors"] else {})

    def health(self) -> dict[str, Any]:
        about = {
            name: {"index_id": index.index_id, "retriever": index.name, "passages": index.num_passages}
            for name, index in self.indexes.items()
        }
        return {"status": "ok", **next(iter(about.values())), "version": VERSION, "indexes": about}


class BodyLimit:
    """ASGI middleware: reads the whole body first and answers 413 where it is larger than ``limit`` bytes."""

    def __init__(self, app: ASGIApp, limit: int) -> None:
        self.app, self.limit = app, limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        body, size, more = bytearray(), 0, True
        while more:  # to its end even where it is too large, without keeping it: a client that is still sending would not see the answer
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            size += len(message.get("body", b""))
            more = message.get("more_body", False)
            if size <= self.limit:
                body += message.get("body", b"")
        if size > self.limit:
            text = f"the request has {size} bytes, the limit is {self.limit}: send it in several"
            await JSONResponse({"detail": text}, 413)(scope, receive, send)
            return
        whole: list[Message] = [{"type": "http.request", "body": bytes(body), "more_body": False}]

        async def replay() -> Message:
            return whole.pop() if whole else await receive()

        await self.app(scope, replay, send)


async def one_sentence(request: Request, error: Exception) -> JSONResponse:
    """A request that does not fit its model: status 422 and the first faults in words instead of FastAPI's list of objects."""
    assert isinstance(error, RequestValidationError)
    faults = [f"{'.'.join(map(str, fault['loc'][1:])) or 'body'}: {fault['msg']}" for fault in error.errors()]
    if "json" not in request.headers.get("content-type", ""):
        faults = ["the body must be JSON, sent with the header 'content-type: application/json'"]
    more = f" (and {len(faults) - 3} more)" if len(faults) > 3 else ""
    return JSONResponse({"detail": "; ".join(faults[:3]) + more}, 422)


def create_app(
    indexes: Mapping[str, Searcher],
    qrels: Mapping[str, Sequence[str]] | None = None,
    limits: Limits | None = None,
    threads: int | None = None,
) -> FastAPI:
    """The application. Searching runs in ``threads`` worker threads (default: one a core), so that /health always answers."""
    limits = limits or Limits()
    service = Service(indexes, qrels, limits)
    pool = ThreadPoolExecutor(threads or os.cpu_count() or 1, thread_name_prefix="search")

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        pool.shutdown(wait=False, cancel_futures=True)

    async def work(task: Callable[[T], dict[str, Any]], request: T) -> Response:
        def answer() -> bytes:
            return json.dumps(task(request), ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")

        return Response(await asyncio.get_running_loop().run_in_executor(pool, answer), media_type="application/json")

    app = FastAPI(title="retriever_server", version=VERSION, lifespan=lifespan, docs_url=None, redoc_url=None)
    app.add_middleware(BodyLimit, limit=limits.request_bytes)
    app.add_exception_handler(RequestValidationError, one_sentence)

    @app.post("/rank")
    async def rank(request: RankRequest) -> Response:
        service.check([item.query for item in request.items])
        key, count = max(Counter(item.id for item in request.items).items(), key=lambda pair: pair[1], default=("", 0))
        if count > 1:
            raise HTTPException(422, f"item id {key!r} is given {count} times: the answers are told apart by id")
        return await work(service.rank, request)

    @app.post("/search")
    async def search(request: SearchRequest) -> Response:
        service.check(request.queries, request.k * (10 if request.contents else 1))
        return await work(service.search, request)

    @app.post("/retrieve")
    async def retrieve(request: RetrieveRequest) -> Response:
        if len(request.queries) != len(request.query_ids):
            raise HTTPException(422, f"{len(request.queries)} queries but {len(request.query_ids)} query_ids")
        service.check(request.queries, (request.topk or 100) if request.return_scores else 1)
        return await work(service.retrieve, request)

    @app.get("/health")
    async def health() -> dict[str, Any]:
        return service.health()

    return app
