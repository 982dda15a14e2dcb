"""Gold ranks: this engine against the reference server's path, bm25s and rank_bm25.

``python -m benchmarks.gold_rank --passages 100000 --queries 200``. The reference path is a Lucene batch search of depth 100, after which each hit's
id is read from its stored JSON. One collection, the same queries, as many threads for each; the contestants take
turns, and the median round counts. The last line is ``ratio=… equal=n/n peers=…``: how many times the reference path's throughput, and on how many
queries the ranks agree with Lucene's (with an exhaustive search where Lucene is not installed, and then the ratio is nan).
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from convsearch.cli import Unavailable, run

DEPTH = 100
Contestant = Callable[[Sequence[str]], object]


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="python -m benchmarks.gold_rank",
        description=__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    top.add_argument("--passages", type=int, default=100_000, help="collection size")
    top.add_argument("--queries", type=int, default=200, help="queries a round")
    top.add_argument("--rounds", type=int, default=3, help="rounds, each contestant once a round")
    top.add_argument(
        "--threads", type=int, default=len(os.sched_getaffinity(0)), help="threads of every contestant but rank_bm25"
    )
    top.add_argument(
        "--source",
        type=Path,
        help="collection.jsonl whose sentences make the passages; the embedded summaries by default",
    )
    top.add_argument(
        "--work",
        type=Path,
        default=Path("data/benchmarks"),
        help="where collections and indexes are kept for the next run",
    )
    top.add_argument(
        "--peers", nargs="*", default=["lucene", "bm25s", "bm25s_numba", "rank_bm25"], help="whom to run against"
    )
    return top


class Ours:
    """Bm25Index.gold_ranks."""

    def __init__(self, folder: Path, threads: int, golds: list[list[str]]) -> None:
        from retriever_server.bm25.build import build
        from retriever_server.bm25.index import Bm25Index

        start = time.monotonic()
        build(folder / "collection.jsonl", folder / "bm25", progress=False, processes=threads)
        self.build_s = time.monotonic() - start
        self.index, self.golds = Bm25Index.load(folder / "bm25", threads), golds

    def __call__(self, queries: Sequence[str]) -> list[int | None]:
        return self.index.gold_ranks(queries, self.golds[: len(queries)], DEPTH)

    def exhaustive(self, queries: Sequence[str]) -> list[int | None]:
        """The ranks by a full search, which scores every passage."""
        found = [[docid for docid, _ in hits] for hits in self.index.search(queries, DEPTH)]
        return ranks_in(found, self.golds)


def ranks_in(found: Sequence[Sequence[str]], golds: Sequence[Sequence[str]]) -> list[int | None]:
    return [docids.index(gold[0]) + 1 if gold[0] in docids else None for docids, gold in zip(found, golds, strict=True)]


def lucene(folder: Path, threads: int) -> tuple[str, Contestant]:
    """The reference path; ValueError where the extra is neither installed nor in .venv/lucene, where scripts/test.sh puts it."""
    sys.path.append(str(Path(__file__).resolve().parents[1] / ".venv" / "lucene"))
    from retriever_server.lucene import LuceneIndex, build

    start = time.monotonic()
    if not (folder / "lucene").exists():
        build(folder / "collection.jsonl", folder / "lucene", threads=threads)
        print(f"lucene: index built in {time.monotonic() - start:.1f} s")
    index = LuceneIndex.load(folder / "lucene")
    return "lucene", lambda queries: index.reference_path(queries, DEPTH, threads)


def bm25s(folder: Path, threads: int) -> tuple[str, Contestant]:
    """bm25s as it comes (numpy) over the same terms, top 100."""
    return f"bm25s-{version('bm25s')}", _bm25s(folder, threads, "numpy")


def bm25s_numba(folder: Path, threads: int) -> tuple[str, Contestant]:
    """The same, compiled."""
    return f"bm25s-{version('bm25s')}-numba", _bm25s(folder, threads, "numba")


def _bm25s(folder: Path, threads: int, backend: str) -> Contestant:
    import bm25s as library

    from convsearch.files import read_jsonl
    from retriever_server.text.analyzer import TermIds, analyze

    term_ids = TermIds()
    ids = [term_ids(record["contents"]) for _, record in read_jsonl(folder / "collection.jsonl")]
    vocabulary = term_ids.vocabulary
    model = library.BM25(k1=0.9, b=0.4, method="lucene", backend=backend)
    model.index(library.tokenization.Tokenized(ids=ids, vocab=vocabulary), show_progress=False)

    def search(queries: Sequence[str]) -> object:
        tokens = [[vocabulary[term] for term in analyze(query) if term in vocabulary] for query in queries]
        query_ids = library.tokenization.Tokenized(ids=tokens, vocab=vocabulary)
        return model.retrieve(query_ids, k=DEPTH, n_threads=threads, show_progress=False, return_as="documents")

    return search


def rank_bm25(folder: Path, threads: int) -> tuple[str, Contestant]:
    """rank_bm25's scores of every passage, in numpy and Python: a round takes its first two queries alone."""
    import numpy as np
    from rank_bm25 import BM25Okapi

    from convsearch.files import read_jsonl
    from retriever_server.text.analyzer import analyze

    model = BM25Okapi(
        [analyze(record["contents"]) for _, record in read_jsonl(folder / "collection.jsonl")], k1=0.9, b=0.4
    )
    return f"rank_bm25-{version('rank_bm25')}", lambda queries: [
        np.argsort(model.get_scores(analyze(query))) for query in queries[:2]
    ]


