"""The embedded demo: ``python -m data_preprocess.demo --output data/demo``."""

import argparse
from pathlib import Path

from convsearch import cli
from data_preprocess.options import conversations_parser

CONVERSATIONS = Path(__file__).resolve().parents[1] / "assets" / "demo"


def build_parser() -> argparse.ArgumentParser:
    parser = conversations_parser("demo", "The embedded demo")
    add, folder = parser.add_argument, "train.jsonl, validation.jsonl, test.jsonl"
    add("--conversations", type=Path, default=CONVERSATIONS, metavar="DIR", help=folder)
    add("--summaries", type=Path, metavar="JSON", help="Wikipedia summaries (default: of the installed package)")
    return parser


def main() -> None:
    arguments = build_parser().parse_args()
    from data_preprocess.demo_data import convert, find_summaries
    from data_preprocess.writers import OutputFolder

    convert(arguments.conversations, arguments.summaries or find_summaries(), OutputFolder.of(arguments))


if __name__ == "__main__":
    cli.run(main)
