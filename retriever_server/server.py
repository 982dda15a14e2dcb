"""The server's command line: ``python -m retriever_server --index_path outputs/demo/bm25 --trec_path dev.trec --port 8000``.

It takes the flags of the reference's server. Differences: it listens on 127.0.0.1 unless told otherwise, k1 and b come from
the index, and --trec_path may be left out by clients that send the gold docids themselves.
"""

import argparse
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from convsearch.cli import run

DRAIN_S = 30  # how long requests that are being answered may go on after SIGTERM


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="python -m retriever_server", description="Serves exact gold ranks and searches over HTTP.")
    top.add_argument(
        "--index_path",
        action="append",
        required=True,
        metavar="[NAME=]DIR",
        help="index folder; repeat for several, the first is the default",
    )
    top.add_argument(
        "--trec_path", action="append", type=Path, metavar="FILE", help='qrels ("qid 0 docid 1") for requests by query id; may be repeated'
    )
    top.add_argument("--retriever_name", default="bm25", choices=["bm25", "ance"], help="kind of retriever (default: bm25)")
    top.add_argument("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1; 0.0.0.0 opens it to the network)")
    top.add_argument("--port", type=int, default=8000, help="port to listen on (default: 8000; 0 takes a free one and prints it)")
    top.add_argument("--threads", type=int, help="searches at a time (default: one a core)")
    top.add_argument(
        "--exit-with-parent", nargs="?", type=int, const=0, metavar="PID", help="stop when the process that started this one dies"
    )
    bm25 = top.add_argument_group("bm25")
    bm25.add_argument("--bm25_k1", type=float, help="refuse an index with another k1")
    bm25.add_argument("--bm25_b", type=float, help="refuse an index with another b")
    limits = top.add_argument_group("limits of one request")
    limits.add_argument("--max_request_mib", type=int, default=64, help="size (default: 64)")
    limits.add_argument("--max_items", type=int, default=10_000, help="queries (default: 10000)")
    limits.add_argument("--max_query_chars", type=int, default=1_000_000, help="characters of a query (default: 1000000)")
    limits.add_argument("--max_results", type=int, default=500_000, help="queries x k, a tenth of it with contents (default: 500000)")
    dense = top.add_argument_group("dense retrievers", "accepted for compatibility; this version serves bm25 alone")
    dense.add_argument("--corpus_docid_path")
    dense.add_argument("--model_name_or_path")
    dense.add_argument("--faiss_gpu", action="store_true")
    dense.add_argument("--n_gpu", type=int, default=1)
    dense.add_argument("--max_length", type=int, default=512)
    dense.add_argument("--retrieval_batch_size", type=int, default=64)
    return top


def main() -> None:
    args = parser().parse_args()
    if args.exit_with_parent is not None:
        exit_with_parent(args.exit_with_parent or os.getppid())
    if args.retriever_name != "bm25":
        raise ValueError(f"--retriever_name {args.retriever_name}: dense retrieval is not in this version, use --retriever_name bm25")
    from retriever_server.app import Limits, create_app

    indexes = open_indexes(args.index_path, args.bm25_k1, args.bm25_b)
    qrels = read_qrels(args.trec_path) if args.trec_path else None
    if qrels is not None:
        warn_of_missing(qrels, next(iter(indexes.values())))
    limits = Limits(args.max_request_mib << 20, args.max_items, args.max_query_chars, args.max_results)
    default = next(iter(indexes.values()))
    about = f"index {', '.join(index.index_id for index in indexes.values())}, {default.num_passages} passages"
    serve(create_app(indexes, qrels, limits, args.threads), args.host, args.port, about)


