"""The server under load, over real sockets: overload, clients that hang up, metrics, request ids, the cache, fused
indexes."""

import json
import logging
import socket
import threading
from typing import Any

import httpx
import pytest
from helpers_retriever import Lengths, body, running, until

from convsearch.retriever import client as retriever
from convsearch.retriever.client import RetrieverClient
from retriever_server.serving.app import create_app
from retriever_server.serving.batching import BatchSettings
from retriever_server.serving.rank_cache import RankCache
from retriever_server.serving.schemas import Limits
from retriever_server.serving.telemetry import JsonLines, TextLines


def raw_post(client: httpx.Client, path: str, content: Any) -> socket.socket:
    """A request on a connection of its own whose answer nobody has read yet."""
    data = json.dumps(content).encode()
    connection = socket.create_connection((client.base_url.host, client.base_url.port or 0))
    connection.sendall(
        f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n".encode()
        + f"content-length: {len(data)}\r\n\r\n".encode()
        + data
    )
    return connection


def received(connection: socket.socket) -> bytes:
    """The answer, whose head and body may come apart."""
    answer = b""
    while not answer.endswith(b"}"):
        part = connection.recv(65536)
        assert part, answer
        answer += part
    connection.close()
    return answer


def overload(monkeypatch: pytest.MonkeyPatch, clients: int, requests: int) -> int:
    """So many clients against a server with room for two requests; checks all ranks and returns how many 503 there
    were."""
    refusals: list[float] = []

    def counted(response: httpx.Response) -> float:
        refusals.append(original(response))
        return (
            0.0 if clients < 64 else refusals[-1]
        )  # the small test does not sit out the second that the server asks for

    original = retriever._retry_after_s
    monkeypatch.setattr(retriever, "_retry_after_s", counted)
    searcher, wrong = Lengths(), []
    searcher.pause_s = 0.005
    queries = ["x" * length for length in range(1, 9)]
    app = create_app(
        {"x": searcher}, limits=Limits(items=8), settings=BatchSettings(threads=1, max_batch=4, max_queue=16)
    )

    def work(url: str, number: int) -> None:
        with RetrieverClient(url, depth=100, max_wait_s=240) as client:
            for _ in range(requests):
                mine = [query + "y" * number for query in queries]
                if (ranks := client.gold_ranks([["a"]] * 8, mine)) != [
                    length if (length := len(query)) <= 100 else None for query in mine
                ]:
                    wrong.append((number, ranks))

    with running(app) as client:
        threads = [threading.Thread(target=work, args=(str(client.base_url), number)) for number in range(clients)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        until(lambda: app.state.service.batcher.admitted == 0)
    assert wrong == []
    assert len(searcher.seen) == clients * requests * 8
    assert all(seconds >= 1 for seconds in refusals)
    return len(refusals)


def test_clients_of_an_overloaded_server_end_with_the_right_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    assert overload(monkeypatch, clients=6, requests=2) > 0


@pytest.mark.slow
def test_sixty_four_clients_of_an_overloaded_server(monkeypatch: pytest.MonkeyPatch) -> None:
    assert overload(monkeypatch, clients=64, requests=3) > 64


def test_a_refusal_says_when_to_come_back() -> None:
    searcher = Lengths()
    searcher.gate.clear()
    app = create_app({"x": searcher}, limits=Limits(items=2), settings=BatchSettings(threads=1, max_queue=3))
    with running(app) as client:
        first = raw_post(client, "/rank", body("xx", "x"))
        until(lambda: app.state.service.batcher.admitted == 2)
        for path, content in (("/rank", body("x", "y")), ("/search", {"queries": ["x", "y"], "k": 1})):
            answer = client.post(path, json=content)
            assert answer.status_code == 503
            assert answer.headers["retry-after"] == "1"
            assert answer.json()["detail"].startswith(
                "the server is busy: 2 items are waiting and 2 more were sent, the limit is 3"
            )
        searcher.gate.set()
        assert b'"ranks":{"0":2,"1":1}' in received(first)
        assert client.post("/rank", json=body("xyz", "x")).json()["ranks"] == {"0": 3, "1": 1}


def test_a_client_that_hangs_up_frees_its_place() -> None:
    searcher = Lengths()
    searcher.gate.clear()
    app = create_app({"x": searcher}, settings=BatchSettings(threads=1, max_batch=1))
    batcher = app.state.service.batcher
    with running(app) as client:
        first = raw_post(client, "/rank", body("first"))
        assert searcher.begun.wait(10)
        second = raw_post(client, "/rank", body("gone", "gone too"))
        until(lambda: batcher.waiting == 2)
        second.close()
        until(lambda: batcher.waiting == 0)
        assert batcher.admitted == 1
        searcher.gate.set()
        assert b'"ranks":{"0":5}' in received(first)
        assert client.post("/rank", json=body("last")).json()["ranks"] == {"0": 4}
        assert "retriever_cancelled_items_total 2.0" in client.get("/metrics").text
    assert searcher.seen == ["first", "last"]


def test_faults_of_the_searcher(caplog: pytest.LogCaptureFixture) -> None:
    with running(create_app({"x": Lengths()})) as client:
        answer = client.post("/rank", json=body("one", "refuse", "three")).json()
        assert (answer["ranks"], answer["errors"]) == ({"0": 3, "2": 5}, {"1": "this query is refused"})
        answer = client.post("/search", json={"queries": ["one", "refuse"], "k": 1, "contents": True}).json()
        assert answer["results"] == [[{"docid": "a", "score": 1.0, "contents": "text of a"}], []]
        assert answer["errors"] == {"1": "this query is refused"}
        crashed = client.post("/rank", json=body("crash"), headers={"x-request-id": "step-7.a"})
        assert crashed.status_code == 500
        assert crashed.json() == {"detail": "the server failed at request step-7.a: see its log"}
        assert client.post("/rank", json=body("one")).status_code == 200
    failures = [
        record for record in caplog.records if record.name == "retriever_server" and record.levelno == logging.ERROR
    ]
    assert [record.fields["request_id"] for record in failures] == ["step-7.a"]  # type: ignore[attr-defined]
    assert "MemoryError: no memory" in caplog.text


def test_request_ids_are_echoed_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "retriever_server"), running(create_app({"x": Lengths()})) as client:
        assert (
            client.post("/rank", json=body("q", "r"), headers={"x-request-id": "abc-1"}).headers["x-request-id"]
            == "abc-1"
        )
        made = client.post(
            "/rank", json={"items": 1}, headers={"x-request-id": "no good\u00e9".encode("latin-1")}
        ).headers["x-request-id"]
        assert len(made) == 32
        client.get("/health")
    lines = [json.loads(JsonLines().format(record)) for record in caplog.records if record.getMessage() == "request"]
    assert [(line["request_id"], line["path"], line["status"], line["items"]) for line in lines] == [
        ("abc-1", "/rank", 200, 2),
        (made, "/rank", 422, 0),
    ]
    assert all(line["ms"] >= 0 and line["client"] == "127.0.0.1" and line["level"] == "info" for line in lines)


