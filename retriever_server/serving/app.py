"""The HTTP interface: /rank, /search, /similarity, /retrieve, /health and /metrics over one or several indexes (docs/serve.md), and the playground at /."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from retriever_server import VERSION
from retriever_server.fusion import FUSED_DEPTH, Fusion
from retriever_server.playground.routes import Playground
from retriever_server.searcher import Searcher
from retriever_server.serving.batching import BatchSettings, Overloaded
from retriever_server.serving.rank_cache import RankCache
from retriever_server.serving.schemas import (
    HealthResponse,
    Limits,
    RankRequest,
    RankResponse,
    Refusal,
    RetrieveRequest,
    RetrieveResponse,
    SearchRequest,
    SearchResponse,
    SimilarityRequest,
    SimilarityResponse,
)
from retriever_server.serving.service import Answer, Service
from retriever_server.serving.telemetry import Traffic
from retriever_server.similarity import Similarity

CLIENT_CLOSED = 499  # nginx's status for a client that hung up; nobody reads it but the log
STOPPING = "the server is stopping: ask again, a restarted one or another will answer"
POSTED: dict[int | str, dict[str, Any]] = {
    413: {"model": Refusal, "description": "The body is too large"},
    422: {"model": Refusal, "description": "The request is not of this form, or asks for too much"},
    500: {"model": Refusal, "description": "The server failed; its log has the reason under the request's id"},
    503: {
        "model": Refusal,
        "description": "No room in the queue, or the server is stopping: ask again after Retry-After seconds",
        "headers": {"Retry-After": {"schema": {"type": "integer"}, "description": "whole seconds"}},
    },
}
NAMED: dict[int | str, dict[str, Any]] = {
    404: {"model": Refusal, "description": "There is no index of this name"},
    **POSTED,
}
STOPS: dict[int | str, dict[str, Any]] = {503: POSTED[503]}


class Gate:
    """ASGI middleware: reads the whole body, then answers 503 while the server drains and 413 to more than ``limit`` bytes."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self.app, self.service, self.limit = app, service, service.limits.request_bytes

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
        if self.service.draining and scope["path"] != "/metrics":
            await refused(503, STOPPING, {"retry-after": "1", "connection": "close"})(scope, receive, send)
            return
        if size > self.limit:
            text = f"the request has {size} bytes, the limit is {self.limit}: send it in several"
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
    # half surrogate pairs, which JSON may bring in a name, have no UTF-8 form
    return JSONResponse({"detail": sentence.encode("utf-8", "replace").decode("utf-8")}, status, headers)


async def as_sentence(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, StarletteHTTPException)
    if error.status_code == 400:  # FastAPI's word for a body whose bytes are no text
        return refused(422, "the body must be JSON in UTF-8")
    return refused(error.status_code, str(error.detail), error.headers)


async def one_sentence(request: Request, error: Exception) -> JSONResponse:
    """A request that does not fit its model: status 422 and the first faults in words instead of FastAPI's list of objects."""
    assert isinstance(error, RequestValidationError)
    faults = [f"{'.'.join(map(str, fault['loc'][1:])) or 'body'}: {fault['msg']}" for fault in error.errors()]
    if "json" not in request.headers.get("content-type", ""):
        faults = ["the body must be JSON, sent with the header 'content-type: application/json'"]
    more = f" (and {len(faults) - 3} more)" if len(faults) > 3 else ""
    return refused(422, "; ".join(faults[:3]) + more)


async def no_room(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, Overloaded)
    return refused(503, str(error), {"retry-after": str(error.retry_after_s)})


