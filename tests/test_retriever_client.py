"""The client against servers that fail: what is repeated, what is refused, and that absence is never a rank."""

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from convsearch.cli import Unavailable
from convsearch.retriever import client as retriever
from convsearch.retriever.client import Hit, RetrieverClient, RetrieverError
from convsearch.retriever.embedded import open_retriever

Answer = tuple[int, dict[str, str], bytes] | None  # None: the connection is closed without an answer
Script = Callable[[str, Any], Answer]


@contextmanager
def scripted(script: Script) -> Iterator[tuple[str, list[tuple[str, Any]]]]:
    """A server that answers what ``script(path, body)`` says; yields its url and the requests that it has had."""
    seen: list[tuple[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers.get("content-length", 0))) or b"null")
            seen.append((self.path, body))
            answer = script(self.path, body)
            if answer is None:
                self.close_connection = True
                return
            status, headers, content = answer
            self.send_response(status)
            for key, value in ({"content-length": str(len(content))} | headers).items():
                self.send_header(key, value)
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", seen
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def ok(answer: Any) -> Answer:
    return 200, {"content-type": "application/json"}, json.dumps(answer).encode()


def length_ranks(_: str, body: Any) -> Answer:
    """Each item's rank is its query's length; None for those that ask for it."""
    ranks = {item["id"]: None if item["query"] == "none" else len(item["query"]) for item in body["items"]}
    return ok({"index_id": "x", "ranks": ranks, "errors": {}})


def test_ranks_in_order_none_unasked_and_pairs_asked_once() -> None:
    with scripted(length_ranks) as (url, seen), RetrieverClient(url, depth=50, index="wiki") as client:
        golds = [["a"], ["a"], ["a"], ["b", "c"], ["a"], ("b", "c")]
        assert client.gold_ranks(golds, ["xy", None, "none", "xy", "xy", "xy"]) == [2, None, None, 2, 2, 2]
        assert client.gold_ranks([["a"], []], [None, None]) == [None, None]
        assert client.gold_ranks([], []) == []
    assert seen == [
        (
            "/rank",
            {
                "depth": 50,
                "index": "wiki",
                "items": [
                    {"id": "0-0", "query": "xy", "gold_docids": ["a"]},
                    {"id": "0-2", "query": "none", "gold_docids": ["a"]},
                    {"id": "0-3", "query": "xy", "gold_docids": ["b", "c"]},
                ],
            },
        )
    ]


def test_long_requests_are_sent_in_parts() -> None:
    queries = [f"{number:04}" + "x" * (number % 90) for number in range(1200)]
    with scripted(length_ranks) as (url, seen), RetrieverClient(url) as client:
        assert client.gold_ranks([["a"]] * 1200, queries) == [4 + number % 90 for number in range(1200)]
        assert [len(body["items"]) for _, body in seen] == [512, 512, 176]
        seen.clear()
        with pytest.raises(RetrieverError, match="answered 900000 for item 0"):
            client.gold_ranks([["a"]] * 3, [letter * 900_000 for letter in "abc"])
        assert [len(body["items"]) for _, body in seen] == [2]


def test_search_results() -> None:
    def script(path: str, body: Any) -> Answer:
        hits = [
            {"docid": query, "score": 1.5} | ({"contents": "text"} if body["contents"] else {})
            for query in body["queries"]
        ]
        return ok({"index_id": "x", "results": [[hit] for hit in hits]})

    with scripted(script) as (url, seen), RetrieverClient(url) as client:
        assert client.search(["a", "b\ud800"], 3) == [[Hit("a", 1.5)], [Hit("b?", 1.5)]]
        assert client.search(["a"] * 11, 1000, contents=True) == [[Hit("a", 1.5, "text")]] * 11
        assert [len(body["queries"]) for _, body in seen] == [2, 5, 5, 1]
        with pytest.raises(ValueError, match="k must be at least 1"):
            client.search(["a"], 0)


def test_passing_failures_are_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retriever, "FIRST_PAUSE_S", 0.02)
    failures: list[Answer] = [
        (503, {"retry-after": "1"}, b""),
        None,
        (502, {}, b"<html>"),
        (504, {}, b""),
        (200, {"content-length": "99", "connection": "close"}, b"cut"),
    ]
    times: list[float] = []

    def script(path: str, body: Any) -> Answer:
        times.append(time.monotonic())
        if failures:
            return failures.pop(0)
        return length_ranks(path, body)

    with scripted(script) as (url, seen), RetrieverClient(url, timeout_s=5, max_wait_s=60) as client:
        assert client.gold_ranks([["a"]], ["xyz"]) == [3]
    assert len(seen) == 6
    assert all(request == seen[0] for request in seen)
    assert times[1] - times[0] >= 1  # Retry-After, against a first pause of at most 0.02 s


