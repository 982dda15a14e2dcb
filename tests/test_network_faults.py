"""The client through a proxy that breaks the connection: a right rank or an error, never an invented one."""

import random
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from helpers_retriever import build_bm25
from test_retriever_process import GOLDS, PASSAGES, QUERIES, ROOT, started  # noqa: F401 (a server process)

from convsearch.files import write_jsonl
from convsearch.retriever.client import RetrieverClient, RetrieverError
from retriever_server.bm25.index import Bm25Index

Fault = Callable[[bytes], list[bytes]]  # a reply -> the pieces that are sent; the connection closes if the last is b""


def flip(reply: bytes) -> list[bytes]:
    """One digit of the body becomes a letter."""
    head, _, body = reply.partition(b"\r\n\r\n")
    digits = [number for number, byte in enumerate(body) if chr(byte).isdigit()]
    at = random.choice(digits)
    return [head + b"\r\n\r\n" + body[:at] + b"x" + body[at + 1 :]]


FAULTS: dict[str, Fault] = {
    "down": lambda reply: [b""],
    "half closed": lambda reply: [reply[: len(reply) // 2], b""],
    "header alone": lambda reply: [reply.partition(b"\r\n\r\n")[0] + b"\r\n\r\n", b""],
    "in small pieces": lambda reply: [reply[start : start + 7] for start in range(0, len(reply), 7)],
    "garbage": lambda reply: [b"\x00\xff not HTTP at all\r\n\r\n", b""],
    "another status": lambda reply: [b"HTTP/1.1 502 Bad Gateway\r\ncontent-length: 0\r\n\r\n"],
    "twice": lambda reply: [reply, reply],
    "no JSON": lambda reply: [b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\n<html"],
    "a flipped digit": flip,
}


class Proxy:
    """Forwards to a server; ``fault`` changes the replies, ``stale`` answers with the reply before."""

    def __init__(self, target: str) -> None:
        parts = urlsplit(target)
        self.target = (parts.hostname, parts.port)
        self.fault: Fault | None = None
        self.stale, self.last = False, b""
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"

    def serve(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self.listener.accept()
                threading.Thread(target=self.forward, args=(client,), daemon=True).start()

    def forward(self, client: socket.socket) -> None:
        with client, socket.create_connection(self.target) as server, suppress(OSError):
            while request := message(client):
                server.sendall(request)
                reply = message(server)
                sent, self.last = (self.last if self.stale and self.last else reply), reply
                for piece in self.fault(sent) if self.fault else [sent]:
                    if not piece:
                        return
                    client.sendall(piece)


def message(source: socket.socket) -> bytes:
    """One request or reply with its body; empty at the end of the connection."""
    data = b""
    while b"\r\n\r\n" not in data:
        if not (more := source.recv(65536)):
            return b""
        data += more
    head, _, body = data.partition(b"\r\n\r\n")
    lengths = [int(line.split(b":")[1]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length")]
    while lengths and len(body) < lengths[0]:
        body += source.recv(65536)
    return head + b"\r\n\r\n" + body


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("network")
    write_jsonl(root / "c.jsonl", [{"id": docid, "contents": text} for docid, text in PASSAGES.items()])
    write_jsonl(root / "other.jsonl", [{"id": docid, "contents": f"{text} more"} for docid, text in PASSAGES.items()])
    build_bm25(root / "c.jsonl", root / "index")
    build_bm25(root / "other.jsonl", root / "other")
    return root


@contextmanager
def proxied(index: Path) -> Iterator[tuple[Proxy, RetrieverClient]]:
    with started("-m", "retriever_server", "--index_path", str(index), "--port", "0") as (_, ready):
        proxy = Proxy(ready.split()[1])
        threading.Thread(target=proxy.serve, daemon=True).start()
        with proxy.listener, asking(proxy) as client:
            yield proxy, client


def asking(proxy: Proxy) -> RetrieverClient:
    return RetrieverClient(proxy.url, depth=20, timeout_s=0.5, max_wait_s=1)


@pytest.mark.slow
def test_no_fault_of_the_network_invents_a_rank(folder: Path) -> None:
    expected = Bm25Index.load(folder / "index").gold_ranks(QUERIES, GOLDS, 20)
    random.seed(3)
    outcomes: dict[str, set[str]] = {}
    with proxied(folder / "index") as (proxy, _):
        for name, fault in FAULTS.items():
            with asking(proxy) as client:
                for _ in range(3):
                    proxy.fault = fault
                    try:
                        assert client.gold_ranks(GOLDS, QUERIES) == expected, name
                        outcomes.setdefault(name, set()).add("right")
                    except RetrieverError:
                        outcomes.setdefault(name, set()).add("error")
            proxy.fault = None
            with asking(proxy) as client:
                assert client.gold_ranks(GOLDS, QUERIES) == expected, name
    assert outcomes.pop("in small pieces") == {"right"}
    assert outcomes.pop("twice") == {"right", "error"}  # the second reply fits no other request
    assert all(found == {"error"} for found in outcomes.values()), outcomes


def test_a_reply_to_another_request_is_no_rank(folder: Path) -> None:
    with proxied(folder / "index") as (proxy, client):
        client.gold_ranks(GOLDS, QUERIES)
        proxy.stale = True
        with pytest.raises(RetrieverError, match="answered 'no answer' for item 0"):
            client.gold_ranks(GOLDS[::-1], QUERIES[::-1])


def test_another_index_behind_the_same_address_ends_in_a_sentence(folder: Path) -> None:
    with proxied(folder / "index") as (proxy, client):
        client.gold_ranks(GOLDS, QUERIES)
        with started("-m", "retriever_server", "--index_path", str(folder / "other"), "--port", "0") as (_, ready):
            parts = urlsplit(ready.split()[1])
            proxy.target = (parts.hostname, parts.port)
            client._http.close()
            client._http = type(client._http)(trust_env=False)  # connections end with a server
            with pytest.raises(RetrieverError, match=r"was the index bm25-\w+ and is bm25-\w+ now"):
                client.gold_ranks(GOLDS, QUERIES)