async def hung_up(request: Request) -> None:
    """Returns when the client closes its connection."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def attended(
    service: Service, request: Request, items: int, work: Callable[[], Coroutine[Any, Any, Answer]]
) -> Response:
    """Runs ``work`` for a request of so many items while its client listens; refuses it at once where there is no room."""

    async def answer() -> bytes:
        with service.batcher.admit(items, client_of(request)):
            return await service.encoded(await work())

    request.state.items = items
    task, gone = asyncio.create_task(answer()), asyncio.create_task(hung_up(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            return Response(status_code=CLIENT_CLOSED)
        return Response(task.result(), media_type="application/json")
    finally:
        gone.cancel()
        task.cancel()  # drops what waits; nothing where it is done


def client_of(request: Request) -> str:
    """Who shares a place in the line: the sender of one x-client-id, else one connection."""
    address = f"{request.client.host}:{request.client.port}" if request.client else "?"
    return request.headers.get("x-client-id", address)[:128]


def refuse_repeated_ids(ids: Sequence[str]) -> None:
    key, count = max(Counter(ids).items(), key=lambda pair: pair[1], default=("", 0))
    if count > 1:
        raise HTTPException(422, f"item id {key!r} is given {count} times: the answers are told apart by id")


def create_app(
    indexes: Mapping[str, Searcher],
    qrels: Mapping[str, Sequence[str]] | None = None,
    limits: Limits | None = None,
    settings: BatchSettings | None = None,
    cache: RankCache | None = None,
    rewriters: Mapping[str, Sequence[str]] | None = None,
    prompt_style: str = "paper",
    similarity: Similarity | None = None,
) -> FastAPI:
    """The application; ``app.state.service`` does the work. Searching runs in worker threads, so that /health always answers.

    ``rewriters``: the playground's, name -> command (see ``playground.rewriter_commands``).
    """
    service = Service(indexes, qrels, limits or Limits(), settings or BatchSettings(), cache, similarity)
    playground = Playground(service, rewriters or {}, prompt_style)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        playground.close()
        service.close()

    app = FastAPI(title="retriever_server", version=VERSION, lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.service = service
    app.add_middleware(Gate, service=service)
    app.add_middleware(Traffic, telemetry=service.telemetry)
    app.add_exception_handler(StarletteHTTPException, as_sentence)
    app.add_exception_handler(RequestValidationError, one_sentence)
    app.add_exception_handler(Overloaded, no_room)

    @app.post("/rank", response_model=RankResponse, responses=NAMED)
    async def rank(body: RankRequest, request: Request) -> Response:
        fused = isinstance(service.searcher(body), Fusion)
        service.check([item.query for item in body.items], max(body.depth, FUSED_DEPTH) if fused else 1)
        refuse_repeated_ids([item.id for item in body.items])
        return await attended(service, request, len(body.items), lambda: service.rank(body, client_of(request)))

    @app.post("/search", response_model=SearchResponse, response_model_exclude_none=True, responses=NAMED)
    async def search(body: SearchRequest, request: Request) -> Response:
        service.check(body.queries, body.k * (10 if body.contents else 1))
        return await attended(service, request, len(body.queries), lambda: service.search(body, client_of(request)))

    @app.post("/similarity", response_model=SimilarityResponse, responses=NAMED)
    async def gains(body: SimilarityRequest, request: Request) -> Response:
        service.check([item.output for item in body.items])
        refuse_repeated_ids([item.id for item in body.items])
        return await attended(service, request, len(body.items), lambda: service.gains(body, client_of(request)))

    @app.post("/retrieve", response_model=RetrieveResponse, responses=POSTED)
    async def retrieve(body: RetrieveRequest, request: Request) -> Response:
        if len(body.queries) != len(body.query_ids):
            raise HTTPException(422, f"{len(body.queries)} queries but {len(body.query_ids)} query_ids")
        service.check(body.queries, (body.topk or 100) if body.return_scores else 1)
        return await attended(service, request, len(body.queries), lambda: service.retrieve(body, client_of(request)))

    @app.get("/health", response_model=HealthResponse, responses=STOPS)
    async def health() -> dict[str, Any]:
        return service.health()

    playground.add_to(app)
    text: dict[str, Any] = {
        "content": {"text/plain": {"schema": {"type": "string"}}},
        "description": "Prometheus' text format",
    }

    @app.get("/metrics", response_class=Response, responses={200: text})
    async def metrics() -> Response:
        return Response(service.telemetry.page(), media_type="text/plain; version=0.0.4; charset=utf-8")

    return app
