"""The server's command line:
``python -m retriever_server --index_path outputs/demo/bm25 --trec_path dev.trec --port 8000``.

It takes the flags of the reference's server. Differences: it listens on 127.0.0.1 by default, k1 and b come from the
index, and --trec_path is optional for clients that send the gold docids themselves.
"""

import argparse
import os
from pathlib import Path
from typing import Any

from convsearch.cli import command_parser, run
from convsearch.prompts import STYLES

# flag -> argument of DenseIndex.load
DENSE_OPTIONS = {
    "model_name_or_path": "model_name_or_path",
    "n_gpu": "n_gpu",
    "max_length": "max_length",
    "retrieval_batch_size": "batch_size",
    "ray_parts": "ray_parts",
    "ray_address": "ray_address",
}


def build_parser() -> argparse.ArgumentParser:
    top = command_parser("retriever_server", "Serves exact gold ranks and searches over HTTP.")
    add = top.add_argument
    folders = "index folder; repeat for several, the first is the default"
    add("--index_path", action="append", required=True, metavar="[NAME=]DIR", help=folders)
    qrels = 'qrels ("qid 0 docid 1") for requests by query id; may be repeated'
    add("--trec_path", action="append", type=Path, metavar="FILE", help=qrels)
    add("--retriever_name", metavar="NAME", help="refuse a first index of another kind, for example bm25 or ance")
    add("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 opens it to the network")
    add("--port", type=int, default=8000, help="port to listen on; 0 takes a free one and prints it")
    parent = "stop when the process that started this one dies"
    add("--exit-with-parent", nargs="?", type=int, const=0, metavar="PID", help=parent)
    _add_page_flags(top)
    _add_queue_flags(top)
    add = top.add_argument_group("bm25").add_argument
    add("--bm25_k1", type=float, help="refuse an index with another k1")
    add("--bm25_b", type=float, help="refuse an index with another b")
    add = top.add_argument_group("limits of one request").add_argument
    add("--max_request_mib", type=int, default=64, help="size")
    add("--max_items", type=int, default=10_000, help="queries")
    add("--max_query_chars", type=int, default=1_000_000, help="characters per query")
    results = "queries x k, a tenth of it with contents"
    add("--max_results", type=int, default=500_000, help=results)
    _add_encoder_flags(top)
    return top


def _add_page_flags(top: argparse.ArgumentParser) -> None:
    add = top.add_argument_group("playground", "the page at /").add_argument
    model = (
        "model folder, or http://HOST/v1[#MODEL] of an OpenAI-compatible server (key: OPENAI_API_KEY); may be repeated"
    )
    add("--rewriter", action="append", default=[], metavar="NAME=MODEL", help=model)
    add("--prompt_style", choices=STYLES, default="paper", help="the page's first prompt style")


def _add_queue_flags(top: argparse.ArgumentParser) -> None:
    about = "requests are merged into batches, fairly; beyond the bounds the answer is 503 with Retry-After"
    add = top.add_argument_group("queue", about).add_argument
    add("--threads", type=int, default=2, help="searcher calls at a time, each on several cores")
    add("--max_batch", type=int, default=512, help="items per searcher call")
    add("--max_wait_ms", type=float, default=2, help="how long an item waits for others to share its call")
    add("--max_queue", type=int, default=20_000, help="items in the server without an answer")
    add("--max_queue_s", type=float, default=30, help="the seconds they may take, at the measured speed")
    add = top.add_argument_group("cache and log").add_argument
    cache = "keep ranks on disk and answer repeated items from there (default: no cache)"
    add("--rank_cache", metavar="DIR", help=cache)
    add("--rank_cache_mib", type=int, default=256, help="its size; the oldest ranks are dropped")
    form = "one JSON object per line, or text"
    add("--log_format", choices=["json", "text"], default="json", help=form)
    levels = ["debug", "info", "warning", "error"]
    add("--log_level", choices=levels, default="warning", help="info logs each request")