def test_log_lines() -> None:
    record = logging.LogRecord("retriever_server", logging.WARNING, "", 0, "bad\nthing %s", ("\ud800",), None)
    record.fields = {"items": 3}
    line = JsonLines().format(record)
    assert "\n" not in line
    assert {key: value for key, value in json.loads(line).items() if key != "time"} == {
        "level": "warning",
        "logger": "retriever_server",
        "message": "bad\nthing \ud800",
        "items": 3,
    }
    assert TextLines().format(record) == "retriever_server: warning: bad\nthing \ud800 items=3"


def test_metrics(tmp_path: Any) -> None:
    from prometheus_client import parser

    app = create_app({"x": Lengths()}, limits=Limits(items=5), cache=RankCache(tmp_path))
    with running(app) as client:
        client.post("/rank", json=body("one", "two"))
        app.state.service._helpers.submit(int).result()  # the cache is written behind the answer
        client.post("/rank", json=body("one", "three"))
        client.post("/search", json={"queries": ["q"], "k": 3})
        client.post("/rank", json=body(*"abcdef"))
        client.get("/nothing")
        page = client.get("/metrics")
    assert page.headers["content-type"].startswith("text/plain; version=0.0.4")
    found = {
        (s.name, *sorted(s.labels.values())): s.value
        for family in parser.text_string_to_metric_families(page.text)
        for s in family.samples
    }
    expected = {
        ("retriever_requests_total", "/rank", "200"): 2,
        ("retriever_requests_total", "/rank", "422"): 1,
        ("retriever_requests_total", "/search", "200"): 1,
        ("retriever_requests_total", "404", "other"): 1,
        ("retriever_items_total", "lengths-1", "rank"): 3,
        ("retriever_items_total", "lengths-1", "search"): 1,
        ("retriever_batch_items_count", "rank"): 2,
        ("retriever_batch_items_bucket", "1.0", "rank"): 1,
        ("retriever_batch_items_bucket", "2.0", "rank"): 2,
        ("retriever_phase_seconds_count", "queue"): 3,
        ("retriever_phase_seconds_count", "search"): 3,
        ("retriever_cache_total", "hit"): 1,
        ("retriever_cache_total", "miss"): 3,
        ("retriever_queue_items",): 0,
        ("retriever_admitted_items",): 0,
        ("retriever_cancelled_items_total",): 0,
    }
    assert {key: found.get(key) for key in expected} == expected
    assert found[("process_resident_memory_bytes",)] > 0


