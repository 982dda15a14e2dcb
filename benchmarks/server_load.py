"""Many clients at one server: ``python -m benchmarks.server_load --index INDEX --clients 64 --seconds 300``.

Real sockets, one keep-alive connection per client, no pause between its requests. The queries are pieces of passages
that the server itself finds, so that no other file is needed. The server answers with their ranks once while nothing
else runs; under load a different answer is an error. A client that gets 503 sleeps for Retry-After (up to twice as
long) and asks again. Latencies are those of answered requests. Growth of memory is from the start, after the first
ranks, to the end: of the anonymous pages (a memory-mapped index that is being read is no growth), or of all pages if
only /metrics is known.
"""

import argparse
import http.client
import json
import math
import random
import re
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from convsearch.cli import command_parser, run

SEEDS = ("who wrote the book", "history of the city", "what is the population", "first album of the band",
         "how does it work", "battle of the war")  # fmt: skip
TRUTH_S = 600  # for the ranks before the load


@dataclass
class Tally:
    """What one client saw."""

    latencies_s: list[float] = field(default_factory=list)
    statuses: Counter[str] = field(default_factory=Counter)  # "503", "wrong", "HTTP 500", "ConnectionResetError", ...


class Connection:
    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self._http = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=TRUTH_S)

    def post(self, path: str, body: bytes) -> tuple[int, float, Any]:
        """(status, Retry-After in seconds, answer)."""
        self._http.request("POST", path, body, {"content-type": "application/json"})
        response = self._http.getresponse()
        content = response.read()
        return response.status, float(response.headers.get("retry-after") or 0), json.loads(content)

    def get(self, path: str) -> str:
        self._http.request("GET", path)
        return self._http.getresponse().read().decode()

    def close(self) -> None:
        self._http.close()


@contextmanager
def own_server(folder: str, arguments: list[str]) -> Iterator[tuple[str, int]]:
    """(url, process id) of a server of the index folder."""
    command = [sys.executable, "-m", "retriever_server", "--index_path", folder, "--port", "0", "--exit-with-parent"]
    root = Path(__file__).resolve().parents[1]
    process = subprocess.Popen([*command, *arguments], stdout=subprocess.PIPE, text=True, cwd=root)
    assert process.stdout is not None
    try:
        ready = process.stdout.readline().split()
        if len(ready) < 2 or not ready[1].startswith("http://"):
            raise ValueError(f"the server of {folder} did not start: see its message above")
        yield ready[1], process.pid
    finally:
        process.terminate()
        process.wait()
        process.stdout.close()


def memory_mib(connection: Connection, pid: int | None) -> tuple[float, float]:
    """(all, anonymous) resident memory of the server in MiB; (from /metrics, nan) for one that is not ours."""
    if pid is not None:
        status = Path(f"/proc/{pid}/status").read_text()
        total, anonymous = (int(re.findall(rf"{name}:\s+(\d+)", status)[0]) / 1024 for name in ("VmRSS", "RssAnon"))
        return total, anonymous
    found = re.findall(r"^process_resident_memory_bytes (\S+)", connection.get("/metrics"), re.MULTILINE)
    return (float(found[0]) / 2**20 if found else float("nan")), float("nan")


def make_requests(connection: Connection, args: argparse.Namespace, rng: random.Random) -> list[tuple[bytes, Any]]:
    """(body, ranks of the right answer), from passages that a few searches find."""
    status, _, answer = connection.post("/search", json.dumps({"queries": SEEDS, "k": 50, "contents": True}).encode())
    if status != 200:
        raise ValueError(f"the server answers a search with status {status}: {answer}")
    hits = [hit for found in answer["results"] for hit in found if hit["contents"].split()]
    passages = sorted({(hit["docid"], hit["contents"]) for hit in hits})
    if not passages:
        raise ValueError("the first searches found no passage: this benchmark needs a collection of English text")
    made = []
    for _ in range(args.requests):
        items = []
        for number in range(args.items):
            (gold, text), (_, noise) = rng.choice(passages), rng.choice(passages)
            own, other, half = text.split(), noise.split(), args.words // 2
            start = rng.randrange(max(1, len(own) - half))
            query = own[start : start + half] + rng.choices(other, k=args.words - half)
            items.append({"id": str(number), "query": " ".join(query), "gold_docids": [gold]})
        body = json.dumps({"items": items, "depth": args.depth}).encode()
        status, _, answer = connection.post("/rank", body)
        if status != 200 or answer["errors"]:
            raise ValueError(f"the server answers a request for ranks with status {status}: {str(answer)[:200]}")
        made.append((body, answer["ranks"]))
    return made


