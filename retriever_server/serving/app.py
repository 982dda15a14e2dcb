"""The HTTP interface (docs/retrievers.md): /rank, /search, /missing, /similarity, /retrieve, /health and /metrics."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

from fastapi import APIRouter, FastAPI, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from retriever_server.searcher import FUSED_DEPTH, Fusion, Searcher
from retriever_server.serving import schemas
from retriever_server.serving.batching import BatchSettings, Overloaded
from retriever_server.serving.rank_cache import RankCache
from retriever_server.serving.schemas import Limits, Refusal
from retriever_server.serving.service import Answer, Service
from retriever_server.serving.telemetry import RequestLog
from retriever_server.similarity import Similarity

CLIENT_CLOSED = 499  # nginx's status for a client that closed its connection; only the log shows it
STOPPING = "the server is stopping: ask again, a restarted one or another will answer"
POSTED: dict[int | str, dict[str, Any]] = {
    413: {"model": Refusal, "description": "The body is too large"},
    422: {"model": Refusal, "description": "The request does not have this form, or is too large"},
    500: {"model": Refusal, "description": "The server failed; its log has the reason under the request's id"},
    503: {
        "model": Refusal,
        "description": "The queue is full, or the server is stopping: ask again after Retry-After seconds",
        "headers": {"Retry-After": {"schema": {"type": "integer"}, "description": "whole seconds"}},
    },
}
NAMED = {404: {"model": Refusal, "description": "There is no index of this name"}, **POSTED}
PLAIN = {"content": {"text/plain": {"schema": {"type": "string"}}}, "description": "Prometheus' text format"}


class BodyLimitMiddleware:
    """ASGI middleware: reads the whole body; answers 503 while the server drains, and 413 above ``limit`` bytes."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self.app, self.service, self.limit = app, service, service.limits.request_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        body, size, more = bytearray(), 0, True
        # to the end even if the body is too large, without keeping it: a client that still sends would miss the answer
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            size += len(message.get("body", b""))
            more = message.get("more_body", False)
            if size <= self.limit:
                body += message.get("body", b"")
        if self.service.draining and scope["path"] != "/metrics":
            await refused(503, STOPPING, {"retry-after": "1", "connection": "close"})(scope, receive, send)
            return
        if size > self.limit:
            text = f"the request has {size} bytes, the limit is {self.limit}: split it into several"
            await refused(413, text)(scope, receive, send)
            return
        whole: list[Message] = [{"type": "http.request", "body": bytes(body), "more_body": False}]

        async def replay() -> Message:
            return whole.pop() if whole else await receive()

        self.service.active += 1
        try:
            await self.app(scope, replay, send)
        finally:
            self.service.active -= 1


def refused(status: int, sentence: str, headers: Mapping[str, str] | None = None) -> JSONResponse:
    # JSON can carry half surrogate pairs, for example in a name, which have no UTF-8 form
    return JSONResponse({"detail": sentence.encode("utf-8", "replace").decode("utf-8")}, status, headers)


async def http_error(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, StarletteHTTPException)
    if error.status_code == 400:  # FastAPI's status for a body that is not text
        return refused(422, "the body must be JSON in UTF-8")
    return refused(error.status_code, str(error.detail), error.headers)


async def validation_error(request: Request, error: Exception) -> JSONResponse:
    """A request that does not fit its model: status 422 and its first faults in a sentence, not FastAPI's list."""
    assert isinstance(error, RequestValidationError)
    faults = [f"{'.'.join(map(str, fault['loc'][1:])) or 'body'}: {fault['msg']}" for fault in error.errors()]
    if "json" not in request.headers.get("content-type", ""):
        faults = ["the body must be JSON, sent with the header 'content-type: application/json'"]
    more = f" (and {len(faults) - 3} more)" if len(faults) > 3 else ""
    return refused(422, "; ".join(faults[:3]) + more)


async def overloaded(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, Overloaded)
    return refused(503, str(error), {"retry-after": str(error.retry_after_s)})