def open_indexes(arguments: Sequence[str], k1: float | None, b: float | None) -> dict[str, Any]:
    """name -> index, from DIR or NAME=DIR (an index that is given without a name is called after its folder).

    Raises:
        ValueError: an index cannot be opened, two have one name, or k1 or b is another than asked.
    """
    from retriever_server.bm25 import Bm25Index

    indexes: dict[str, Any] = {}
    for argument in arguments:
        name, separator, folder = argument.partition("=")
        if not separator or Path(argument).is_dir():
            name, folder = Path(argument).resolve().name, argument
        if name in indexes:
            raise ValueError(f"two indexes are called {name!r}: tell them apart with --index_path NAME=DIR")
        index = Bm25Index.load(folder)
        for what, asked, found in (("k1", k1, index.k1), ("b", b, index.b)):
            if asked is not None and asked != found:
                raise ValueError(
                    f"--bm25_{what} {asked}, but {folder} was built with {what} {found}: leave the flag out, or build an index with "
                    f"`python -m retriever_server.index bm25 --{what} {asked} ...`"
                )
        indexes[name] = index
    return indexes


def read_qrels(paths: Sequence[Path]) -> dict[str, list[str]]:
    """query id -> docids judged relevant (above 0), from TREC qrels lines "qid 0 docid relevance".

    Raises:
        ValueError: a file is not there, or a line does not have this form; names file and line.
    """
    qrels: dict[str, list[str]] = {}
    for path in paths:
        if not path.is_file():
            raise ValueError(f"there is no qrels file {path}")
        with open(path, encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                fields = line.split()
                if not fields:
                    continue
                if len(fields) != 4 or not fields[3].lstrip("-").isdigit():
                    raise ValueError(f"{path}:{number}: expected 'qid 0 docid relevance', got {line.strip()[:80]!r}")
                if int(fields[3]) > 0:
                    qrels.setdefault(fields[0], []).append(fields[2])
    return qrels


def warn_of_missing(qrels: Mapping[str, Sequence[str]], index: Any) -> None:
    missing = {docid for docids in qrels.values() for docid in index.missing(docids)}
    if missing:
        print(
            f"retriever_server: warning: {len(missing)} gold docids of --trec_path, such as {min(missing)!r}, are not in the index; "
            "their queries will be answered with an error",
            file=sys.stderr,
        )


def exit_with_parent(pid: int) -> None:
    """Ends this process within half a second of process ``pid`` ceasing to be its parent.

    The kernel's own parent-death signal is no use here: it comes when the parent's THREAD that started the child ends.
    """

    def watch() -> None:
        while os.getppid() == pid:
            time.sleep(0.5)
        os._exit(0)

    threading.Thread(target=watch, name="exit-with-parent", daemon=True).start()


def listen(host: str, port: int) -> socket.socket:
    """A bound socket (port 0: any free one); ValueError where the address is taken or not ours."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # asyncio turns off Nagle's algorithm only where the protocol is spelled out: without it every answer would take 40 ms
    bound = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((host, port))
        bound.listen(2048)
    except (OSError, OverflowError) as error:
        bound.close()
        raise ValueError(f"cannot listen on {host} port {port} ({error}): choose another --port, 0 for any free one") from error
    return bound


def serve(app: Any, host: str, port: int, about: str) -> None:
    """Runs the application until SIGTERM or SIGINT; requests that have begun are answered first (at most DRAIN_S).

    Prints ``retriever_server: http://HOST:PORT ready, <about>`` when it accepts requests.
    """
    import uvicorn

    bound = listen(host, port)
    shown = f"[{host}]" if ":" in host else host
    ready = f"retriever_server: http://{shown}:{bound.getsockname()[1]} ready, {about}"

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            if self.started:
                print(ready, flush=True)

    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        timeout_keep_alive=120,
        timeout_graceful_shutdown=DRAIN_S,
        ws="none",
        server_header=False,
    )
    if threading.current_thread() is threading.main_thread():
        # uvicorn raises the signal once more after it has shut down: a drained server has done its job, so let it end with status 0
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: None)
    Server(config).run(sockets=[bound])


if __name__ == "__main__":
    run(main)
