"""What the server tells of itself: log lines, request ids and the numbers of /metrics."""

import asyncio
import json
import logging
import re
import sys
import time
import uuid
from typing import Any

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
    """Counters, gauges and histograms in a registry of their own (one a server, so that two in one process keep apart)."""

    def __init__(self) -> None:
        registry = self._registry = prometheus.CollectorRegistry()
        prometheus.ProcessCollector(registry=registry)
        prometheus.PlatformCollector(registry=registry)
        self._requests = prometheus.Counter("retriever_requests", "Requests", ["endpoint", "status"], registry=registry)
        self._request_s = prometheus.Histogram(
            "retriever_request_seconds",
            "From the whole body read to the answer sent",
            ["endpoint"],
            buckets=SECONDS,
            registry=registry,
        )
        self._items = prometheus.Counter("retriever_items", "Items searched", ["kind", "index"], registry=registry)
        self._batch = prometheus.Histogram(
            "retriever_batch_items", "Items a searcher call", ["kind"], buckets=SIZES, registry=registry
        )
        self._phase = prometheus.Histogram(
            "retriever_phase_seconds",
            "Waiting in the queue, searching a batch",
            ["phase"],
            buckets=SECONDS,
            registry=registry,
        )
        self._cancelled = prometheus.Counter(
            "retriever_cancelled_items", "Items dropped from the queue because the client hung up", registry=registry
        )
        self._cache = prometheus.Counter(
            "retriever_cache", "Items looked up in the rank cache", ["result"], registry=registry
        )

    def watch(self, name: str, about: str, read: Any) -> None:
        """A gauge whose value is what ``read()`` returns when the page is asked for."""
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


class Traffic:
    """ASGI middleware around all others: request ids, one log line and one count a request."""

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
        except (
            Exception
        ) as error:  # a bug of ours or a broken disk: the trace goes to the log, where the same id stands
            trace = error
            if begun:
                raise
            await JSONResponse({"detail": f"the server failed at request {request_id}: see its log"}, 500)(
                scope, receive, sending
            )
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
            level = (
                logging.ERROR
                if status == 500
                else logging.DEBUG
                if endpoint in ("/health", "/metrics")
                else logging.INFO
            )
            log.log(level, "request", exc_info=trace, extra={"fields": fields})


class JsonLines(logging.Formatter):
    """One JSON object a line: time (UTC), level, logger, message, and the fields that the record brings."""

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
    """Log lines of this server, and of uvicorn from warnings on, go to standard error as ``form`` ("json" or "text")."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines() if form == "json" else TextLines())
    for name, least in (("retriever_server", level.upper()), ("uvicorn", "WARNING")):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(least)
