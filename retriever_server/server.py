"""The server's command line: ``python -m retriever_server --index_path outputs/demo/bm25 --trec_path dev.trec --port 8000``.

It takes the flags of the reference's server. Differences: it listens on 127.0.0.1 unless told otherwise, k1 and b come from
the index, and --trec_path may be left out by clients that send the gold docids themselves.
"""

import argparse
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from convsearch.cli import run

log = logging.getLogger("retriever_server")

DRAIN_S = 30  # after SIGTERM the process is gone within this time, whatever hangs
DENSE_OPTIONS = {
    "model_name_or_path": "model_name_or_path",
    "n_gpu": "n_gpu",
    "max_length": "max_length",
    "retrieval_batch_size": "batch_size",
    "ray_parts": "ray_parts",
    "ray_address": "ray_address",
}


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="python -m retriever_server", description="Serves exact gold ranks and searches over HTTP."
    )
    top.add_argument(
        "--index_path",
        action="append",
        required=True,
        metavar="[NAME=]DIR",
        help="index folder; repeat for several, the first is the default",
    )
    top.add_argument(
        "--trec_path",
        action="append",
        type=Path,
        metavar="FILE",
        help='qrels ("qid 0 docid 1") for requests by query id; may be repeated',
    )
    top.add_argument(
        "--retriever_name", metavar="NAME", help="refuse a first index of another kind, such as bm25 or ance"
    )
    top.add_argument(
        "--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1; 0.0.0.0 opens it to the network)"
    )
    top.add_argument(
        "--port", type=int, default=8000, help="port to listen on (default: 8000; 0 takes a free one and prints it)"
    )
    top.add_argument(
        "--exit-with-parent",
        nargs="?",
        type=int,
        const=0,
        metavar="PID",
        help="stop when the process that started this one dies",
    )
    pages = top.add_argument_group("playground", "the page at /")
    pages.add_argument(
        "--rewriter",
        action="append",
        default=[],
        metavar="NAME=MODEL",
        help="model folder, or http://HOST/v1[#MODEL] of an OpenAI-compatible server (key: OPENAI_API_KEY); may be repeated",
    )
    pages.add_argument(
        "--prompt_style",
        choices=["paper", "compact"],
        default="paper",
        help="the rewriters' prompt at first (default: paper)",
    )
    _add_queue_flags(top)
    bm25 = top.add_argument_group("bm25")
    bm25.add_argument("--bm25_k1", type=float, help="refuse an index with another k1")
    bm25.add_argument("--bm25_b", type=float, help="refuse an index with another b")
    limits = top.add_argument_group("limits of one request")
    limits.add_argument("--max_request_mib", type=int, default=64, help="size (default: 64)")
    limits.add_argument("--max_items", type=int, default=10_000, help="queries (default: 10000)")
    limits.add_argument(
        "--max_query_chars", type=int, default=1_000_000, help="characters of a query (default: 1000000)"
    )
    limits.add_argument(
        "--max_results", type=int, default=500_000, help="queries x k, a tenth of it with contents (default: 500000)"
    )
    dense = top.add_argument_group(
        "dense", "for the dense indexes among those that are served; default: what the index folder says"
    )
    dense.add_argument("--model_name_or_path", help="the model that encodes queries")
    dense.add_argument("--corpus_docid_path", help="the passages' ids, where the reference's format keeps them apart")
    dense.add_argument("--faiss_gpu", action="store_true", default=None, help="search on the GPUs")
    dense.add_argument("--n_gpu", type=int, help="GPUs to use")
    dense.add_argument("--max_length", type=int, help="tokens that are kept of a query")
    dense.add_argument("--retrieval_batch_size", type=int, help="queries that are encoded at a time")
    dense.add_argument(
        "--ray_parts",
        type=int,
        metavar="N",
        help="spread the vectors over N actors (a GPU or CPU core each) of a Ray cluster",
    )
    dense.add_argument(
        "--ray_address", metavar="ADDRESS", help="that cluster (default: RAY_ADDRESS, or one started here)"
    )
    similarity = top.add_argument_group(
        "similarity", "how much nearer a text stands to its positives than its question (/similarity)"
    )
    similarity.add_argument(
        "--similarity_model", metavar="MODEL", help="encoder: an ANCE or sentence-transformers folder, or a hub name"
    )
    similarity.add_argument(
        "--similarity_device", default="auto", metavar="DEVICE", help="where it runs (default: auto)"
    )
    similarity.add_argument(
        "--similarity_max_length", type=int, default=512, help="tokens that are kept of a text (default: 512)"
    )
    return top


