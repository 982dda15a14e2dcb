"""TopiOCQA: ``python -m data_preprocess.topiocqa --input DIR --output DIR``."""

import argparse
from pathlib import Path

from convsearch import cli
from data_preprocess.options import add_split_options, conversations_parser


def build_parser() -> argparse.ArgumentParser:
    parser = conversations_parser("topiocqa", "TopiOCQA")
    add = parser.add_argument
    add("--input", type=Path, metavar="ZIP_OR_DIR", help="folder or zip file with the files below, by public name")
    add("--dataset-train", type=Path, metavar="JSON", help="topiocqa_train.json")
    add("--dataset-dev", type=Path, metavar="JSON", help="topiocqa_dev.json")
    for name in ("train", "dev"):
        golds = f"data/retriever/all_history/{name}.json, with positive_ctxs"
        add(f"--retriever-{name}", type=Path, metavar="JSON", help=golds)
    add("--collection", type=Path, metavar="TSV", help="full_wiki_segments.tsv: id, text, title")
    add("--proxy", action="store_true", help="build pseudo-passages from the conversations, without gold passages")
    add_split_options(parser, validation_conversations=100)
    return parser


def main() -> None:
    arguments = build_parser().parse_args()
    from data_preprocess import topiocqa_data, topiocqa_proxy
    from data_preprocess.sources import locate
    from data_preprocess.writers import OutputFolder

    files = locate(arguments.input, vars(arguments), topiocqa_data.NAMES)
    convert = topiocqa_proxy.convert if arguments.proxy else topiocqa_data.convert
    convert(files, OutputFolder.of(arguments), arguments.validation_conversations, arguments.seed)


if __name__ == "__main__":
    cli.run(main)
