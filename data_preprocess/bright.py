"""BRIGHT (Su et al., ICLR 2025) -> collection, topics, qrels and excluded ids of each task.

    python -m data_preprocess.download bright --output data/raw/bright
    python -m data_preprocess.bright --input data/raw/bright --output data/bright [--long] [--task biology ...]

The input has documents/, long_documents/ and examples/ as released (parquet, or JSON lines, gzipped or not).
``<task>/`` gets collection.jsonl ({"id", "contents"}), topics.jsonl ({"id", "query", "excluded_ids"}), qrels.trec and
excluded.json; with --long ``<task>_long/`` gets the same from the unsplit documents.
"""

import argparse
from pathlib import Path

from convsearch import cli
from data_preprocess.options import data_parser
from data_preprocess.releases import BRIGHT_TASKS


def build_parser() -> argparse.ArgumentParser:
    parser = data_parser("bright", __doc__)
    add, names = parser.add_argument, [*BRIGHT_TASKS]
    add("--input", type=Path, required=True, metavar="DIR", help="folder with documents/, long_documents/, examples/")
    add("--task", nargs="+", choices=names, default=names, metavar="TASK", help="some of the 12 tasks")
    add("--long", action="store_true", help="the unsplit documents")
    return parser


def main() -> None:
    arguments = build_parser().parse_args()
    from data_preprocess.bright_data import convert

    for task in arguments.task:
        convert(arguments.input, arguments.output, task, arguments.long, arguments.skip_bad)


if __name__ == "__main__":
    cli.run(main)
