"""Dense gold ranks against a flat search of depth 100: ``python -m benchmarks.dense_rank --passages 50000 --queries 64``.

CPU: ours (int8 codes, exact products where they leave a doubt) and faiss IndexFlatIP on the same vectors, with equal thread counts, in turns; the
best of each counts, and of faiss's two ways (products by BLAS or by its own loops; which it takes by default depends on the version) the faster.
``--device cuda``: half precision with exact products, against torch's float32 product and top-k, and what share of the device's measured
half-precision product rate and read bandwidth it reaches. ratio = time of the peer / ours. ``equal``: queries whose rank (or "beyond 100") is that
of the peer's list, whose passages are put in order by the exact score where theirs are too close to tell.
"""

import argparse
import os
import time
from collections.abc import Callable
from typing import Any

from convsearch.cli import run as run_main

DEPTH = 100


def generate(passages: int, queries: int, dim: int, seed: int) -> tuple[Any, Any, Any]:
    """(vectors, queries, gold rows): vectors in clusters around a common direction, as encoders make them; queries near their golds, more or less."""
    import numpy as np

    rng = np.random.default_rng(seed)
    common = rng.standard_normal(dim, np.float32)
    centres = rng.standard_normal((max(1, passages // 200), dim), np.float32) * 0.5
    vectors = np.empty((passages, dim), np.float32)
    for start in range(0, passages, 10_000):
        block = vectors[start : start + 10_000]
        block[:] = (
            rng.standard_normal(block.shape, np.float32) * 0.5
            + centres[rng.integers(len(centres), size=len(block))]
            + common
        )
    golds = rng.integers(passages, size=queries)
    noise = rng.uniform(0.2, 2.5, (queries, 1)).astype(np.float32)
    return vectors, vectors[golds] + rng.standard_normal((queries, dim), np.float32) * noise, golds


def alternate(
    calls: dict[str, Callable[[], Any]], repeats: int, wait: Callable[[], None] = lambda: None
) -> tuple[dict[str, float], dict[str, Any]]:
    """(best seconds, last answer) of each call, made in turns after one turn that is not timed."""
    best: dict[str, float] = {}
    answers: dict[str, Any] = {}
    for turn in range(repeats + 1):
        for name, call in calls.items():
            wait()
            start = time.perf_counter()
            answers[name] = call()
            wait()
            seconds = time.perf_counter() - start
            if turn:
                best[name] = min(seconds, best.get(name, seconds))
    return best, answers


def equal_ranks(scanner: Any, queries: Any, golds: Any, counts: Any, listed: Any) -> int:
    """How many counts agree with the peer's lists of rows."""
    equal = 0
    for query, gold, count, rows in zip(queries, golds.tolist(), counts.tolist(), listed, strict=True):
        scores, score = scanner.score(query, rows), scanner.score(query, golds[:1] * 0 + gold)[0]
        beating = int(((scores > score) | ((scores == score) & (rows < gold))).sum())
        found = bool((rows == gold).any())
        equal += count == beating if found else count >= DEPTH - 1
    return equal


def on_cpu(args: argparse.Namespace) -> str:
    import numpy as np
    import torch

    torch.set_num_threads(args.threads)
    from retriever_server.dense.flat import Flat, count_beating

    vectors, queries, golds = generate(args.passages, args.queries, args.dim, args.seed)
    scanner = Flat(vectors)
    calls: dict[str, Callable[[], Any]] = {
        f"ours ({scanner.coarse})": lambda: count_beating(scanner, queries, golds[:, None].tolist(), DEPTH)
    }
    ours, theirs, peer = next(iter(calls)), "faiss IndexFlatIP", "faiss-cpu"
    try:
        import faiss  # type: ignore[import-not-found, unused-ignore]

        faiss.omp_set_num_threads(args.threads)
        index: Any = faiss.IndexFlatIP(args.dim)
        index.add(vectors)

        def search(blas_from: int) -> Any:
            faiss.cvar.distance_compute_blas_threshold = (
                blas_from  # queries from which on faiss leaves the products to its BLAS
            )
            return index.search(queries, min(DEPTH, args.passages))

        calls[f"{theirs}, BLAS"] = lambda: search(1)
        calls[f"{theirs}, no BLAS"] = lambda: search(1 << 30)
        peer = f"faiss-cpu-{faiss.__version__}"
    except ImportError:
        print("faiss is not installed: pip install faiss-cpu==1.15.1")
    best, answers = alternate(calls, args.repeats)
    report(best, args.queries)
    peers = [name for name in best if name.startswith(theirs)]
    if not peers:
        brute = np.argsort(-(queries @ vectors.T), axis=1, kind="stable")[:, :DEPTH]
        equal = equal_ranks(scanner, queries, golds, answers[ours], brute)
        return f"ratio=nan (faiss is not installed) equal={equal}/{args.queries} peers=numpy-{np.__version__}"
    equal = equal_ranks(scanner, queries, golds, answers[ours], answers[peers[0]][1])
    return f"ratio={min(best[name] for name in peers) / best[ours]:.2f} equal={equal}/{args.queries} peers={peer}"


def on_device(args: argparse.Namespace) -> str:
    import torch

    if not torch.cuda.is_available():
        return f"ratio=nan (torch sees no CUDA device) equal=0/{args.queries} peers=torch-{torch.__version__}"
    from retriever_server.dense.codes import Codes
    from retriever_server.dense.device import Device
    from retriever_server.dense.flat import count_beating

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
    best, answers = alternate(calls, args.repeats, torch.cuda.synchronize)
    report(best, args.queries)
    limit = max(best["half product"], best["read of the halves"])
    print(
        f"limit (the slower of one half-precision product and one read of the vectors): ours reaches {limit / best['ours (half)']:.2f} of it"
    )
    equal = equal_ranks(scanner, queries, golds, answers["ours (half)"], answers["torch float32"].cpu().numpy())
    return f"ratio={best['torch float32'] / best['ours (half)']:.2f} equal={equal}/{args.queries} peers=torch-{torch.__version__}"


def report(best: dict[str, float], queries: int) -> None:
    for name, seconds in best.items():
        print(f"{name:<26} {seconds * 1e3:9.1f} ms {queries / seconds:10.0f} queries/s")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.dense_rank", description="Dense gold ranks against a flat search of depth 100."
    )
    parser.add_argument("--passages", type=int, default=50_000)
    parser.add_argument("--queries", type=int, default=64)
    parser.add_argument("--dim", type=int, default=768)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="of each (default: all)")
    parser.add_argument("--repeats", type=int, default=5, help="times that each is run; the best counts")
    parser.add_argument("--device", default="cpu", help="cpu, or cuda")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    if min(args.passages, args.queries, args.dim, args.threads, args.repeats) < 1:
        raise ValueError("--passages, --queries, --dim, --threads and --repeats must be at least 1")
    print(f"{args.passages:,} x {args.dim} float32, {args.queries} queries, {args.threads} threads")
    print(on_cpu(args) if args.device == "cpu" else on_device(args))


if __name__ == "__main__":
    run_main(main)