def _add_queue_flags(top: argparse.ArgumentParser) -> None:
    queue = top.add_argument_group(
        "queue", "requests are merged into batches, fairly; past the bounds the answer is 503 with Retry-After"
    )
    queue.add_argument(
        "--threads", type=int, default=2, help="searcher calls at a time; each spreads over cores itself (default: 2)"
    )
    queue.add_argument("--max_batch", type=int, default=512, help="items a searcher call (default: 512)")
    queue.add_argument(
        "--max_wait_ms", type=float, default=2, help="how long an item waits for others to share its call (default: 2)"
    )
    queue.add_argument(
        "--max_queue", type=int, default=20_000, help="items in the server that are not answered yet (default: 20000)"
    )
    queue.add_argument(
        "--max_queue_s",
        type=float,
        default=30,
        help="and the seconds they may take, by the speed measured (default: 30)",
    )
    more = top.add_argument_group("cache and log")
    more.add_argument(
        "--rank_cache",
        metavar="DIR",
        help="keep ranks on disk and answer repeated items from there (default: no cache)",
    )
    more.add_argument(
        "--rank_cache_mib", type=int, default=256, help="its size; the oldest ranks make room (default: 256)"
    )
    more.add_argument(
        "--log_format", choices=["json", "text"], default="json", help="JSON object a line, or text (default: json)"
    )
    more.add_argument(
        "--log_level",
        choices=["debug", "info", "warning", "error"],
        default="warning",
        help="info logs each request (default: warning)",
    )


def main() -> None:
    args = parser().parse_args()
    if args.exit_with_parent is not None:
        exit_with_parent(args.exit_with_parent or os.getppid())
    from retriever_server.playground.routes import rewriter_commands
    from retriever_server.serving.app import create_app
    from retriever_server.serving.batching import BatchSettings
    from retriever_server.serving.rank_cache import RankCache
    from retriever_server.serving.schemas import Limits
    from retriever_server.serving.telemetry import set_up_logging

    set_up_logging(args.log_format, args.log_level)
    settings = BatchSettings(args.threads, args.max_batch, args.max_wait_ms / 1000, args.max_queue, args.max_queue_s)
    limits = Limits(args.max_request_mib << 20, args.max_items, args.max_query_chars, args.max_results)
    options = {name: getattr(args, flag) for flag, name in DENSE_OPTIONS.items() if getattr(args, flag) is not None}
    if args.faiss_gpu:
        options["backend"] = "faiss"
    if args.corpus_docid_path:
        raise ValueError(
            f"--corpus_docid_path {args.corpus_docid_path}: an index folder holds its passages' ids; make one of the reference's files "
            "with `python -m retriever_server.index import-blocks`"
        )
    rewriters = rewriter_commands(args.rewriter, args.prompt_style)
    indexes = open_indexes(args.index_path, args.bm25_k1, args.bm25_b, args.retriever_name, options)
    qrels = read_qrels(args.trec_path) if args.trec_path else None
    default = next(iter(indexes.values()))
    if qrels is not None:
        warn_of_missing(qrels, default)
    similarity = None
    if args.similarity_model:
        from retriever_server.similarity import Similarity

        similarity = Similarity.load(args.similarity_model, args.similarity_device, args.similarity_max_length)
    cache = RankCache(args.rank_cache, args.rank_cache_mib) if args.rank_cache else None
    about = f"index {', '.join(index.index_id for index in indexes.values())}, {default.num_passages} passages"
    serve(
        create_app(indexes, qrels, limits, settings, cache, rewriters, args.prompt_style, similarity),
        args.host,
        args.port,
        about,
    )


