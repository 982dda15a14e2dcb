"""Collections of any size from real sentences, with queries of about fifty terms that have a gold passage.

``python -m benchmarks.collection --passages 1000000 --queries 2000 --output DIR`` writes collection.jsonl and
queries.jsonl. The sentences are those of --source (a collection.jsonl of {"id", "contents"}), by default of the
embedded Wikipedia summaries. A passage is some random sentences, as long as passages of Wikipedia are; a query is one
sentence of its gold passage among sentences of others.
"""

import argparse
import json
import random
import re
from collections.abc import Iterator
from pathlib import Path

from benchmarks import add_source
from convsearch.cli import command_parser, run
from convsearch.files import atomic_write, read_jsonl
from data_preprocess.demo_data import find_summaries, read_articles
from retriever_server.text.analyzer import analyze

WORDS = (60, 130)  # of a passage: TopiOCQA's have at most 100 words, and 70 terms on average
QUERY_TERMS = 50


def build_parser() -> argparse.ArgumentParser:
    parser = command_parser("benchmarks.collection", __doc__)
    parser.add_argument("--passages", type=int, default=100_000, help="how many")
    parser.add_argument("--queries", type=int, default=1000, help="how many")
    add_source(parser)
    parser.add_argument("--output", type=Path, required=True, help="folder")
    parser.add_argument("--seed", type=int, default=1)
    return parser


def sentences(source: Path | None) -> list[str]:
    """Distinct sentences of 4 to 60 words, in order of appearance."""
    if source is None:
        articles = read_articles(find_summaries()).values()
        texts: Iterator[str] = (" ".join([article.title, *article.sentences]) for article in articles)
    else:
        texts = (record["contents"] for _, record in read_jsonl(source))
    found = dict.fromkeys(
        sentence for text in texts for sentence in re.split(r"(?<=[.!?])\s+", text) if 4 <= sentence.count(" ") <= 60
    )
    return list(found)


def passages(pool: list[str], count: int, seed: int) -> Iterator[list[str]]:
    """``count`` passages as lists of sentences."""
    draw = random.Random(seed)
    for _ in range(count):
        wanted, words = draw.randint(*WORDS), 0
        passage = []
        while words < wanted:
            sentence = pool[int(draw.random() * len(pool))]
            passage.append(sentence)
            words += sentence.count(" ") + 1
        yield passage


def generate(output: Path, num_passages: int, num_queries: int, source: Path | None, seed: int) -> None:
    """Writes ``collection.jsonl`` and ``queries.jsonl`` ({"query", "gold_docids"}) into the folder ``output``."""
    pool, draw = sentences(source), random.Random(seed + 1)
    golds = set(draw.sample(range(num_passages), min(num_queries, num_passages)))
    with atomic_write(output / "collection.jsonl") as collection, atomic_write(output / "queries.jsonl") as queries:
        for number, passage in enumerate(passages(pool, num_passages, seed)):
            docid = f"p{number:08d}"
            collection.write(json.dumps({"id": docid, "contents": " ".join(passage)}, ensure_ascii=False) + "\n")
            if number in golds:
                parts = [draw.choice(passage)]
                while len(analyze(" ".join(parts))) < QUERY_TERMS:
                    parts.append(draw.choice(pool))
                queries.write(json.dumps({"query": " ".join(parts), "gold_docids": [docid]}, ensure_ascii=False) + "\n")


def kept_collection(work: Path, num_passages: int, num_queries: int, source: Path | None) -> Path:
    """The folder below ``work`` with this collection, which is made if it is missing."""
    folder = work / f"{num_passages}_{num_queries}_{source.stem if source else 'summaries'}"
    if not (folder / "queries.jsonl").exists():
        generate(folder, num_passages, num_queries, source, seed=1)
    return folder


def main() -> None:
    args = build_parser().parse_args()
    generate(args.output, args.passages, args.queries, args.source, args.seed)
    print(f"{args.output}: {args.passages} passages and {min(args.queries, args.passages)} queries")


if __name__ == "__main__":
    run(main)
