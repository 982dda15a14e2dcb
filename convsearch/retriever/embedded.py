"""A retriever client with a server of its own, and the one place that opens a retriever by its address."""

import atexit
import os
import select
import subprocess
import sys
import threading
import time
from collections import deque
from pathlib import Path
from urllib.parse import urlsplit

from convsearch.retriever.client import START_COMMAND, RetrieverClient, RetrieverError

ROOT = Path(__file__).resolve().parents[2]  # the folder of the package retriever_server


class EmbeddedRetriever(RetrieverClient):
    """A client whose server is a child process on 127.0.0.1. A dead server is started again before the next request."""

    def __init__(
        self,
        folder: str,
        depth: int = 100,
        timeout_s: float = 60,
        max_wait_s: float = 300,
        index: str | None = None,
        similarity_model: str | None = None,
    ) -> None:
        """Starts the server of one index folder and waits until it is ready. ``similarity_model``: its encoder, if any.

        Raises:
            ValueError: the server refuses the index folder; the server's own sentence.
            RetrieverError: the server does not start.
        """
        super().__init__("http://127.0.0.1", depth, timeout_s, max_wait_s, index)
        self._folder, self._owner, self._closed, self._similarity_model = folder, os.getpid(), False, similarity_model
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None
        atexit.register(self.close)
        try:
            self._before_attempt(time.monotonic() + max_wait_s)
        except BaseException:
            self.close()
            raise

    @property
    def pid(self) -> int | None:
        """The server's process id; None before it has started."""
        return None if self._process is None else self._process.pid

    def _before_attempt(self, deadline: float) -> None:
        with self._lock:
            if self._closed:
                raise RetrieverError(f"the embedded retriever of {self._folder} has been closed")
            while self._process is None or self._process.poll() is not None:
                if self._process is not None:
                    ended = f"the embedded server of {self._folder} ended (status {self._process.returncode})"
                    print(f"retriever: {ended}: starting it again", file=sys.stderr)
                    _close_output(self._process)
                self._start(deadline)

    def _start(self, deadline: float) -> None:
        """Starts the server and waits for its ready line, or until a signal has ended it."""
        command = [sys.executable, "-m", "retriever_server", "--index_path", self._folder, "--port", "0"]
        command += ["--log_format", "text", "--exit-with-parent", str(self._owner)]
        command += ["--similarity_model", self._similarity_model] if self._similarity_model else []
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        process = self._process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": path},
            text=True,
            start_new_session=True,  # Ctrl-C must reach the trainer alone: it needs ranks to finish its step
        )
        assert process.stdout is not None
        last_lines: deque[str] = deque(maxlen=20)
        reader = threading.Thread(target=_keep_lines, args=(process, last_lines), daemon=True)
        reader.start()
        if not select.select([process.stdout], [], [], max(deadline - time.monotonic(), 0))[0]:
            process.kill()
            raise RetrieverError(f"the embedded server of {self._folder} was not ready within {self.max_wait_s:g} s")
        ready = process.stdout.readline()
        if ready.startswith("retriever_server: http://"):
            self.url = ready.split()[1]
            return
        status = process.wait()
        reader.join(timeout=5)
        reason = last_lines[-1] if last_lines else "it printed nothing"
        if status == 2:
            raise ValueError(reason.removeprefix("error: "))
        if status >= 0:
            raise RetrieverError(f"the embedded server of {self._folder} did not start (status {status}): {reason}")

    def close(self) -> None:
        """Stops the server; a second call does nothing."""
        super().close()
        atexit.unregister(self.close)
        with self._lock:
            self._closed = True
            process = self._process
            if process is None or os.getpid() != self._owner:  # a forked child must not stop its parent's server
                return
            process.terminate()
            try:
                process.wait(timeout=5)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            _close_output(process)


def _close_output(process: subprocess.Popen[str]) -> None:
    if process.stdout is not None:
        process.stdout.close()


def _keep_lines(process: subprocess.Popen[str], last_lines: deque[str]) -> None:
    """Keeps the last lines of the server's standard error, and prints what it writes while it runs."""
    assert process.stderr is not None
    with process.stderr:
        for line in process.stderr:
            last_lines.append(line.rstrip())
            if not line.startswith("error: "):
                print(f"retriever: {line.rstrip()}", file=sys.stderr)


def open_retriever(
    url: str | None = None,
    depth: int = 100,
    timeout_s: float = 60,
    max_wait_s: float = 300,
    index: str | None = None,
    similarity_model: str | None = None,
) -> RetrieverClient:
    """A client of the server at ``http(s)://HOST:PORT``, or of a server that it starts for ``embedded:INDEX_FOLDER``.

    An embedded server stops with ``close()`` or with this process. An empty ``url`` means the environment's
    RETRIEVER_URL.

    Raises:
        ValueError: no url, an unknown scheme, or an index folder that cannot be opened.
        RetrieverError: the embedded server does not start.
    """
    url = url or os.environ.get("RETRIEVER_URL", "")
    if not url:
        choices = f"http://HOST:PORT of {START_COMMAND} or to embedded:INDEX_FOLDER"
        raise ValueError(f"no retriever: set retriever.url (or RETRIEVER_URL) to {choices}")
    if url.startswith("embedded:"):
        folder = url.removeprefix("embedded:")
        return EmbeddedRetriever(folder, depth, timeout_s, max_wait_s, index, similarity_model)
    if urlsplit(url).scheme not in ("http", "https"):
        raise ValueError(f"retriever url {url!r}: must be http://HOST:PORT, https://HOST:PORT or embedded:INDEX_FOLDER")
    return RetrieverClient(url, depth, timeout_s, max_wait_s, index)
