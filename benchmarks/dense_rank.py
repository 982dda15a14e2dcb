"""Dense gold ranks against a flat search of depth 100: ``python -m benchmarks.dense_rank``.

CPU: ours (int8 codes, exact products for doubtful cases) and faiss IndexFlatIP on the same vectors, with equal thread
counts, in turns. The best time of each counts, and of faiss's two ways the faster (products by BLAS or by its own
loops; its default depends on the version). ``--device cuda``: half precision with exact products, against torch's
float32 product and top-k, and its share of the device's measured half-precision product rate and read bandwidth.

ratio = time of the peer / ours. ``equal``: queries whose rank (or "beyond 100") is that of the peer's list; passages
whose scores are too close in that list are ordered by the exact score.
"""

import argparse
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from benchmarks import add_threads, alternate
from convsearch.cli import command_parser, run
from retriever_server.dense.codes import Codes
from retriever_server.dense.device import Device
from retriever_server.dense.flat import Flat, count_beating

DEPTH, FAISS = 100, "faiss IndexFlatIP"


def generate(passages: int, queries: int, dim: int, seed: int) -> tuple[Any, Any, Any]:
    """(vectors, queries, gold rows): vectors in clusters around a common direction, like those of encoders.

    The queries are more or less near to their golds.
    """
    rng = np.random.default_rng(seed)
    common = rng.standard_normal(dim, np.float32)
    centres = rng.standard_normal((max(1, passages // 200), dim), np.float32) * 0.5
    vectors = np.empty((passages, dim), np.float32)
    for start in range(0, passages, 10_000):
        block = vectors[start : start + 10_000]
        noise = rng.standard_normal(block.shape, np.float32) * 0.5
        block[:] = noise + centres[rng.integers(len(centres), size=len(block))] + common
    golds = rng.integers(passages, size=queries)
    spread = rng.uniform(0.2, 2.5, (queries, 1)).astype(np.float32)
    return vectors, vectors[golds] + rng.standard_normal((queries, dim), np.float32) * spread, golds


def equal_ranks(scanner: Any, queries: Any, golds: Any, counts: Any, listed: Any) -> int:
    """How many counts agree with the peer's lists of rows."""
    equal = 0
    for query, gold, count, rows in zip(queries, golds.tolist(), counts.tolist(), listed, strict=True):
        scores, score = scanner.score(query, rows), scanner.score(query, golds[:1] * 0 + gold)[0]
        beating = int(((scores > score) | ((scores == score) & (rows < gold))).sum())
        found = bool((rows == gold).any())
        equal += count == beating if found else count >= DEPTH - 1
    return equal


def faiss_searches(vectors: Any, queries: Any, threads: int) -> tuple[str, dict[str, Callable[[], Any]]]:
    """(name with version, name -> search) of faiss's two ways of making products; ("", {}) if it is not installed."""
    try:
        import faiss  # type: ignore[import-not-found, unused-ignore]
    except ImportError:
        print("faiss is not installed: pip install faiss-cpu==1.15.1")
        return "", {}
    faiss.omp_set_num_threads(threads)
    index: Any = faiss.IndexFlatIP(vectors.shape[1])
    index.add(vectors)

    def search(blas_from: int) -> Any:
        faiss.cvar.distance_compute_blas_threshold = blas_from  # least number of queries for its BLAS
        return index.search(queries, min(DEPTH, len(vectors)))

    calls = {f"{FAISS}, BLAS": lambda: search(1), f"{FAISS}, no BLAS": lambda: search(1 << 30)}
    return f"faiss-cpu-{faiss.__version__}", calls


def on_cpu(args: argparse.Namespace) -> str:
    torch.set_num_threads(args.threads)
    vectors, queries, golds = generate(args.passages, args.queries, args.dim, args.seed)
    scanner = Flat(vectors)
    ours, gold_lists = f"ours ({scanner.coarse})", golds[:, None].tolist()
    peer, searches = faiss_searches(vectors, queries, args.threads)
    calls = {ours: lambda: count_beating(scanner, queries, gold_lists, DEPTH), **searches}
    seconds, answers = alternate(calls, args.repeats)
    best = report(seconds, args.queries)
    if not searches:
        brute = np.argsort(-(queries @ vectors.T), axis=1, kind="stable")[:, :DEPTH]
        equal = equal_ranks(scanner, queries, golds, answers[ours], brute)
        return f"ratio=nan (faiss is not installed) equal={equal}/{args.queries} peers=numpy-{np.__version__}"
    equal = equal_ranks(scanner, queries, golds, answers[ours], answers[next(iter(searches))][1])
    return f"ratio={min(best[name] for name in searches) / best[ours]:.2f} equal={equal}/{args.queries} peers={peer}"


def on_device(args: argparse.Namespace) -> str:
    if not torch.cuda.is_available():
        return f"ratio=nan (torch sees no CUDA device) equal=0/{args.queries} peers=torch-{torch.__version__}"
    vectors, queries, golds = generate(args.passages, args.queries, args.dim, args.seed)
    scanner = Device(vectors, Codes.of(vectors), args.device)
    matrix, asked = torch.from_numpy(vectors).to(args.device), torch.from_numpy(queries).to(args.device)
    half, half_asked = matrix.half(), asked.half()
    calls: dict[str, Callable[[], Any]] = {
        "ours (half)": lambda: count_beating(scanner, queries, golds[:, None].tolist(), DEPTH),
        "torch float32": lambda: torch.topk(asked @ matrix.T, min(DEPTH, args.passages)).indices,
        "half product": lambda: torch.mm(half_asked, half.T),
        "read of the halves": lambda: half.view(torch.int32).amax(),
    }
    seconds, answers = alternate(calls, args.repeats, torch.cuda.synchronize)
    best = report(seconds, args.queries)
    limit = max(best["half product"], best["read of the halves"])
    ours, theirs = best["ours (half)"], best["torch float32"]
    share = f"ours reaches {limit / ours:.2f} of it"
    print(f"limit (the slower of one half-precision product and one read of the vectors): {share}")
    equal = equal_ranks(scanner, queries, golds, answers["ours (half)"], answers["torch float32"].cpu().numpy())
    return f"ratio={theirs / ours:.2f} equal={equal}/{args.queries} peers=torch-{torch.__version__}"


def report(seconds: dict[str, list[float]], queries: int) -> dict[str, float]:
    """Prints and returns the best time of each."""
    best = {name: min(taken) for name, taken in seconds.items()}
    for name, taken in best.items():
        print(f"{name:<26} {taken * 1e3:9.1f} ms {queries / taken:10.0f} queries/s")
    return best


def build_parser() -> argparse.ArgumentParser:
    parser = command_parser("benchmarks.dense_rank", "Dense gold ranks against a flat search of depth 100.")
    add = parser.add_argument
    add("--passages", type=int, default=50_000)
    add("--queries", type=int, default=64)
    add("--dim", type=int, default=768)
    add_threads(parser, "threads of each")
    add("--repeats", type=int, default=5, help="how often each runs; the best counts")
    add("--device", default="cpu", help="cpu, or cuda")
    add("--seed", type=int, default=1)
    return parser


def main() -> None:
    args = build_parser().parse_args()
    if min(args.passages, args.queries, args.dim, args.threads, args.repeats) < 1:
        raise ValueError("--passages, --queries, --dim, --threads and --repeats must be at least 1")
    print(f"{args.passages:,} x {args.dim} float32, {args.queries} queries, {args.threads} threads")
    print(on_cpu(args) if args.device == "cpu" else on_device(args))


if __name__ == "__main__":
    run(main)
