"""The endpoints over a real socket: answers by item, limits, and /health while searches run."""

import json
import socket
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest
from helpers_retriever import build_bm25, running

from convsearch.pages import listen
from retriever_server.bm25.index import Bm25Index
from retriever_server.searcher import open_indexes
from retriever_server.server import build_parser
from retriever_server.serving.app import create_app
from retriever_server.serving.batching import BatchSettings
from retriever_server.serving.qrels import read_qrels, warn_of_missing
from retriever_server.serving.schemas import Limits

PASSAGES = {"p1": "red apple pie", "p2": "green apple", "p3": "blue sky", "p4": "sky diving from a blue plane"}
QRELS = {"q1": ["p1"], "q2": ["p3", "p4"], "lost": ["p1", "gone"]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("app")
    lines = [json.dumps({"id": docid, "contents": text}) for docid, text in PASSAGES.items()]
    (root / "c.jsonl").write_text("\n".join(lines))
    build_bm25(root / "c.jsonl", root / "main")
    build_bm25(root / "c.jsonl", root / "flat", b=0.0)
    return root


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[httpx.Client]:
    indexes = open_indexes([str(folder / "main"), f"second={folder / 'flat'}"], None, None)
    with running(
        create_app(indexes, QRELS, Limits(request_bytes=20_000, items=50, query_chars=1_000, results=1_000))
    ) as client:
        yield client


def post(server: httpx.Client, path: str, body: Any, status: int = 200) -> Any:
    response = server.post(path, json=body)
    assert response.status_code == status, response.text
    return response.json() if status == 200 else response.json()["detail"]


def test_health(server: httpx.Client, folder: Path) -> None:
    answer = server.get("/health").json()
    first, second = Bm25Index.load(folder / "main"), Bm25Index.load(folder / "flat")
    assert {key: answer[key] for key in ("status", "index_id", "retriever", "passages", "version")} == {
        "status": "ok",
        "index_id": first.index_id,
        "retriever": "bm25",
        "passages": 4,
        "version": "0.1.0",
    }
    assert {name: about["index_id"] for name, about in answer["indexes"].items()} == {
        "main": first.index_id,
        "second": second.index_id,
    }


def test_rank_answers_each_item(server: httpx.Client) -> None:
    items = [
        {"id": "a", "query": "apple", "gold_docids": ["p1"]},
        {"id": "b", "query": "apple", "qid": "q1"},
        {"id": "c", "query": "red", "qid": "q1"},  # one query id, another query, another rank
        {"id": "d", "query": "nothing", "qid": "q1"},
        {"id": "e", "query": "sky", "qid": "q2"},
        {"id": "f", "query": "sky", "gold_docids": ["p4"]},
        {"id": "unknown qid", "query": "sky", "qid": "q99"},
        {"id": "unknown docid", "query": "sky", "gold_docids": ["p3", "p99"]},
        {"id": "unknown docid in qrels", "query": "sky", "qid": "lost"},
        {"id": "both", "query": "sky", "qid": "q1", "gold_docids": ["p1"]},
        {"id": "neither", "query": "sky"},
        {"id": "none", "query": "sky", "gold_docids": []},
    ]
    answer = post(server, "/rank", {"depth": 100, "items": items})
    assert answer["ranks"] == {"a": 2, "b": 2, "c": 1, "d": None, "e": 1, "f": 2}
    assert {key: message.split(":")[0].split(" (")[0] for key, message in answer["errors"].items()} == {
        "unknown qid": "qid 'q99' is not in the server's qrels",
        "unknown docid": f"docid 'p99' is not in the index {answer['index_id']}",
        "unknown docid in qrels": f"docid 'gone' is not in the index {answer['index_id']}",
        "both": "give exactly one of gold_docids and qid",
        "neither": "give exactly one of gold_docids and qid",
        "none": "gold_docids is empty",
    }
    assert post(server, "/rank", {"depth": 1, "items": items[:3]})["ranks"] == {"a": None, "b": None, "c": 1}
    assert post(server, "/rank", {"items": []})["ranks"] == {}
    other = post(server, "/rank", {"index": "second", "items": items[:1]})
    assert (other["ranks"], other["errors"]) == ({"a": 1}, {})  # without length normalisation p1 and p2 tie
    assert other["index_id"] != answer["index_id"]


def test_search(server: httpx.Client, folder: Path) -> None:
    answer = post(server, "/search", {"queries": ["blue sky", "", "apple"], "k": 2, "contents": True})
    assert [[hit["docid"] for hit in hits] for hits in answer["results"]] == [["p3", "p4"], [], ["p2", "p1"]]
    assert answer["results"][0][1]["contents"] == PASSAGES["p4"]
    bare = post(server, "/search", {"queries": ["blue sky"], "k": 9})["results"][0]
    assert [(hit["docid"], hit["score"]) for hit in bare] == Bm25Index.load(folder / "main").search(["blue sky"], 9)[0]
    assert all(set(hit) == {"docid", "score"} for hit in bare)


def test_retrieve_speaks_the_reference_wire(server: httpx.Client) -> None:
    request = {
        "queries": ["apple", "red", "plane", "zebra"],
        "query_ids": ["q1", "q1", "q2", "q1"],
        "topk": 100,
        "return_scores": False,
    }
    assert post(server, "/retrieve", request) == {"result": [2, 1, 1, -1]}
    assert post(server, "/retrieve", request | {"topk": None, "max_length": 1024, "extra": 1}) == {
        "result": [2, 1, 1, -1]
    }
    assert post(server, "/retrieve", request | {"topk": 1})["result"] == [-1, 1, 1, -1]
    ranks, scores = post(server, "/retrieve", request | {"topk": 2, "return_scores": True})["result"]
    hits = post(server, "/search", {"queries": request["queries"], "k": 2})["results"]
    assert (ranks, scores) == ([2, 1, 1, -1], [[hit["score"] for hit in each] for each in hits])
    cut = {"queries": ["red apple", "zebra red"], "query_ids": ["q1", "q1"], "max_length": 1}
    assert post(server, "/retrieve", cut)["result"] == [1, -1]


def test_retrieve_with_an_unknown_query_id_spoils_that_item_alone(server: httpx.Client) -> None:
    answer = post(server, "/retrieve", {"queries": ["red", "red", "sky"], "query_ids": ["q1", "q99", "q2"]})
    assert answer["result"] == [1, -1, 1]
    assert list(answer["errors"]) == ["1"]
    assert "'q99'" in answer["errors"]["1"]
    assert post(server, "/retrieve", {"queries": ["a", "b"], "query_ids": ["q1"]}, 422) == "2 queries but 1 query_ids"


@pytest.mark.parametrize(
    ("path", "body", "status", "message"),
    [
        ("/rank", {"items": [{"id": "a"}]}, 422, "items.0.query: Field required"),
        (
            "/rank",
            {"items": [{"id": "a", "query": "x", "gold": []}]},
            422,
            "items.0.gold: Extra inputs are not permitted",
        ),
        (
            "/rank",
            {"items": [{"id": "a", "query": None, "qid": "q1"}]},
            422,
            "items.0.query: Input should be a valid string",
        ),
        ("/rank", {"items": [], "depth": 0}, 422, "depth: Input should be greater than or equal to 1"),
        ("/rank", {"items": [{"id": "a", "query": "x"}] * 3}, 422, "item id 'a' is given 3 times"),
        (
            "/rank",
            {"items": [{"id": str(i), "query": "x"} for i in range(51)]},
            422,
            "51 queries in one request, the limit is 50",
        ),
        ("/rank", {"items": [{"id": "a", "query": "x" * 1001}]}, 422, "query 0 has 1001 characters, the limit is 1000"),
        ("/rank", {"items": [], "index": "none"}, 404, "there is no index 'none' here: this server has main, second"),
        ("/rank", {"items": [{"id": "a", "query": "x" * 30_000}]}, 413, "bytes, the limit is 20000"),
        ("/search", {"queries": ["x"] * 2, "k": 501}, 422, "2 queries x 501 results, the limit is 1000"),
        ("/search", {"queries": ["x"] * 2, "k": 51, "contents": True}, 422, "the limit is 1000"),
        ("/search", {"queries": "x", "k": 1}, 422, "queries: Input should be a valid list"),
        ("/retrieve", {"queries": ["x"] * 51, "query_ids": ["q1"] * 51}, 422, "51 queries in one request"),
    ],
)
def test_refusals_are_one_clear_sentence(server: httpx.Client, path: str, body: Any, status: int, message: str) -> None:
    detail = post(server, path, body, status)
    assert message in detail
    assert "\n" not in detail


def test_bodies_that_are_no_json_or_too_long_without_saying_so(server: httpx.Client) -> None:
    assert (
        "JSON decode error"
        in server.post("/rank", content=b'{"items": [', headers={"content-type": "application/json"}).json()["detail"]
    )
    assert "'content-type: application/json'" in server.post("/rank", content=b'{"items": []}').json()["detail"]
    response = server.post("/rank", content=(b" " * 1000 for _ in range(500)))  # chunked: no Content-Length
    assert response.status_code == 413
    assert "500000 bytes, the limit is 20000" in response.json()["detail"]
    assert server.get("/health").status_code == 200


def test_query_ids_without_qrels(folder: Path) -> None:
    with running(create_app(open_indexes([str(folder / "main")], None, None))) as client:
        answer = post(
            client,
            "/rank",
            {"items": [{"id": "a", "query": "red", "qid": "q1"}, {"id": "b", "query": "red", "gold_docids": ["p1"]}]},
        )
    assert answer["ranks"] == {"b": 1}
    assert "started without --trec_path" in answer["errors"]["a"]


class Slow:
    """A searcher that answers when it is let go."""

    name, index_id, num_passages = "slow", "slow-1", 1

    def __init__(self) -> None:
        self.begun, self.go = threading.Event(), threading.Event()

    def gold_ranks(self, queries: Sequence[str], golds: Sequence[Sequence[str]], depth: int) -> list[int | None]:
        self.begun.set()
        assert self.go.wait(10)
        return [1] * len(queries)

    def search(self, queries: Sequence[str], k: int) -> list[list[tuple[str, float]]]:
        raise NotImplementedError

    def contents(self, docids: Sequence[str]) -> list[str]:
        raise NotImplementedError

    def missing(self, docids: Sequence[str]) -> list[str]:
        return []


def test_health_answers_while_every_search_thread_is_busy() -> None:
    slow = Slow()
    with running(create_app({"slow": slow}, settings=BatchSettings(threads=1))) as client:
        answers: list[Any] = []
        body = {"items": [{"id": "a", "query": "x", "gold_docids": ["d"]}]}
        threads = [threading.Thread(target=lambda: answers.append(post(client, "/rank", body))) for _ in range(3)]
        for thread in threads:
            thread.start()
        assert slow.begun.wait(10)
        assert client.get("/health", timeout=5).json()["status"] == "ok"
        assert not answers
        slow.go.set()
        for thread in threads:
            thread.join()
    assert [answer["ranks"] for answer in answers] == [{"a": 1}] * 3


def test_the_reference_servers_flags_are_accepted() -> None:
    sparse = "--index_path embedding/bm25 --trec_path data/topiocqa/train.trec --retriever_name bm25 --port 1"
    args = build_parser().parse_args([*sparse.split(), "--bm25_k1", "0.9", "--bm25_b", "0.4"])
    assert (args.index_path, args.port, args.bm25_k1, args.bm25_b, args.host) == (
        ["embedding/bm25"],
        1,
        0.9,
        0.4,
        "127.0.0.1",
    )
    dense = "--index_path a.pkl --trec_path b --corpus_docid_path c.pkl --retriever_name ance --model_name_or_path d"
    more = "--faiss_gpu --n_gpu 4 --port 2 --max_length 512 --retrieval_batch_size 64"
    assert build_parser().parse_args([*dense.split(), *more.split()]).n_gpu == 4


def test_opening_indexes(folder: Path) -> None:
    main = str(folder / "main")
    assert list(open_indexes([main, f"x={main}"], 0.9, 0.4)) == ["main", "x"]
    with pytest.raises(ValueError, match=r"--bm25_k1 0.82, but .*main was built with k1 0.9"):
        open_indexes([main], 0.82, None)
    with pytest.raises(ValueError, match="two indexes are called 'main'"):
        open_indexes([main, main], None, None)


def test_sparse_and_dense_in_one_server(folder: Path, tmp_path: Path) -> None:
    import helpers_encoders

    from retriever_server.dense import build as dense_build

    helpers_encoders.build_ance(tmp_path / "model")
    settings = dense_build.Settings(max_length=16, device="cpu", progress=False)
    assert dense_build.build([folder / "c.jsonl"], tmp_path / "dense", str(tmp_path / "model"), settings)
    main, dense = str(folder / "main"), str(tmp_path / "dense")
    options = {"model_name_or_path": str(tmp_path / "model"), "max_length": 8, "batch_size": 2}
    indexes = open_indexes([dense, main], 0.9, 0.4, "ance", options)
    with running(create_app(indexes)) as client:
        found = client.post("/search", json={"queries": ["blue sky"], "k": 2, "index": "dense"}).json()["results"][0]
        assert [hit["docid"] for hit in found] == [docid for docid, _ in indexes["dense"].search(["blue sky"], 2)[0]]
        item = {"id": "1", "query": "blue sky", "gold_docids": [found[1]["docid"]]}
        assert client.post("/rank", json={"items": [item], "index": "dense"}).json()["ranks"] == {"1": 2}
        assert client.get("/health").json()["indexes"]["main"]["retriever"] == "bm25"
    with pytest.raises(ValueError, match=r"--retriever_name ance, but .*main is an index of bm25: leave the flag out"):
        open_indexes([main, dense], None, None, "ance", options)
    with pytest.raises(ValueError, match="--bm25_k1 and --bm25_b are given, but no index here is of bm25"):
        open_indexes([dense], 0.9, None, None, options)


def test_qrels(tmp_path: Path, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "a.trec").write_text("q1 0 p1 1\nq1 0 p2 2\nq1\t0\tp3\t0\n\nq2 0 zz 1\n")
    (tmp_path / "b.trec").write_text("q3 0 p4 1")
    qrels = read_qrels([tmp_path / "a.trec", tmp_path / "b.trec"])
    assert qrels == {"q1": ["p1", "p2"], "q2": ["zz"], "q3": ["p4"]}
    warn_of_missing(qrels, Bm25Index.load(folder / "main"))
    assert "1 gold docids of --trec_path, for example 'zz', are not in the index" in caplog.text
    (tmp_path / "b.trec").write_text("q3 0 p4 1\nq3 p4 1")
    with pytest.raises(ValueError, match=r"b\.trec:2: expected 'qid 0 docid relevance', got 'q3 p4 1'"):
        read_qrels([tmp_path / "b.trec"])
    with pytest.raises(ValueError, match="there is no qrels file"):
        read_qrels([tmp_path / "c.trec"])


def test_listening() -> None:
    with listen("127.0.0.1", 0) as taken:
        assert taken.proto == socket.IPPROTO_TCP  # else asyncio leaves Nagle's algorithm on: 40 ms a request
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=f"cannot listen on 127.0.0.1 port {port} .*choose another --port"):
            listen("127.0.0.1", port)
    with pytest.raises(ValueError, match="cannot listen"):
        listen("127.0.0.1", 70000)
