"""Speed of the metrics against the reference's evaluation: ``python -m benchmarks.metrics``.

Writes a seven-column run and qrels of the size of QReCC's test set, times both ways of evaluating them in turns, in
this process, reading the files each time, and takes the best of each. ratio = time of the reference's loop / ours.
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
import pytrec_eval

from benchmarks import alternate
from convsearch.cli import command_parser
from convsearch.cli import run as run_main
from eval.measures import evaluate_files

MEASURES = "MAP MRR NDCG@3 R@5 R@10 R@20 R@100"
PASSAGES = 54_573_064  # of QReCC's collection


def generate(folder: Path, queries: int, depth: int, seed: int) -> tuple[Path, Path]:
    """Writes run.trec (the reference's seven columns) and qrels.trec (0 to 2 golds within the run, one anywhere)."""
    rng = np.random.default_rng(seed)
    run, qrels = folder / "run.trec", folder / "qrels.trec"
    with run.open("w") as run_file, qrels.open("w") as qrels_file:
        for query in range(queries):
            qid = f"QReCC-Test_{query // 6}_{query % 6 + 1}"
            docids = rng.choice(PASSAGES, depth, replace=False).tolist()
            scores = np.sort(rng.uniform(0, 20, depth))[::-1].tolist()
            ranked = enumerate(zip(docids, scores, strict=True))
            run_file.writelines(f"{qid} Q0 {d} {r + 1} {199 - r} {s} ance\n" for r, (d, s) in ranked)
            golds = {*rng.choice(docids, rng.integers(3), replace=False).tolist(), int(rng.integers(PASSAGES))}
            qrels_file.writelines(f"{qid} 0 {docid} 1\n" for docid in golds)
    return run, qrels


def reference_loop(run: Path, qrels: Path, rel_threshold: int = 1) -> dict[str, float]:
    """The reference's way: all lines into a list, split one by one into dictionaries, two passes of pytrec_eval."""
    with run.open() as file:
        run_lines = file.readlines()
    with qrels.open() as file:
        qrel_lines = file.readlines()
    binary: dict[str, dict[str, int]] = {}
    graded: dict[str, dict[str, int]] = {}
    for line in qrel_lines:
        fields = line.strip().split()
        qid, docid, grade = fields[0], fields[2], int(fields[3])
        if qid not in graded:
            graded[qid], binary[qid] = {}, {}
        graded[qid][docid] = grade
        binary[qid][docid] = 1 if grade >= rel_threshold else 0
    scores: dict[str, dict[str, int]] = {}
    for line in run_lines:
        fields = line.split()
        qid = fields[0]
        if qid not in scores:
            scores[qid] = {}
        scores[qid][fields[2]] = int(fields[4])
    asked = {"map", "recip_rank", "recall.5", "recall.10", "recall.20", "recall.100"}
    by_query = pytrec_eval.RelevanceEvaluator(binary, asked).evaluate(scores).values()
    ndcg = pytrec_eval.RelevanceEvaluator(graded, {"ndcg_cut.3"}).evaluate(scores).values()
    names = {"MAP": "map", "MRR": "recip_rank"} | {f"R@{k}": f"recall_{k}" for k in (5, 10, 20, 100)}
    means = {name: float(np.average([values[theirs] for values in by_query])) for name, theirs in names.items()}
    return means | {"NDCG@3": float(np.average([values["ndcg_cut_3"] for values in ndcg]))}


def build_parser() -> argparse.ArgumentParser:
    parser = command_parser("benchmarks.metrics", "Our metrics against the reference's loop.")
    parser.add_argument("--queries", type=int, default=16_451, help="queries of the run, by default as many as QReCC's")
    parser.add_argument("--depth", type=int, default=100, help="passages per query")
    parser.add_argument("--repeats", type=int, default=5, help="how often each runs; the best counts")
    parser.add_argument("--seed", type=int, default=1)
    return parser


def main() -> None:
    args = build_parser().parse_args()
    if min(args.queries, args.depth, args.repeats) < 1 or args.depth < 2:
        raise ValueError("--queries and --repeats must be at least 1, --depth at least 2")
    with tempfile.TemporaryDirectory() as folder:
        run, qrels = generate(Path(folder), args.queries, args.depth, args.seed)
        print(f"{args.queries * args.depth:,} run lines, {run.stat().st_size / 1e6:.0f} MB")
        calls = {"theirs": lambda: reference_loop(run, qrels), "ours": lambda: evaluate_files(run, qrels, MEASURES)}
        seconds, answers = alternate(calls, args.repeats)
    theirs, ours = answers["theirs"], answers["ours"].means()
    theirs_s, ours_s = min(seconds["theirs"]), min(seconds["ours"])
    print(f"reference's loop {theirs_s:.3f} s, eval.metrics {ours_s:.3f} s")
    equal = theirs.keys() == ours.keys() and all(abs(ours[name] - value) <= 1e-12 for name, value in theirs.items())
    print(f"ratio={theirs_s / ours_s:.1f} equal={equal}")


if __name__ == "__main__":
    run_main(main)
