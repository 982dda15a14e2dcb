"""Log lines, request ids and the numbers of /metrics."""

import asyncio
import json
import logging
import re
import sys
import time
import uuid
from collections.abc import Callable
from functools import partial

import prometheus_client as prometheus
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from retriever_server.serving.batching import Key

log = logging.getLogger("retriever_server")

ENDPOINTS = ("/rank", "/search", "/similarity", "/retrieve", "/health", "/metrics", "/openapi.json")
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 4096)
REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")


class Telemetry:
    """Counters, gauges and histograms, in a registry per server."""

    def __init__(self) -> None:
        registry = self._registry = prometheus.CollectorRegistry()
        prometheus.ProcessCollector(registry=registry)
        prometheus.PlatformCollector(registry=registry)
        counter = partial(prometheus.Counter, registry=registry)
        histogram = partial(prometheus.Histogram, registry=registry)
        seconds = partial(histogram, buckets=SECONDS)
        self._requests = counter("retriever_requests", "Requests", ["endpoint", "status"])
        about = "From the whole body read to the answer sent"
        self._request_s = seconds("retriever_request_seconds", about, ["endpoint"])
        self._items = counter("retriever_items", "Items searched", ["kind", "index"])
        self._batch = histogram("retriever_batch_items", "Items per searcher call", ["kind"], buckets=SIZES)
        self._phase = seconds("retriever_phase_seconds", "Waiting in the queue, searching a batch", ["phase"])
        about = "Items dropped from the queue because the client disconnected"
        self._cancelled = counter("retriever_cancelled_items", about)
        self._cache = counter("retriever_cache", "Items looked up in the rank cache", ["result"])

    def watch(self, name: str, about: str, read: Callable[[], float]) -> None:
        """A gauge with the value of ``read()`` at the time of a request for /metrics."""
        prometheus.Gauge(name, about, registry=self._registry).set_function(read)

    def request(self, endpoint: str, status: int, seconds: float) -> None:
        self._requests.labels(endpoint, str(status)).inc()
        self._request_s.labels(endpoint).observe(seconds)

    def batch(self, key: Key, items: int, search_s: float) -> None:
        self._items.labels(key.kind, key.index_id).inc(items)
        self._batch.labels(key.kind).observe(items)
        self._phase.labels("search").observe(search_s)

    def waited(self, seconds: float) -> None:
        self._phase.labels("queue").observe(seconds)

    def cancelled(self, items: int) -> None:
        log.info("cancelled", extra={"fields": {"items": items}})
        self._cancelled.inc(items)

    def cache(self, hits: int, misses: int) -> None:
        self._cache.labels("hit").inc(hits)
        self._cache.labels("miss").inc(misses)

    def page(self) -> bytes:
        """The text of /metrics."""
        return prometheus.generate_latest(self._registry)


class RequestLog:
    """ASGI middleware around all others: request ids, one log line and one count per request."""

    def __init__(self, app: ASGIApp, telemetry: Telemetry) -> None:
        self._app, self._telemetry = app, telemetry

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        asked = next((value.decode("latin-1") for key, value in scope["headers"] if key == b"x-request-id"), "")
        request_id = asked if REQUEST_ID.fullmatch(asked) else uuid.uuid4().hex
        state = scope.setdefault("state", {})
        state["request_id"], state["items"] = request_id, 0
        began, status, begun, trace = time.monotonic(), 500, False, None

        async def sending(message: Message) -> None:
            nonlocal status, begun
            if message["type"] == "http.response.start":
                status, begun = message["status"], True
                message["headers"] = [*message.get("headers", []), (b"x-request-id", request_id.encode())]
            await send(message)

        try:
            await self._app(scope, receive, sending)
        except asyncio.CancelledError:  # the server's time to drain is over
            if not begun:
                gone = {"detail": "the server has stopped before it had an answer: ask again"}
                await JSONResponse(gone, 503, {"retry-after": "1", "connection": "close"})(scope, receive, sending)
            raise
        except Exception as error:  # a bug of ours or a broken disk: the log has the trace under the same id
            trace = error
            if begun:
                raise
            failed = {"detail": f"the server failed at request {request_id}: see its log"}
            await JSONResponse(failed, 500)(scope, receive, sending)
        finally:
            took_s = time.monotonic() - began
            endpoint = scope["path"] if scope["path"] in ENDPOINTS else "other"
            self._telemetry.request(endpoint, status, took_s)
            fields = {
                "request_id": request_id,
                "method": scope["method"],
                "path": scope["path"][:200],
                "status": status,
                "items": state["items"],
                "ms": round(1000 * took_s, 2),
                "client": (scope.get("client") or ["?"])[0],
            }
            quiet = endpoint in ("/health", "/metrics")
            level = logging.ERROR if status == 500 else logging.DEBUG if quiet else logging.INFO
            log.log(level, "request", exc_info=trace, extra={"fields": fields})


class JsonLines(logging.Formatter):
    """One JSON object per line: time (UTC), level, logger, message, and the fields of the record."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        } | getattr(record, "fields", {})
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=True)


class TextLines(logging.Formatter):
    """``retriever_server: warning: ...`` for people."""

    def format(self, record: logging.LogRecord) -> str:
        fields = "".join(f" {key}={value}" for key, value in getattr(record, "fields", {}).items())
        trace = "\n" + self.formatException(record.exc_info) if record.exc_info else ""
        return f"retriever_server: {record.levelname.lower()}: {record.getMessage()}{fields}{trace}"


def set_up_logging(form: str, level: str) -> None:
    """Sends this server's log lines, and uvicorn's warnings, to standard error as ``form`` ("json" or "text")."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines() if form == "json" else TextLines())
    for name, least in (("retriever_server", level.upper()), ("uvicorn", "WARNING")):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(least)