def open_indexes(
    arguments: Sequence[str],
    k1: float | None,
    b: float | None,
    retriever_name: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """name -> index, from DIR or NAME=DIR (an index that is given without a name is called after its folder).

    ``options`` go to the dense indexes.

    Raises:
        ValueError: an index cannot be opened, two have one name, k1 or b is another than asked, or the first is no ``retriever_name``.
    """
    from retriever_server.searcher import open_searcher

    indexes: dict[str, Any] = {}
    for argument in arguments:
        name, separator, folder = argument.partition("=")
        if not separator or Path(argument).is_dir():
            name, folder = Path(argument).resolve().name, argument
        if name in indexes:
            raise ValueError(f"two indexes are called {name!r}: tell them apart with --index_path NAME=DIR")
        index = open_searcher(folder, **(options or {}))
        if retriever_name is not None and not indexes and index.name != retriever_name:
            raise ValueError(
                f"--retriever_name {retriever_name}, but {folder} is an index of {index.name}: leave the flag out, or name another index"
            )
        _check_bm25(index, folder, k1, b)
        indexes[name] = index
    if (k1, b) != (None, None) and not any(index.name == "bm25" for index in indexes.values()):
        raise ValueError("--bm25_k1 and --bm25_b are given, but no index here is of bm25: leave them out")
    return indexes


def _check_bm25(index: Any, folder: str, k1: float | None, b: float | None) -> None:
    for what, asked in (("k1", k1), ("b", b)):
        found = getattr(index, what, None)
        if index.name == "bm25" and asked is not None and asked != found:
            raise ValueError(
                f"--bm25_{what} {asked}, but {folder} was built with {what} {found}: leave the flag out, or build an index with "
                f"`python -m retriever_server.index bm25 --{what} {asked} ...`"
            )


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
        log.warning(
            f"{len(missing)} gold docids of --trec_path, such as {min(missing)!r}, are not in the index; "
            "their queries will be answered with an error"
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
        raise ValueError(
            f"cannot listen on {host} port {port} ({error}): choose another --port, 0 for any free one"
        ) from error
    return bound


def serve(app: Any, host: str, port: int, about: str) -> None:
    """Runs the application until SIGTERM or SIGINT; what has been let in is answered first, within DRAIN_S; new requests get 503.

    Prints ``retriever_server: http://HOST:PORT ready, <about>`` when it accepts requests.
    """
    import uvicorn

    bound = listen(host, port)
    shown = f"[{host}]" if ":" in host else host
    ready = f"retriever_server: http://{shown}:{bound.getsockname()[1]} ready, {about}"
    service = app.state.service

    class Server(uvicorn.Server):
        end: float | None = None  # of the draining, in time.monotonic

        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            if self.started:
                print(ready, flush=True)

        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            """The first signal begins the draining, with the port still open to say 503; a second ends it at once."""
            if self.end is not None:
                super().handle_exit(sig, frame)
                return
            service.draining, self.end = True, time.monotonic() + DRAIN_S - 2

        async def on_tick(self, counter: int) -> bool:
            if self.end is not None and (service.active == 0 or time.monotonic() > self.end):
                self.should_exit = True
            return await super().on_tick(counter)

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
        # uvicorn raises the signal once more after it has shut down: a drained server has done its job, so let it end with status 0
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: None)
    Server(config).run(sockets=[bound])
    if service.batcher.inside:
        log.warning("stopped before all was answered", extra={"fields": {"searches": len(service.batcher.inside)}})
        sys.stdout.flush()
        os._exit(0)  # a search that hangs would keep the interpreter from ending


if __name__ == "__main__":
    run(main)
