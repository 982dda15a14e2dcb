"""QReCC: ``python -m data_preprocess.qrecc --input DIR --output DIR``."""

import argparse
from pathlib import Path

from convsearch import cli
from data_preprocess.options import add_split_options, conversations_parser


def build_parser() -> argparse.ArgumentParser:
    parser = conversations_parser("qrecc", "QReCC")
    add = parser.add_argument
    add("--input", type=Path, metavar="DIR", help="find the files below in a folder, by their public names")
    add("--train", type=Path, metavar="JSON", help="scai-qrecc21-training-turns.json")
    add("--test", type=Path, metavar="JSON", help="scai-qrecc21-test-turns.json")
    add("--passages", type=Path, metavar="ZIP", help="passages.zip; it is not unpacked")
    add("--without-collection", action="store_true", help="write conversations, qrels and parquet only")
    add("--without-train", action="store_true", help="write the test set only")
    add_split_options(parser, validation_conversations=100)
    return parser


def main() -> None:
    arguments = build_parser().parse_args()
    from data_preprocess.qrecc_data import convert, find_files
    from data_preprocess.writers import OutputFolder

    files = find_files(arguments.input, vars(arguments), arguments.without_train, arguments.without_collection)
    convert(files, OutputFolder.of(arguments), arguments.validation_conversations, arguments.seed)


if __name__ == "__main__":
    cli.run(main)