def compare(args: argparse.Namespace) -> str:
    """Runs everything, prints a table and returns the last line."""
    from benchmarks.collection import generate

    folder = args.work / f"{args.passages}_{args.queries}_{args.source.stem if args.source else 'summaries'}"
    if not (folder / "queries.jsonl").exists():
        generate(folder, args.passages, args.queries, args.source, seed=1)
    rows = [json.loads(line) for line in (folder / "queries.jsonl").read_text(encoding="utf-8").splitlines()]
    queries, golds = [row["query"] for row in rows], [row["gold_docids"] for row in rows]
    ours = Ours(folder, args.threads, golds)
    print(
        f"{args.passages} passages, {len(queries)} queries, {args.threads} threads; our index built or found in {ours.build_s:.1f} s"
    )
    contestants: dict[str, Contestant] = {"gold_ranks": ours}
    reason = "not asked for"
    for peer in (lucene, bm25s, bm25s_numba, rank_bm25):
        if peer.__name__ in args.peers:
            try:
                name, call = peer(folder, args.threads)
                contestants[name] = call
            except (ImportError, Unavailable, ValueError) as error:
                print(f"{peer.__name__}: not run: {error}")
                reason = str(error) if peer is lucene else reason
    seconds, answers = rounds(contestants, queries, args.rounds)
    ours_s = statistics.median(seconds["gold_ranks"])
    print(f"\n{'contestant':<20}{'ms a query':>12}{'ours is faster by':>20}")
    for name, taken in seconds.items():
        print(f"{name:<20}{1000 * statistics.median(taken):>12.3f}{statistics.median(taken) / ours_s:>20.1f}")
    ranks = answers["gold_ranks"]
    reference = ranks_in(answers["lucene"], golds) if "lucene" in answers else ours.exhaustive(queries)
    equal = sum(a == b for a, b in zip(ranks, reference, strict=True))
    print(
        f"gold within the first {DEPTH}: {sum(rank is not None for rank in ranks)} of {len(ranks)}, first: {ranks.count(1)}"
    )
    ratio = f"{statistics.median(seconds['lucene']) / ours_s:.1f}" if "lucene" in seconds else f"nan (lucene: {reason})"
    return f"ratio={ratio} equal={equal}/{len(ranks)} peers={','.join(list(contestants)[1:]) or 'none'}"


def rounds(
    contestants: dict[str, Contestant], queries: Sequence[str], count: int
) -> tuple[dict[str, list[float]], dict[str, Any]]:
    """Seconds a query of each round, after one that warms up; and each contestant's answers."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    answers: dict[str, Any] = {}
    for number in range(count + 1):
        print(f"round {number} of {count}", flush=True)
        for name, call in contestants.items():
            start = time.monotonic()
            answers[name] = call(queries)
            taken = time.monotonic() - start
            if number:
                seconds[name].append(taken / min(len(queries), 2 if name.startswith("rank_bm25") else len(queries)))
    return seconds, answers


def main() -> None:
    print(compare(parser().parse_args()))


if __name__ == "__main__":
    run(main)