def _add_encoder_flags(top: argparse.ArgumentParser) -> None:
    about = "for the dense indexes that are served; default: what the index folder says"
    add = top.add_argument_group("dense", about).add_argument
    add("--model_name_or_path", help="the model that encodes queries")
    add("--corpus_docid_path", help="the passages' ids, for the reference's format, which has them in another file")
    add("--faiss_gpu", action="store_true", default=None, help="search on the GPUs")
    add("--n_gpu", type=int, help="GPUs to use")
    add("--max_length", type=int, help="tokens of a query; longer ones are cut")
    add("--retrieval_batch_size", type=int, help="queries per forward pass")
    actors = "spread the vectors over N actors (a GPU or CPU core each) of a Ray cluster"
    add("--ray_parts", type=int, metavar="N", help=actors)
    add("--ray_address", metavar="ADDRESS", help="that cluster (default: RAY_ADDRESS, or one started here)")
    about = "how much nearer a text is to its positives than its question is (/similarity)"
    add = top.add_argument_group("similarity", about).add_argument
    model = "encoder: an ANCE or sentence-transformers folder, or a hub name"
    add("--similarity_model", metavar="MODEL", help=model)
    add("--similarity_device", default="auto", metavar="DEVICE", help="its device")
    length = "tokens of a text; longer ones are cut"
    add("--similarity_max_length", type=int, default=512, help=length)


def dense_options(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments of DenseIndex.load that the flags give."""
    if args.corpus_docid_path:
        what = f"--corpus_docid_path {args.corpus_docid_path}: an index folder holds its passages' ids"
        raise ValueError(f"{what}; build one with `python -m retriever_server.index import-blocks`")
    options = {name: getattr(args, flag) for flag, name in DENSE_OPTIONS.items() if getattr(args, flag) is not None}
    return options | ({"backend": "faiss"} if args.faiss_gpu else {})


def main() -> None:
    parent, args = os.getppid(), build_parser().parse_args()
    from convsearch import pages
    from retriever_server.parent import exit_with_parent
    from retriever_server.playground import routes
    from retriever_server.searcher import open_indexes
    from retriever_server.serving import process
    from retriever_server.serving.app import create_app
    from retriever_server.serving.batching import BatchSettings
    from retriever_server.serving.qrels import read_qrels, warn_of_missing
    from retriever_server.serving.rank_cache import RankCache
    from retriever_server.serving.schemas import Limits
    from retriever_server.serving.telemetry import set_up_logging

    if args.exit_with_parent is not None:
        exit_with_parent(args.exit_with_parent or parent)
    set_up_logging(args.log_format, args.log_level)
    settings = BatchSettings(args.threads, args.max_batch, args.max_wait_ms / 1000, args.max_queue, args.max_queue_s)
    limits = Limits(args.max_request_mib << 20, args.max_items, args.max_query_chars, args.max_results)
    options, rewriters = dense_options(args), routes.rewriter_commands(args.rewriter, args.prompt_style)
    indexes = open_indexes(args.index_path, args.bm25_k1, args.bm25_b, args.retriever_name, options)
    default, qrels, similarity = next(iter(indexes.values())), None, None
    if args.trec_path:
        qrels = read_qrels(args.trec_path)
        warn_of_missing(qrels, default)
    if args.similarity_model:
        from retriever_server.encoder import Encoder  # loads torch, which other servers do without
        from retriever_server.similarity import Similarity

        encoder = Encoder.load(args.similarity_model, args.similarity_device)
        similarity = Similarity.of(encoder, args.similarity_max_length)
    cache = RankCache(args.rank_cache, args.rank_cache_mib) if args.rank_cache else None
    app = create_app(indexes, qrels, limits, settings, cache, similarity)
    if args.host in pages.LOCAL_NAMES:
        pages.only_local_names(app)
    app.include_router(routes.playground(app.state.service, rewriters, args.prompt_style))
    about = f"index {', '.join(index.index_id for index in indexes.values())}, {default.num_passages} passages"
    process.serve(app, args.host, args.port, about)


if __name__ == "__main__":
    run(main)
