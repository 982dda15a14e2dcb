"""The embedded demo: ``python -m data_preprocess.demo --output data/demo``."""

import argparse
from pathlib import Path

from convsearch import cli
from data_preprocess.options import PromptOptions, add_prompt_options, data_parser

CONVERSATIONS = Path(__file__).resolve().parents[1] / "assets" / "demo"


def build_parser() -> argparse.ArgumentParser:
    parser = data_parser("demo", "The embedded demo -> conversations, collection, qrels, parquet.")
    add, folder = parser.add_argument, "train.jsonl, validation.jsonl, test.jsonl"
    add("--conversations", type=Path, default=CONVERSATIONS, metavar="DIR", help=folder)
    summaries = "the Wikipedia summaries (default: those of the installed package)"
    add("--summaries", type=Path, metavar="JSON", help=summaries)
    add_prompt_options(parser)
    return parser


def main() -> None:
    arguments = build_parser().parse_args()
    from data_preprocess.demo_data import convert, find_summaries
    from data_preprocess.writers import OutputFolder

    folder = OutputFolder(arguments.output, arguments.skip_bad)
    convert(arguments.conversations, arguments.summaries or find_summaries(), folder, PromptOptions.of(arguments))


if __name__ == "__main__":
    cli.run(main)
