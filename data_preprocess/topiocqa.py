"""TopiOCQA: ``python -m data_preprocess.topiocqa --input DIR --output DIR``."""

import argparse
from pathlib import Path

from convsearch import cli
from data_preprocess.options import PromptOptions, add_prompt_options, add_split_options, data_parser


def build_parser() -> argparse.ArgumentParser:
    parser = data_parser("topiocqa", "TopiOCQA -> conversations, collection, qrels, parquet.")
    add = parser.add_argument
    place = "find the files below in a folder or zip file, by their public names"
    add("--input", type=Path, metavar="ZIP_OR_DIR", help=place)
    add("--dataset-train", type=Path, metavar="JSON", help="topiocqa_train.json")
    add("--dataset-dev", type=Path, metavar="JSON", help="topiocqa_dev.json")
    for name in ("train", "dev"):
        golds = f"data/retriever/all_history/{name}.json, with positive_ctxs"
        add(f"--retriever-{name}", type=Path, metavar="JSON", help=golds)
    add("--collection", type=Path, metavar="TSV", help="full_wiki_segments.tsv: id, text, title")
    add("--proxy", action="store_true", help="build pseudo-passages from the conversations, without gold passages")
    add_prompt_options(parser)
    add_split_options(parser, validation_conversations=100)
    return parser


def main() -> None:
    arguments = build_parser().parse_args()
    from data_preprocess import topiocqa_data, topiocqa_proxy
    from data_preprocess.writers import OutputFolder

    files = topiocqa_data.Files.locate(arguments.input, vars(arguments))
    folder = OutputFolder(arguments.output, arguments.skip_bad)
    convert = topiocqa_proxy.convert if arguments.proxy else topiocqa_data.convert
    convert(files, folder, PromptOptions.of(arguments), arguments.validation_conversations, arguments.seed)


if __name__ == "__main__":
    cli.run(main)
