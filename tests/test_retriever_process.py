"""Real server processes over real sockets: killed, terminated, orphaned, misled."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from helpers_retriever import build_bm25

from convsearch.retriever.client import RetrieverError
from convsearch.retriever.embedded import EmbeddedRetriever, open_retriever
from retriever_server.bm25.index import Bm25Index

ROOT = Path(__file__).resolve().parents[1]
PASSAGES = {f"p{number}": f"word{number % 7} word{number % 5} word{number % 3}" for number in range(60)}
QUERIES = [f"word{number % 7} word{number % 4}" for number in range(40)]
GOLDS = [[f"p{number}"] for number in range(40)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("process")
    (root / "c.jsonl").write_text(
        "\n".join(json.dumps({"id": docid, "contents": text}) for docid, text in PASSAGES.items())
    )
    build_bm25(root / "c.jsonl", root / "index")
    return root / "index"


@contextmanager
def started(*command: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A process and its first line of output; killed at the end."""
    process = subprocess.Popen([sys.executable, *command], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        yield process, process.stdout.readline()
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def gone(pid: int, within_s: float) -> bool:
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        try:
            os.kill(pid, 0)
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except (ProcessLookupError, FileNotFoundError):
            return True
        time.sleep(0.05)
    return False


@pytest.mark.slow
def test_a_killed_embedded_server_only_delays(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    expected = Bm25Index.load(folder).gold_ranks(QUERIES, GOLDS, 20)
    assert 0 < expected.count(None) < 40
    with open_retriever(f"embedded:{folder}", depth=20, max_wait_s=60) as client:
        assert isinstance(client, EmbeddedRetriever)
        assert client.gold_ranks(GOLDS, QUERIES) == expected
        first = client.pid
        assert first is not None
        os.kill(first, signal.SIGKILL)  # between two calls
        assert client.gold_ranks(GOLDS, QUERIES) == expected
        second = client.pid
        assert second not in (None, first)
        results = [client.gold_ranks(GOLDS, QUERIES)]
        killer = threading.Timer(0.1, os.kill, (second, signal.SIGKILL))  # in the middle of calls
        killer.start()
        while client.pid == second:
            results.append(client.gold_ranks(GOLDS, QUERIES))
        killer.join()
        assert all(result == expected for result in results)
        third = client.pid
    assert third is not None
    assert gone(third, 0.1)
    assert capfd.readouterr().err.count("ended (status -9): starting it again") == 2
    client.close()
    with pytest.raises(RetrieverError, match="has been closed"):
        client.gold_ranks(GOLDS, QUERIES)


def test_an_index_that_cannot_be_opened_is_the_servers_own_sentence(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^there is no index folder .*none: build the index with"):
        open_retriever(f"embedded:{tmp_path / 'none'}")


def test_the_server_goes_with_its_parent(folder: Path) -> None:
    parent = (
        "import sys, time; from convsearch.retriever.embedded import open_retriever; "
        f"client = open_retriever('embedded:{folder}'); print(client.pid, client.url, flush=True); time.sleep(60)"
    )
    with started("-c", parent) as (process, line):
        pid, url = line.split()
        assert httpx.get(f"{url}/health", trust_env=False).json()["passages"] == 60
        process.kill()
        process.wait()
        assert gone(int(pid), 5)


def test_other_host_names_are_refused_on_this_machines_own_address(folder: Path) -> None:
    """A page of another site, whose name is made to point here, sends that name."""
    for host, statuses in (("127.0.0.1", (200, 400)), ("0.0.0.0", (200, 200))):
        command = ("-m", "retriever_server", "--index_path", str(folder), "--port", "0", "--host", host)
        with started(*command) as (_, ready):
            port = ready.split()[1].rpartition(":")[2]
            names = (f"localhost:{port}", f"evil.example:{port}")
            answers = [
                httpx.get(f"http://127.0.0.1:{port}/{page}", headers={"host": name}, trust_env=False).status_code
                for name in names
                for page in ("health", "")
            ]
            assert answers == [statuses[0]] * 2 + [statuses[1]] * 2


def test_the_workers_of_a_killed_index_builder_end(tmp_path: Path) -> None:
    from retriever_server.bm25.chunks import CHUNK_BYTES

    lines = (json.dumps({"id": f"p{n}", "contents": f"word{n} " * 400}) + "\n" for n in range(8 * CHUNK_BYTES // 3000))
    (tmp_path / "c.jsonl").write_text("".join(lines))
    command = ["-m", "retriever_server.index", "bm25", "--collection", str(tmp_path / "c.jsonl")]
    command += ["--output", str(tmp_path / "index"), "--processes", "2", "--quiet"]
    process = subprocess.Popen([sys.executable, *command], cwd=ROOT)
    children: list[int] = []
    while len(children) < 3 and process.poll() is None:  # two workers, and what multiprocessing starts beside them
        listed = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
        children = [int(pid) for pid in listed.split()]
        time.sleep(0.02)
    time.sleep(0.5)
    process.kill()
    process.wait()
    assert len(children) >= 3
    assert all(gone(pid, 10) for pid in children)


def test_a_silent_server_is_announced(capfd: pytest.CaptureFixture[str]) -> None:
    with (
        open_retriever("http://127.0.0.1:1", max_wait_s=3) as client,
        pytest.raises(RetrieverError, match="did not answer /health"),
    ):
        client.health()
    assert "retriever http://127.0.0.1:1: no answer (ConnectError" in capfd.readouterr().err


def test_sigterm_drains(folder: Path, tmp_path: Path) -> None:
    # a searcher that answers once a file is there, behind the real serve()
    script = f"""
import os, time
from retriever_server.serving.app import create_app
from retriever_server.bm25.index import Bm25Index
from retriever_server.serving.process import serve
class Slow(Bm25Index):
    def gold_ranks(self, *arguments):
        print("begun", flush=True)
        while not os.path.exists({str(tmp_path / "go")!r}):
            time.sleep(0.02)
        return super().gold_ranks(*arguments)
serve(create_app({{"slow": Slow({str(folder)!r})}}), "127.0.0.1", 0, "slow")
"""
    with started("-c", script) as (process, line):
        url = line.split()[1]
        answers: list[httpx.Response] = []
        body = {"items": [{"id": "a", "query": "word0", "gold_docids": ["p0"]}]}
        thread = threading.Thread(
            target=lambda: answers.append(httpx.post(f"{url}/rank", json=body, timeout=20, trust_env=False))
        )
        thread.start()
        assert process.stdout is not None
        assert process.stdout.readline() == "begun\n"
        process.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + 10
        while (
            refused := httpx.post(f"{url}/rank", json={"items": []}, trust_env=False)
        ).status_code == 200:  # until it takes no more
            assert time.monotonic() < deadline
        assert (refused.status_code, refused.headers["retry-after"], refused.headers["connection"]) == (
            503,
            "1",
            "close",
        )
        assert "stopping" in refused.json()["detail"]
        assert httpx.get(f"{url}/health", trust_env=False).status_code == 503
        (tmp_path / "go").touch()
        thread.join()
        assert answers[0].json()["ranks"] == {"a": 1}
        assert process.wait(timeout=5) == 0


@pytest.mark.slow
def test_a_search_that_hangs_does_not_keep_the_server_alive(folder: Path) -> None:
    script = f"""
import threading
from retriever_server.serving import process
from retriever_server.serving.app import create_app
from retriever_server.bm25.index import Bm25Index
class Hanging(Bm25Index):
    def gold_ranks(self, *arguments):
        print("begun", flush=True)
        threading.Event().wait()
process.DRAIN_S = 2.5
process.serve(create_app({{"hanging": Hanging({str(folder)!r})}}), "127.0.0.1", 0, "hanging")
"""
    with started("-c", script) as (process, line):
        body = {"items": [{"id": "a", "query": "word0", "gold_docids": ["p0"]}]}
        with httpx.Client(base_url=line.split()[1], trust_env=False, timeout=20) as client:
            answers: list[httpx.Response] = []
            thread = threading.Thread(target=lambda: answers.append(client.post("/rank", json=body)))
            thread.start()
            assert process.stdout is not None
            assert process.stdout.readline() == "begun\n"
            process.send_signal(signal.SIGTERM)
            assert process.wait(timeout=20) == 0
            thread.join()
            assert (answers[0].status_code, answers[0].headers["retry-after"]) == (503, "1")  # for a client: ask again


@pytest.mark.slow
def test_a_killed_server_that_is_started_again_only_delays(folder: Path) -> None:
    expected = Bm25Index.load(folder).gold_ranks(QUERIES, GOLDS, 20)
    command = ["-m", "retriever_server", "--index_path", str(folder), "--port"]
    results: list[list[int | None]] = []
    done = threading.Event()

    def work(url: str) -> None:
        with open_retriever(url, depth=20, timeout_s=20, max_wait_s=120) as client:
            while not done.is_set():
                results.append(client.gold_ranks(GOLDS, QUERIES))

    def wait_for(count: int) -> None:
        deadline = time.monotonic() + 60
        while len(results) < count:
            assert time.monotonic() < deadline
            time.sleep(0.01)

    thread: threading.Thread | None = None
    port = "0"
    try:
        for _ in range(3):
            with started(*command, port) as (_, line):  # killed at the end of the block
                url = line.split()[1]
                assert port in ("0", url.rpartition(":")[2])
                port = url.rpartition(":")[2]
                if thread is None:
                    thread = threading.Thread(target=work, args=(url,))
                    thread.start()
                wait_for(len(results) + 5)
        with started(*command, port):
            wait_for(len(results) + 5)
            done.set()
            assert thread is not None
            thread.join()
    finally:
        done.set()
    assert len(results) >= 20
    assert all(result == expected for result in results)


@pytest.mark.slow
def test_command_line(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "dev.trec").write_text("q1 0 p0 1\n")
    arguments = [
        "-m",
        "retriever_server",
        "--index_path",
        f"wiki={folder}",
        "--trec_path",
        str(tmp_path / "dev.trec"),
        "--port",
        "0",
    ]
    with started(*arguments, "--bm25_k1", "0.9", "--bm25_b", "0.4", "--exit-with-parent") as (process, line):
        index_id = Bm25Index.load(folder).index_id
        assert re.fullmatch(rf"retriever_server: http://127\.0\.0\.1:\d+ ready, index {index_id}, 60 passages\n", line)
        with open_retriever(line.split()[1], index="wiki") as client:
            assert client.health()["index_id"] == index_id
            assert client.gold_ranks([["p0"]], ["word0"]) == [1]
            with pytest.raises(ValueError, match=r"item 0 \('word0'\): docid 'p99' is not in the index"):
                client.gold_ranks([["p99"]], ["word0"])
        request = {"queries": ["word0"], "query_ids": ["q1"], "topk": 100}
        assert httpx.post(f"{line.split()[1]}/retrieve", json=request, trust_env=False).json() == {"result": [1]}
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=5) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--index_path", "{}/none", "--port", "0"], "error: there is no index folder"),
        (
            ["--index_path", "{}", "--retriever_name", "ance"],
            "error: --retriever_name ance, but {} is an index of bm25: leave the flag out",
        ),
        (
            ["--index_path", "{}", "--max_queue", "100"],
            "error: --max_queue 100 is less than --max_items 10000: lower the latter",
        ),
    ],
)
def test_command_line_faults(folder: Path, arguments: list[str], message: str) -> None:
    command = [sys.executable, "-m", "retriever_server", *(argument.format(folder) for argument in arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(message.format(folder))
    assert done.stderr.count("\n") == 1


def test_help_imports_nothing_heavy() -> None:
    for module in ("retriever_server", "retriever_server.index"):
        command = [sys.executable, "-X", "importtime", "-m", module, "--help"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        assert "argparse" in done.stderr
        assert not re.search(r"\| +(numpy|fastapi|bm25s|uvicorn)$", done.stderr, re.MULTILINE)