@pytest.mark.parametrize("kind", ["refused", "hangs", "busy", "closes"])
def test_a_server_that_stays_away_is_an_error_within_the_limit(kind: str) -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as silent,
        scripted(lambda *_: (503, {}, b"") if kind == "busy" else None) as (scripted_url, _),
    ):
        port = silent.getsockname()[1]
        if kind == "refused":
            silent.close()
        url = f"http://127.0.0.1:{port}" if kind in ("refused", "hangs") else scripted_url
        start = time.monotonic()
        with RetrieverClient(url, timeout_s=30, max_wait_s=0.4) as client, pytest.raises(RetrieverError) as raised:
            client.gold_ranks([["a"]], ["xyz"])
        assert time.monotonic() - start < 5
    message = str(raised.value)
    assert isinstance(raised.value, Unavailable)
    assert url in message
    assert "limit 0.4 s" in message
    assert "python -m retriever_server" in message
    assert {"refused": "ConnectError", "hangs": "ReadTimeout", "busy": "status 503", "closes": "RemoteProtocolError"}[
        kind
    ] in message


def test_a_long_retry_after_ends_the_waiting_at_once() -> None:
    start = time.monotonic()
    scripted_server = scripted(lambda *_: (503, {"retry-after": "3600"}, b""))
    with (
        scripted_server as (url, _),
        RetrieverClient(url, max_wait_s=60) as client,
        pytest.raises(RetrieverError, match="status 503"),
    ):
        client.health()
    assert time.monotonic() - start < 5


@pytest.mark.parametrize(
    ("answer", "error", "message"),
    [
        (
            (422, {}, b'{"detail": "query 0 has 9 characters, the limit is 5"}'),
            ValueError,
            "with status 422: query 0 has 9 characters",
        ),
        ((404, {}, b"Not Found"), ValueError, "refused /rank with status 404: Not Found"),
        ((413, {}, b'{"detail": "too large"}'), ValueError, "413: too large"),
        ((500, {}, b"Internal Server Error"), RetrieverError, "failed at /rank with status 500"),
        ((307, {"location": "http://x"}, b""), RetrieverError, "with status 307"),
        (
            ok({"ranks": {}, "errors": {"0-1": "docid 'zz' is not in the index"}}),
            ValueError,
            r"item 1 \('xyz'\): docid 'zz' is not in the index",
        ),
        (
            ok({"ranks": {}, "errors": {}}),
            RetrieverError,
            "answered 'no answer' for item 1: expected a rank from 1 to 100",
        ),
        (ok({"ranks": {"0-1": 0}, "errors": {}}), RetrieverError, "answered 0 for item"),
        (ok({"ranks": {"0-1": 101}, "errors": {}}), RetrieverError, "answered 101 for item"),
        (ok({"ranks": {"0-1": "1"}, "errors": {}}), RetrieverError, "answered '1' for item"),
        (ok({"result": [1]}), RetrieverError, "not an answer of our retriever server"),
        (ok([1]), RetrieverError, "not an answer of our retriever server"),
        ((200, {}, b"<html>It works!</html>"), RetrieverError, "It works.*check the url"),
    ],
)
def test_answers_that_are_not_repeated(answer: Answer, error: type[Exception], message: str) -> None:
    with scripted(lambda *_: answer) as (url, seen), RetrieverClient(url) as client:
        with pytest.raises(error, match=message) as raised:
            client.gold_ranks([["a"], ["zz"]], [None, "xyz"])
        assert type(raised.value) is error
        assert len(seen) == 1


def test_health_and_search_of_something_else() -> None:
    with scripted(lambda *_: ok({"status": "starting"})) as (url, _), RetrieverClient(url) as client:
        with pytest.raises(RetrieverError, match="answers /health with"):
            client.health()
        with pytest.raises(RetrieverError, match="answers /search with"):
            client.search(["a"], 1)


def test_items_without_golds() -> None:
    with RetrieverClient("http://127.0.0.1:1") as client:
        for golds in ([], "d1"):
            with pytest.raises(ValueError, match=r"item 1 \('q'\) needs a list of at least one gold docid"):
                client.gold_ranks([["a"], golds], [None, "q"])
        with pytest.raises(ValueError, match="1 lists of gold docids but 2 queries"):
            client.gold_ranks([["a"]], ["q", "r"])


@pytest.mark.parametrize("url", ["ftp://host:1", "localhost:8000", "outputs/demo/bm25", "http://", "http://host:99999"])
def test_urls_of_another_kind(url: str) -> None:
    with pytest.raises(ValueError):
        open_retriever(url)


def test_the_environment_names_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RETRIEVER_URL", raising=False)
    for url in ("", None):
        with pytest.raises(ValueError, match=r"set retriever.url \(or RETRIEVER_URL\)"):
            open_retriever(url)
    monkeypatch.setenv("RETRIEVER_URL", "http://127.0.0.1:7/")
    with open_retriever("", depth=7, timeout_s=1, max_wait_s=2, index="i") as client:
        assert (client.url, client.depth, client.timeout_s, client.max_wait_s, client.index) == (
            "http://127.0.0.1:7",
            7,
            1,
            2,
            "i",
        )
    with pytest.raises(ValueError, match="must be positive"):
        RetrieverClient("http://127.0.0.1:7", depth=0)
