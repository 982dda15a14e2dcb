"""Gold ranks: this engine against the reference server's path, bm25s and rank_bm25.

``python -m benchmarks.gold_rank --passages 100000 --queries 200``. The reference path is a Lucene batch search of depth
100, after which each hit's id is read from its stored JSON. All have the same collection, queries and number of
threads; the contestants take turns, and the median round counts. The last line is ``ratio=… equal=n/n peers=…``: how
many times the reference path's throughput, and on how many queries the ranks agree with Lucene's (with an exhaustive
search if Lucene is not installed, and then the ratio is nan).
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path

import numpy as np

from benchmarks import add_source, add_threads, add_work, alternate, timed
from benchmarks.collection import kept_collection
from convsearch.cli import Unavailable, command_parser, run
from convsearch.files import read_jsonl
from retriever_server.bm25.build import build
from retriever_server.bm25.index import Bm25Index
from retriever_server.text.analyzer import TermIds, analyze

DEPTH = 100
Contestant = Callable[[Sequence[str]], object]


def build_parser() -> argparse.ArgumentParser:
    parser = command_parser("benchmarks.gold_rank", __doc__)
    add = parser.add_argument
    add("--passages", type=int, default=100_000, help="collection size")
    add("--queries", type=int, default=200, help="queries per round")
    add("--rounds", type=int, default=3, help="rounds; each contestant runs once per round")
    add_threads(parser, "threads of every contestant but rank_bm25")
    add_source(parser)
    add_work(parser)
    add("--peers", nargs="*", default=[*PEERS], help="whom to run against")
    return parser


class Ours:
    """Bm25Index.gold_ranks."""

    def __init__(self, folder: Path, threads: int, golds: list[list[str]]) -> None:
        make = partial(build, [folder / "collection.jsonl"], folder / "bm25", 0.9, 0.4)
        self.build_s = timed(partial(make, progress=False, processes=threads))[1]
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
    """The reference path.

    Raises:
        ValueError: the extra is neither installed nor in .venv/lucene, where scripts/test.sh puts it.
    """
    sys.path.append(str(Path(__file__).resolve().parents[1] / ".venv" / "lucene"))
    from retriever_server import lucene as library

    if not (folder / "lucene").exists():
        build_lucene = partial(library.build, folder / "collection.jsonl", folder / "lucene", threads=threads)
        print(f"lucene: index built in {timed(build_lucene)[1]:.1f} s")
    index = library.LuceneIndex.load(folder / "lucene")
    return "lucene", lambda queries: index.reference_path(queries, DEPTH, threads)


def bm25s(folder: Path, threads: int, backend: str = "numpy") -> tuple[str, Contestant]:
    """bm25s with its default backend over the same terms, top 100."""
    import bm25s as library

    term_ids = TermIds()
    ids = [term_ids(record["contents"]) for _, record in read_jsonl(folder / "collection.jsonl")]
    vocabulary = term_ids.vocabulary
    model = library.BM25(k1=0.9, b=0.4, method="lucene", backend=backend)
    model.index(library.tokenization.Tokenized(ids=ids, vocab=vocabulary), show_progress=False)

    def search(queries: Sequence[str]) -> object:
        tokens = [[vocabulary[term] for term in analyze(query) if term in vocabulary] for query in queries]
        query_ids = library.tokenization.Tokenized(ids=tokens, vocab=vocabulary)
        return model.retrieve(query_ids, k=DEPTH, n_threads=threads, show_progress=False, return_as="documents")

    return f"bm25s-{version('bm25s')}" + ("" if backend == "numpy" else f"-{backend}"), search


def rank_bm25(folder: Path, threads: int) -> tuple[str, Contestant]:
    """rank_bm25's scores of every passage, in numpy and Python: a round runs only its first two queries."""
    from rank_bm25 import BM25Okapi

    terms = [analyze(record["contents"]) for _, record in read_jsonl(folder / "collection.jsonl")]
    model = BM25Okapi(terms, k1=0.9, b=0.4)

    def search(queries: Sequence[str]) -> object:
        return [np.argsort(model.get_scores(analyze(query))) for query in queries[:2]]

    return f"rank_bm25-{version('rank_bm25')}", search


PEERS: dict[str, Callable[[Path, int], tuple[str, Contestant]]] = {
    "lucene": lucene,
    "bm25s": bm25s,
    "bm25s_numba": partial(bm25s, backend="numba"),
    "rank_bm25": rank_bm25,
}


def compare(args: argparse.Namespace) -> str:
    """Runs everything, prints a table and returns the last line."""
    folder = kept_collection(args.work, args.passages, args.queries, args.source)
    rows = [json.loads(line) for line in (folder / "queries.jsonl").read_text(encoding="utf-8").splitlines()]
    queries, golds = [row["query"] for row in rows], [row["gold_docids"] for row in rows]
    ours = Ours(folder, args.threads, golds)
    sizes = f"{args.passages} passages, {len(queries)} queries, {args.threads} threads"
    print(f"{sizes}; our index built or found in {ours.build_s:.1f} s")
    contestants: dict[str, Contestant] = {"gold_ranks": ours}
    reason = "not asked for"
    for peer in (peer for peer in PEERS if peer in args.peers):
        try:
            contestants |= [PEERS[peer](folder, args.threads)]
        except (ImportError, Unavailable, ValueError) as error:
            print(f"{peer}: not run: {error}")
            reason = str(error) if peer == "lucene" else reason
    seconds, answers = alternate({name: partial(call, queries) for name, call in contestants.items()}, args.rounds)
    counts = {name: min(len(queries), 2) if name.startswith("rank_bm25") else len(queries) for name in seconds}
    per_query = {name: statistics.median(taken) / counts[name] for name, taken in seconds.items()}
    ours_s = per_query["gold_ranks"]
    print(f"\n{'contestant':<20}{'ms per query':>12}{'ours is faster by':>20}")
    for name, taken in per_query.items():
        print(f"{name:<20}{1000 * taken:>12.3f}{taken / ours_s:>20.1f}")
    ranks = answers["gold_ranks"]
    reference = ranks_in(answers["lucene"], golds) if "lucene" in answers else ours.exhaustive(queries)
    equal = sum(a == b for a, b in zip(ranks, reference, strict=True))
    found = sum(rank is not None for rank in ranks)
    print(f"gold within the first {DEPTH}: {found} of {len(ranks)}, first: {ranks.count(1)}")
    ratio = f"{per_query['lucene'] / ours_s:.1f}" if "lucene" in per_query else f"nan (lucene: {reason})"
    return f"ratio={ratio} equal={equal}/{len(ranks)} peers={','.join(list(contestants)[1:]) or 'none'}"


def main() -> None:
    print(compare(build_parser().parse_args()))


if __name__ == "__main__":
    run(main)
