"""MTRAG: ``python -m data_preprocess.mtrag --input DIR --output DIR``."""

import argparse
from pathlib import Path

from convsearch import cli
from data_preprocess.options import add_split_options, conversations_parser

FRACTIONS = {"train": 0.6, "validation": 0.1, "test": 0.3}


def build_parser() -> argparse.ArgumentParser:
    parser = conversations_parser("mtrag", "MTRAG")
    add, place = parser.add_argument, "queries.jsonl, corpus.jsonl, qrels.trec; or IBM's repository"
    add("--input", type=Path, required=True, metavar="DIR", help=place)
    for split, fraction in FRACTIONS.items():
        add(f"--{split}-fraction", type=float, default=fraction, metavar="F", help="share of the conversations")
    add_split_options(parser)
    return parser


def main() -> None:
    arguments = build_parser().parse_args()
    from data_preprocess.mtrag_data import convert
    from data_preprocess.writers import OutputFolder

    fractions = {split: getattr(arguments, f"{split}_fraction") for split in FRACTIONS}
    convert(arguments.input, OutputFolder.of(arguments), fractions, arguments.seed)


if __name__ == "__main__":
    cli.run(main)