def client(url: str, requests: list[tuple[bytes, Any]], end: float, seed: int, tally: Tally) -> None:
    rng, connection = random.Random(seed), Connection(url)
    while time.monotonic() < end:
        body, expected = rng.choice(requests)
        began = time.monotonic()
        try:
            status, retry_s, answer = connection.post("/rank", body)
        except (OSError, http.client.HTTPException, ValueError) as error:
            tally.statuses[type(error).__name__] += 1
            connection.close()
            time.sleep(min(0.2, max(0.0, end - time.monotonic())))
            continue
        if status == 503:
            tally.statuses["503"] += 1
            time.sleep(min(retry_s * rng.uniform(1, 2), max(0.0, end - time.monotonic())))
        elif status != 200:
            tally.statuses[f"HTTP {status}"] += 1
        elif answer["ranks"] != expected:
            tally.statuses["wrong"] += 1
        else:
            tally.latencies_s.append(time.monotonic() - began)
    connection.close()


def load(url: str, pid: int | None, args: argparse.Namespace) -> None:
    watcher = Connection(url)
    requests = make_requests(watcher, args, random.Random(args.seed))
    memory = [memory_mib(watcher, pid)]
    tallies = [Tally() for _ in range(args.clients)]
    began = time.monotonic()
    end = began + args.seconds
    clients = ((url, requests, end, args.seed + 1 + i, tally) for i, tally in enumerate(tallies))
    threads = [threading.Thread(target=client, args=arguments) for arguments in clients]
    for thread in threads:
        thread.start()
    time.sleep(args.seconds / 2)
    memory.append(memory_mib(watcher, pid))
    for thread in threads:
        thread.join()
    took_s = time.monotonic() - began
    memory.append(memory_mib(watcher, pid))
    watcher.close()
    report(args, tallies, took_s, memory)


def report(args: argparse.Namespace, tallies: list[Tally], took_s: float, memory: list[tuple[float, float]]) -> None:
    latencies_ms = sorted(1000 * latency for tally in tallies for latency in tally.latencies_s) or [float("nan")]
    answered = [len(tally.latencies_s) for tally in tallies]
    statuses = sum((tally.statuses for tally in tallies), Counter[str]())
    refused = statuses.pop("503", 0)
    errors = sum(statuses.values())
    last = len(latencies_ms) - 1
    p50_ms, p99_ms = (latencies_ms[min(last, int(q * len(latencies_ms)))] for q in (0.5, 0.99))
    rows = {
        "clients x items per request": f"{args.clients} x {args.items}",
        "seconds": f"{took_s:.1f}",
        "requests answered": f"{sum(answered)}",
        "of one client, fewest - most": f"{min(answered)} - {max(answered)}",
        "items per second": f"{sum(answered) * args.items / took_s:.0f}",
        "latency p50, p99, mean (ms)": f"{p50_ms:.1f}, {p99_ms:.1f}, {statistics.mean(latencies_ms):.1f}",
        "503": f"{refused}",
        "other errors": f"{errors} {dict(statuses) if statuses else ''}".strip(),
        "RSS start, middle, end (MiB)": ", ".join(f"{total:.0f}" for total, _ in memory),
        "of it anonymous (MiB)": ", ".join(f"{anonymous:.0f}" for _, anonymous in memory),
    }
    for name, value in rows.items():
        print(f"{name:30} {value}")
    kind = 0 if math.isnan(memory[0][1]) else 1  # nan: the anonymous part is not known
    growth = memory[-1][kind] - memory[0][kind]
    print(f"errors={errors} p50_ms={p50_ms:.1f} p99_ms={p99_ms:.1f} rss_growth_mib={growth:.1f}")


def build_parser() -> argparse.ArgumentParser:
    parser = command_parser("benchmarks.server_load", "Many clients at one server.")
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--url", help="a running server")
    where.add_argument("--index", metavar="DIR", help="start a server of this index folder")
    add = parser.add_argument
    add("--clients", type=int, default=64)
    add("--seconds", type=float, default=300)
    add("--items", type=int, default=8, help="queries per request")
    add("--words", type=int, default=50, help="words per query")
    add("--depth", type=int, default=100)
    add("--requests", type=int, default=100, help="different requests")
    add("--seed", type=int, default=1)
    flags = 'of the server that is started, for example "--max_queue 256 --max_items 64"'
    add("--server", default="", metavar="FLAGS", help=flags)
    return parser


def main() -> None:
    args = build_parser().parse_args()
    if min(args.clients, args.items, args.words, args.depth, args.requests) < 1 or args.seconds <= 0:
        raise ValueError("--clients, --items, --words, --depth, --requests and --seconds must be above 0")
    if args.url:
        return load(args.url, None, args)
    with own_server(args.index, args.server.split()) as (url, pid):
        return load(url, pid, args)


if __name__ == "__main__":
    run(main)
