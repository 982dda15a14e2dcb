"""The server as a process: it runs until a signal, answers what it has accepted, and ends with its parent."""

import logging
import os
import signal
import socket
import sys
import threading
import time
from types import FrameType
from typing import Any

import uvicorn

from convsearch.pages import listen
from retriever_server.serving.service import Service

log = logging.getLogger("retriever_server")

DRAIN_S = 30  # after SIGTERM the process ends within this time, whatever hangs


class _Server(uvicorn.Server):
    """Prints ``ready`` when it accepts requests; the first signal starts the draining."""

    def __init__(self, config: uvicorn.Config, service: Service, ready: str) -> None:
        super().__init__(config)
        self.service, self.ready = service, ready
        self.end: float | None = None  # of the draining, in time.monotonic

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            print(self.ready, flush=True)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal starts the draining, with the port open to answer 503; a second one ends it."""
        if self.end is not None:
            super().handle_exit(sig, frame)
            return
        self.service.draining, self.end = True, time.monotonic() + DRAIN_S - 2

    async def on_tick(self, counter: int) -> bool:
        if self.end is not None and (self.service.active == 0 or time.monotonic() > self.end):
            self.should_exit = True
        return await super().on_tick(counter)


def serve(app: Any, host: str, port: int, about: str) -> None:
    """Runs the application until SIGTERM or SIGINT; it then answers accepted requests, within DRAIN_S, and others with
    503.

    Prints ``retriever_server: http://HOST:PORT ready, <about>`` when it accepts requests.
    """
    bound, shown = listen(host, port), f"[{host}]" if ":" in host else host
    ready = f"retriever_server: http://{shown}:{bound.getsockname()[1]} ready, {about}"
    service = app.state.service
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        timeout_keep_alive=120,
        timeout_graceful_shutdown=1,
        ws="none",
        server_header=False,
    )
    if threading.current_thread() is threading.main_thread():
        # uvicorn raises the signal again after its shutdown; a drained server has done its job and ends with status 0
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: None)
    _Server(config, service, ready).run(sockets=[bound])
    if service.batcher.inside:
        log.warning("stopped before all was answered", extra={"fields": {"searches": len(service.batcher.inside)}})
        sys.stdout.flush()
        os._exit(0)  # a search that hangs would keep the interpreter from ending