async def disconnected(request: Request) -> None:
    """Returns when the client closes its connection."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def run_while_connected(
    service: Service, request: Request, items: int, work: Callable[[], Coroutine[Any, Any, Answer]]
) -> Response:
    """Runs ``work`` for a request of ``items`` items until its client disconnects; Overloaded if the queue is full."""

    async def answer() -> bytes:
        with service.batcher.admit(items, client_of(request)):
            return await service.encoded(await work())

    request.state.items = items
    task, gone = asyncio.create_task(answer()), asyncio.create_task(disconnected(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            return Response(status_code=CLIENT_CLOSED)
        return Response(task.result(), media_type="application/json")
    finally:
        gone.cancel()
        task.cancel()  # drops the waiting items; does nothing if it is done


def client_of(request: Request) -> str:
    """Whose requests share a place in the queue: those with one x-client-id, else those of one connection."""
    address = f"{request.client.host}:{request.client.port}" if request.client else "?"
    return request.headers.get("x-client-id", address)[:128]


def refuse_repeated_ids(ids: Sequence[str]) -> None:
    key, count = max(Counter(ids).items(), key=lambda pair: pair[1], default=("", 0))
    if count > 1:
        raise HTTPException(422, f"item id {key!r} is given {count} times: ids must be unique")


def create_app(
    indexes: Mapping[str, Searcher],
    qrels: Mapping[str, Sequence[str]] | None = None,
    limits: Limits | None = None,
    settings: BatchSettings | None = None,
    cache: RankCache | None = None,
    similarity: Similarity | None = None,
) -> FastAPI:
    """The application. ``app.state.service`` searches in worker threads, so /health always answers."""
    service = Service(indexes, qrels, limits or Limits(), settings or BatchSettings(), cache, similarity)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        service.close()

    app = FastAPI(title="retriever_server", version=schemas.VERSION, lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.service = service
    app.add_middleware(BodyLimitMiddleware, service=service)
    app.add_middleware(RequestLog, telemetry=service.telemetry)
    app.add_exception_handler(StarletteHTTPException, http_error)
    app.add_exception_handler(RequestValidationError, validation_error)
    app.add_exception_handler(Overloaded, overloaded)
    app.include_router(endpoints(service))
    return app


def endpoints(service: Service) -> APIRouter:
    router = APIRouter()

    @router.post("/rank", response_model=schemas.RankResponse, responses=NAMED)
    async def rank(body: schemas.RankRequest, request: Request) -> Response:
        fused = isinstance(service.searcher(body), Fusion)
        service.check([item.query for item in body.items], max(body.depth, FUSED_DEPTH) if fused else 1)
        refuse_repeated_ids([item.id for item in body.items])
        work = partial(service.rank, body, client_of(request))
        return await run_while_connected(service, request, len(body.items), work)

    @router.post("/search", response_model=schemas.SearchResponse, response_model_exclude_none=True, responses=NAMED)
    async def search(body: schemas.SearchRequest, request: Request) -> Response:
        service.check(body.queries, body.k * (10 if body.contents else 1))
        work = partial(service.search, body, client_of(request))
        return await run_while_connected(service, request, len(body.queries), work)

    @router.post("/missing", response_model=schemas.MissingResponse, responses=NAMED)
    async def missing(body: schemas.MissingRequest, request: Request) -> Response:
        service.check(body.docids)
        return await run_while_connected(service, request, 1, partial(service.missing, body))

    @router.post("/similarity", response_model=schemas.SimilarityResponse, responses=NAMED)
    async def gains(body: schemas.SimilarityRequest, request: Request) -> Response:
        service.check([item.output for item in body.items])
        refuse_repeated_ids([item.id for item in body.items])
        work = partial(service.gains, body, client_of(request))
        return await run_while_connected(service, request, len(body.items), work)

    @router.post("/retrieve", response_model=schemas.RetrieveResponse, responses=POSTED)
    async def retrieve(body: schemas.RetrieveRequest, request: Request) -> Response:
        if len(body.queries) != len(body.query_ids):
            raise HTTPException(422, f"{len(body.queries)} queries but {len(body.query_ids)} query_ids")
        service.check(body.queries, (body.topk or 100) if body.return_scores else 1)
        work = partial(service.retrieve, body, client_of(request))
        return await run_while_connected(service, request, len(body.queries), work)

    @router.get("/health", response_model=schemas.HealthResponse, responses={503: POSTED[503]})
    async def health() -> dict[str, Any]:
        return service.health()

    @router.get("/metrics", response_class=Response, responses={200: PLAIN})
    async def metrics() -> Response:
        return Response(service.telemetry.page(), media_type="text/plain; version=0.0.4; charset=utf-8")

    return router
