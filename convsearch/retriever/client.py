"""The HTTP client of the retriever server: exact gold ranks and searches, with an exception where the server stays away.

A server that does not answer is never a rank of "not found": a request is repeated until ``max_wait_s``, then RetrieverError
is raised. What the server refuses (an unknown docid, a query that is too long) is a ValueError that names the item.
"""

import atexit
import json
import os
import random
import select
import subprocess
import sys
import threading
import time
import uuid
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self
from urllib.parse import urlsplit

import httpx

from convsearch.cli import Unavailable
from convsearch.retriever.request_items import chunks, clean, short

ITEMS_A_REQUEST = 512
RESULTS_A_REQUEST = 50_000  # queries x k; a tenth of it with contents
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.2, 10.0
START_COMMAND = "`python -m retriever_server --index_path INDEX --port 8000`"


class RetrieverError(Unavailable):
    """The retriever did not answer, or not as a retriever does."""


class Hit(NamedTuple):
    """One search result. ``Hit("d17", 4.25)``; ``contents`` is None unless it was asked for."""

    docid: str
    score: float
    contents: str | None = None


class RetrieverClient:
    """Speaks to one server, from any number of threads. Close it, or use it as a context manager.

    Example: ``RetrieverClient("http://127.0.0.1:8000").gold_ranks([["d17"]], ["who wrote Hamlet?"])`` is ``[1]``.
    """

    def __init__(
        self, url: str, depth: int = 100, timeout_s: float = 60, max_wait_s: float = 300, index: str | None = None
    ) -> None:
        """
        Args:
            url: ``http://HOST:PORT`` of the server.
            depth: ranks below it are answered None.
            timeout_s: how long one attempt may take.
            max_wait_s: how long a request is repeated in all before RetrieverError is raised.
            index: name of the index on a server that has several; None is its first.

        Raises:
            ValueError: an argument is out of range, or the url is none of http.
        """
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.port == 0:
            raise ValueError(f"a retriever's url must be http://HOST:PORT, got {url!r}")
        if depth < 1 or timeout_s <= 0 or max_wait_s <= 0:
            raise ValueError(
                f"depth, timeout_s and max_wait_s must be positive, got {depth}, {timeout_s} and {max_wait_s}"
            )
        self.url, self.depth, self.timeout_s, self.max_wait_s, self.index = (
            url.rstrip("/"),
            depth,
            timeout_s,
            max_wait_s,
            index,
        )
        loopback = parts.hostname in ("127.0.0.1", "localhost", "::1")
        self._http = httpx.Client(
            trust_env=not loopback
        )  # a proxy from the environment cannot reach this machine's own ports
        self._id = uuid.uuid4().hex  # the server's line has one place a client, however many connections it has
        self._random = random.Random()  # the jitter must not move the global generator, which experiments seed

    def gold_ranks(self, golds: Sequence[Sequence[str]], queries: Sequence[str | None]) -> list[int | None]:
        """The exact 1-based rank of each query's best gold passage, None where it is not within ``depth`` or scores 0.

        A query that is None (nothing parsed) is answered None without asking; equal (query, golds) pairs are asked once.

        Raises:
            ValueError: the lengths differ, a query has no gold, or the server knows no such docid; names the item.
            RetrieverError: no answer within ``max_wait_s``.
        """
        if len(golds) != len(queries):
            raise ValueError(f"{len(golds)} lists of gold docids but {len(queries)} queries")
        pairs = [
            None if query is None else (clean(query), tuple(docids))
            for docids, query in zip(golds, queries, strict=True)
        ]
        first: dict[tuple[str, tuple[str, ...]], int] = {}
        for number, pair in enumerate(pairs):
            if pair is not None:
                if isinstance(golds[number], str) or not pair[1]:
                    raise ValueError(
                        f"item {number} ({short(pair[0])}) needs a list of at least one gold docid, got {golds[number]!r}"
                    )
                first.setdefault(pair, number)
        ranks: dict[int, int | None] = {}
        for chunk in chunks(
            [(number, *pair) for pair, number in first.items()], ITEMS_A_REQUEST, lambda item: len(item[1])
        ):
            ranks |= self._rank_chunk(chunk)
        return [None if pair is None else ranks[first[pair]] for pair in pairs]

    def _rank_chunk(self, chunk: Sequence[tuple[int, str, tuple[str, ...]]]) -> dict[int, int | None]:
        items = [{"id": str(number), "query": query, "gold_docids": docids} for number, query, docids in chunk]
        answer = self._request("POST", "/rank", {"depth": self.depth, "index": self.index, "items": items})
        ranks, errors = answer.get("ranks"), answer.get("errors")
        if not isinstance(ranks, dict) or not isinstance(errors, dict):
            raise self._not_ours("/rank", answer)
        for number, query, _ in chunk:
            if str(number) in errors:
                raise ValueError(f"retriever {self.url}: item {number} ({short(query)}): {errors[str(number)]}")
            rank = ranks.get(str(number), "no answer")
            if rank is not None and (type(rank) is not int or not 1 <= rank <= self.depth):
                raise RetrieverError(
                    f"retriever {self.url} answered {rank!r} where a rank of item {number} from 1 to {self.depth} was asked"
                )
        return {number: ranks[str(number)] for number, _, _ in chunk}

    def search(self, queries: Sequence[str], k: int, contents: bool = False) -> list[list[Hit]]:
        """The best ``k`` passages that score above 0 of each query, best first.

        Raises:
            ValueError: the server refuses the request.
            RetrieverError: no answer within ``max_wait_s``.
        """
        if k < 1:
            raise ValueError(f"k must be at least 1, got {k}")
        most = max(1, min(ITEMS_A_REQUEST, RESULTS_A_REQUEST // (k * (10 if contents else 1))))
        results: list[list[Hit]] = []
        for chunk in chunks([clean(query) for query in queries], most, len):
            request = {"queries": chunk, "k": k, "index": self.index, "contents": contents}
            answer = self._request("POST", "/search", request).get("results")
            if not isinstance(answer, list) or len(answer) != len(chunk):
                raise self._not_ours("/search", answer)
            results += [[Hit(hit["docid"], hit["score"], hit.get("contents")) for hit in hits] for hits in answer]
        return results

    def similarity_gains(
        self,
        outputs: Sequence[str | None],
        questions: Sequence[str],
        positives: Sequence[Sequence[str]],
        golds: Sequence[Sequence[str]],
    ) -> list[float | None]:
        """Mean over the positives d of cos(output, d) - cos(question, d); None, unasked, where the output is None. Texts of ``positives``, or, where a
        question has none, the gold passages.

        Raises:
            ValueError: the lengths differ, the server has no encoder, or it knows no such docid.
            RetrieverError: no answer within ``max_wait_s``.
        """
        items: list[tuple[int, dict[str, Any]]] = []
        for number, (output, question, texts, docids) in enumerate(
            zip(outputs, questions, positives, golds, strict=True)
        ):
            if output is not None:
                near = {"positives": [clean(text) for text in texts]} if texts else {"gold_docids": list(docids)}
                items.append(
                    (number, {"id": str(number), "output": clean(output), "question": clean(question), **near})
                )
        gains: list[float | None] = [None] * len(outputs)
        for chunk in chunks(items, ITEMS_A_REQUEST, lambda item: len(json.dumps(item[1]))):
            answer = self._request("POST", "/similarity", {"index": self.index, "items": [item for _, item in chunk]})
            for number, item in chunk:
                name = item["id"]
                if name in answer.get("errors", {}):
                    raise ValueError(
                        f"retriever {self.url}: item {name} ({short(item['output'])}): {answer['errors'][name]}"
                    )
                if not isinstance(answer.get("gains"), dict) or not isinstance(answer["gains"].get(name), float):
                    raise self._not_ours("/similarity", answer)
                gains[number] = answer["gains"][name]
        return gains

    def health(self) -> dict[str, Any]:
        """What the server says of itself: status, index_id, retriever, passages, version; waits for it as every request does."""
        answer = self._request("GET", "/health", None)
        if answer.get("status") != "ok":
            raise self._not_ours("/health", answer)
        return answer

    def close(self) -> None:
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _before_attempt(self, deadline: float) -> None:
        """A chance to see to the server; raises RetrieverError where it is not to be had before ``deadline`` (time.monotonic)."""

    def _request(self, method: str, path: str, body: Mapping[str, Any] | None) -> dict[str, Any]:
        """Sends a request until it is answered: connection errors, timeouts, 502, 503 and 504 are tried again."""
        start, pause_s, attempts = time.monotonic(), FIRST_PAUSE_S, 0
        deadline = start + self.max_wait_s
        content = None if body is None else json.dumps(body).encode()
        headers = {"content-type": "application/json", "x-client-id": self._id}
        while True:
            asked_s, attempts = 0.0, attempts + 1
            self._before_attempt(deadline)
            try:
                timeout_s = min(self.timeout_s, max(deadline - time.monotonic(), 0.05))
                response = self._http.request(
                    method, self.url + path, content=content, headers=headers, timeout=timeout_s
                )
                if response.status_code not in (502, 503, 504):
                    return self._read(path, response)
                problem, asked_s = f"HTTP status {response.status_code}", _retry_after_s(response)
            except httpx.TransportError as error:
                problem = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
            # on top of what the server asks for: clients that were refused together must not come back together
            wait_s = asked_s + pause_s * self._random.uniform(0.5, 1)
            if time.monotonic() + wait_s >= deadline:
                raise RetrieverError(
                    f"the retriever at {self.url} did not answer {path} for {time.monotonic() - start:.0f} s ({attempts} attempts, limit "
                    f"{self.max_wait_s:g} s; last: {problem}): start one with {START_COMMAND} and run again"
                )
            time.sleep(wait_s)
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)

    def _read(self, path: str, response: httpx.Response) -> dict[str, Any]:
        try:
            answer = response.json()
        except ValueError:
            answer = response.text[:200]
        if 400 <= response.status_code < 500:
            detail = answer.get("detail") if isinstance(answer, dict) else answer
            raise ValueError(f"retriever {self.url} refused {path} with status {response.status_code}: {detail}")
        if response.status_code != 200:
            raise RetrieverError(
                f"retriever {self.url} failed at {path} with status {response.status_code}: see its log for the reason"
            )
        if not isinstance(answer, dict):
            raise self._not_ours(path, answer)
        return answer

    def _not_ours(self, path: str, answer: object) -> RetrieverError:
        return RetrieverError(
            f"{self.url} answers {path} with {str(answer)[:100]!r}, which no retriever server of ours says: check the url"
        )


class EmbeddedRetriever(RetrieverClient):
    """A client with a server of its own: a child process on 127.0.0.1 that is started again whenever it is found dead."""

    def __init__(
        self,
        folder: str,
        depth: int = 100,
        timeout_s: float = 60,
        max_wait_s: float = 300,
        index: str | None = None,
        similarity_model: str | None = None,
    ) -> None:
        """Starts the server of one index folder, and of an encoder for similarities where one is named, and waits until it is ready.

        Raises:
            ValueError: the server refuses the index folder; its own sentence.
            RetrieverError: it does not start.
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
                    status = self._process.returncode
                    print(
                        f"retriever: the embedded server of {self._folder} ended (status {status}): starting it again",
                        file=sys.stderr,
                    )
                    _close_output(self._process)
                self._start(deadline)

    def _start(self, deadline: float) -> None:
        """Starts the server and waits for its ready line; returns with a dead process where a signal ended it meanwhile."""
        command = [
            sys.executable,
            "-m",
            "retriever_server",
            "--index_path",
            self._folder,
            "--port",
            "0",
            "--log_format",
            "text",
            "--exit-with-parent",
            str(self._owner),
            *(["--similarity_model", self._similarity_model] if self._similarity_model else []),
        ]
        root = str(Path(__file__).resolve().parents[2])
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))}
        # a session of its own: Ctrl-C must reach the trainer, which may still need ranks to end its step, and not the server
        process = self._process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment,
            text=True,
            start_new_session=True,
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
        reason = last_lines[-1] if last_lines else "it said nothing"
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


def _close_output(process: "subprocess.Popen[str]") -> None:
    if process.stdout is not None:
        process.stdout.close()


def _keep_lines(process: "subprocess.Popen[str]", last_lines: deque[str]) -> None:
    """Keeps the last lines of the server's standard error, and shows those that it writes while it runs."""
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
    """A client for ``http(s)://HOST:PORT``, or for a server of its own for ``embedded:INDEX_FOLDER``.

    The embedded server runs as a child process on this machine, is started again if it dies, and stops with ``close()`` or
    with this process; ``similarity_model`` is its encoder.
    Where ``url`` is empty, the environment's RETRIEVER_URL is taken.

    Raises:
        ValueError: no url, an unknown scheme, or an index folder that cannot be opened.
        RetrieverError: the embedded server does not start.
    """
    url = url or os.environ.get("RETRIEVER_URL", "")
    if not url:
        raise ValueError(
            f"no retriever: set retriever.url (or RETRIEVER_URL) to http://HOST:PORT of {START_COMMAND} or to embedded:INDEX_FOLDER"
        )
    if url.startswith("embedded:"):
        return EmbeddedRetriever(url.removeprefix("embedded:"), depth, timeout_s, max_wait_s, index, similarity_model)
    if urlsplit(url).scheme not in ("http", "https"):
        raise ValueError(f"retriever url {url!r}: must be http://HOST:PORT, https://HOST:PORT or embedded:INDEX_FOLDER")
    return RetrieverClient(url, depth, timeout_s, max_wait_s, index)


def _retry_after_s(response: httpx.Response) -> float:
    """Seconds of a Retry-After header; 0 where there is none (or a date, which servers of this kind do not send)."""
    value = response.headers.get("retry-after", "")
    return float(value) if value.isdigit() else 0.0