def test_the_cache_answers_after_a_restart(tmp_path: Any) -> None:
    first = Lengths()
    with running(create_app({"x": first}, cache=RankCache(tmp_path))) as client:
        expected = client.post("/rank", json=body("one", "", "three", "x" * 200)).json()
        assert expected["ranks"] == {"0": 3, "1": None, "2": 5, "3": None}
    second = Lengths()
    with running(create_app({"x": second}, cache=RankCache(tmp_path))) as client:
        assert client.post("/rank", json=body("one", "", "three", "x" * 200)).json() == expected
        assert second.seen == []
        mixed = client.post("/rank", json=body("seven77", "one", "refuse")).json()
        assert (mixed["ranks"], list(mixed["errors"])) == ({"0": 7, "1": 3}, ["2"])
        assert client.post("/rank", json=body("one", depth=2)).json()["ranks"] == {
            "0": None
        }  # another depth, another key
    assert set(second.seen) == {"seven77", "refuse", "one"}


def test_fused_searches() -> None:
    indexes = {"bm25": Lengths("bm25", "abc"), "ance": Lengths("ance", "cd"), "a+b": Lengths("odd", "z")}
    with running(create_app(indexes, limits=Limits(results=10_000))) as client:

        def search(**request: Any) -> Any:
            return client.post("/search", json={"queries": ["q"], "k": 3} | request).json()

        answer = search(index="bm25+ance")
        assert answer["index_id"] == "rrf60(bm25-1+ance-1)"
        assert [(hit["docid"], hit["score"]) for hit in answer["results"][0]] == [
            ("c", 1 / 63 + 1 / 61),
            ("a", 1 / 61),
            ("b", 1 / 62),
        ]
        assert search(indexes=["bm25", "ance"]) == answer
        assert search(indexes=["ance", "bm25"], rrf_k=1, k=2)["results"] == [
            [{"docid": "c", "score": 0.75}, {"docid": "a", "score": 0.5}]
        ]
        assert search(indexes=["ance"])["index_id"] == "ance-1"
        assert search(index="a+b")["index_id"] == "odd-1"  # an index's own name goes first
        items = [{"id": docid, "query": "q", "gold_docids": [docid]} for docid in "abcdx"]
        ranks = client.post("/rank", json={"items": items, "index": "bm25+ance", "depth": 3}).json()
        assert ranks["ranks"] == {"c": 1, "a": 2, "b": 3, "d": None}
        assert ranks["errors"] == {"x": "docid 'x' is not in the index rrf60(bm25-1+ance-1)"}
        for request, status, message in (
            ({"index": "bm25+none"}, 404, "there is no index 'none' here: this server has bm25, ance, a+b"),
            ({"index": "bm25+bm25"}, 422, "index 'bm25' is named twice"),
            ({"indexes": []}, 422, "indexes: List should have at least 1 item"),
            ({"indexes": ["bm25"], "index": "bm25"}, 422, "give index or indexes, not both"),
            ({"index": "\ud800"}, 404, "there is no index '\\ud800' here"),
        ):
            refused = client.post(
                "/search",
                content=json.dumps({"queries": ["q"], "k": 3} | request),
                headers={"content-type": "application/json"},
            )
            assert (refused.status_code, message in refused.json()["detail"]) == (status, True), refused.text
        many = {"items": items, "index": "bm25+ance", "depth": 5000}
        assert "5 queries x 5000 results" in client.post("/rank", json=many).json()["detail"]


def test_the_openapi_page_names_every_answer() -> None:
    paths = create_app({"x": Lengths()}).openapi()["paths"]
    statuses = {path: sorted(next(iter(methods.values()))["responses"]) for path, methods in paths.items()}
    posted = ["200", "413", "422", "500", "503"]
    assert statuses == {
        "/rank": ["200", "404", *posted[1:]],
        "/search": ["200", "404", *posted[1:]],
        "/missing": ["200", "404", *posted[1:]],
        "/similarity": ["200", "404", *posted[1:]],
        "/retrieve": posted,
        "/health": ["200", "503"],
        "/metrics": ["200"],
    }
    for methods in paths.values():
        for status, answer in next(iter(methods.values()))["responses"].items():
            if status != "200":
                assert answer["content"]["application/json"]["schema"] == {"$ref": "#/components/schemas/Refusal"}
