"""TopiOCQA (Adlakha et al., TACL 2022) -> conversations, collection, qrels and parquet.

Three releases belong together: the conversations (topiocqa_train.json, topiocqa_dev.json), the gold passages (the retriever's
all_history/train.json and dev.json) and 25.7 million Wikipedia passages (full_wiki_segments.tsv). ``--proxy`` needs the first alone:
see data_preprocess/topiocqa_proxy.py.
"""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass, fields
from itertools import zip_longest
from pathlib import Path
from typing import Any

from convsearch import cli
from data_preprocess import topiocqa_proxy
from data_preprocess.options import add_common_options, prompt_options
from data_preprocess.sources import BadRecords, Source, find_sources, pick, read_records, read_table
from data_preprocess.splits import hold_out
from data_preprocess.topiocqa_turns import conversation_ids, turn_record
from data_preprocess.writers import (
    OutputFolder,
    PromptOptions,
    Row,
    read_golds,
    split_files,
    write_collection,
    write_splits,
)

RETRIEVER_URL = "https://zenodo.org/records/6151011 (data/retriever/all_history/train.json and dev.json)"
COLLECTION_URL = "https://zenodo.org/records/6149599 (data/wikipedia_split/full_wiki_segments.tsv)"
DATASET_URL = "https://zenodo.org/records/7709644 (topiocqa_train.json and topiocqa_dev.json)"


@dataclass(frozen=True, slots=True)
class Files:
    """The five raw files; None where one has not been found."""

    dataset_train: Source | None = None
    dataset_dev: Source | None = None
    retriever_train: Source | None = None
    retriever_dev: Source | None = None
    collection: Source | None = None

    @classmethod
    def locate(cls, place: Path) -> "Files":
        """Finds the files in a folder (and the zip files in it) or in a zip file, by the names of the public releases."""
        sources = find_sources(place)
        return cls(
            pick(sources, "topiocqa_train.json", "topiocqa_dataset/train.json"),
            pick(sources, "topiocqa_dev.json", "topiocqa_dataset/dev.json"),
            pick(sources, "retriever/all_history/train.json", "all_history/train.json"),
            pick(sources, "retriever/all_history/dev.json", "all_history/dev.json"),
            pick(sources, "full_wiki_segments.tsv"),
        )

    def conversations(self) -> tuple[Source, Source]:
        if self.dataset_train is None or self.dataset_dev is None:
            raise ValueError(
                f"TopiOCQA's conversations are missing: give --dataset-train and --dataset-dev, from {DATASET_URL}"
            )
        return self.dataset_train, self.dataset_dev

    def golds(self) -> tuple[Source, Source, Source]:
        """The gold passages of train and dev and the collection.

        Raises:
            ValueError: they are not there; says which, where to get them, and that ``--proxy`` does without.
        """
        if self.retriever_train is None or self.retriever_dev is None or self.collection is None:
            missing = [
                f"--{name.replace('_', '-')}"
                for name in ("retriever_train", "retriever_dev", "collection")
                if getattr(self, name) is None
            ]
            raise ValueError(
                f"TopiOCQA's conversations hold no gold passages, and {', '.join(missing)} did not come with them: "
                f"get the gold passages from {RETRIEVER_URL} and the collection from {COLLECTION_URL}, "
                "by hand or by python -m data_preprocess.download topiocqa, "
                "or pass --proxy to build pseudo-passages from the conversations alone"
            )
        return self.retriever_train, self.retriever_dev, self.collection


def gold_rows(
    dataset: Source, retriever: Source, own_split: str, validation: frozenset[str], bad: BadRecords
) -> Iterator[Row]:
    """Joins turns and gold passages, which stand in one order in the two files. As in the reference's qrels the first gold passage counts.

    Raises:
        ValueError: the two files do not go together.
    """
    turns, golds = read_records(dataset, bad, f"topiocqa {own_split}"), read_records(retriever, bad)
    for turn, gold in zip_longest(turns, golds):
        if turn is None or gold is None:
            raise ValueError(
                f"{dataset} and {retriever} do not hold the same number of turns: they are not of one release"
            )
        with bad.tolerate():
            record = turn_record(turn, own_split)
            if (gold.number("conv_id"), gold.number("turn_id")) != (record["conv_id"], record["turn_id"]):
                raise ValueError(
                    f"{gold.where}: fields 'conv_id' and 'turn_id' are {gold.number('conv_id')} and {gold.number('turn_id')}, "
                    f"but the turn beside it ({turn.where}) is {record['conv_id']} and {record['turn_id']}: they are not of one release"
                )
            passages = gold.objects("positive_ctxs")
            if not passages:
                raise gold.error("positive_ctxs", "is empty")
            record["gold_docids"] = [passages[0].docid("passage_id")]
            record["positive_ctxs"] = [passage.data for passage in passages]
            yield Row(
                "validation" if own_split == "train" and str(record["conv_id"]) in validation else own_split,
                record,
                turn.where,
            )


def passages(collection: Source, bad: BadRecords) -> Iterator[tuple[str, str]]:
    """(id, title + " " + text) of full_wiki_segments.tsv; " [SEP] " between article and section becomes a space, as in the reference."""
    for row in read_table(collection, ("id", "text", "title"), bad, "topiocqa collection"):
        with bad.tolerate():
            yield row.docid("id"), f"{row.data['title'].replace(' [SEP] ', ' ')} {row.data['text']}"


def convert(
    files: Files, folder: OutputFolder, prompt: PromptOptions, validation_conversations: int, seed: int
) -> None:
    """The whole data set: train and validation (out of train), dev, collection."""
    dataset_train, dataset_dev = files.conversations()
    retriever_train, retriever_dev, collection = files.golds()
    splits = ["train", "validation"] if validation_conversations else ["train"]

    def make_train(bad: BadRecords) -> dict[str, Any]:
        validation = (
            hold_out(conversation_ids(dataset_train), validation_conversations, seed)
            if validation_conversations
            else frozenset[str]()
        )
        rows = gold_rows(dataset_train, retriever_train, "train", validation, bad)
        return write_splits(folder.path, splits, rows, data_source="topiocqa", prompt=prompt, bad=bad)

    def make_dev(bad: BadRecords) -> dict[str, Any]:
        rows = gold_rows(dataset_dev, retriever_dev, "dev", frozenset(), bad)
        return write_splits(folder.path, ["dev"], rows, data_source="topiocqa", prompt=prompt, bad=bad)

    options = prompt.as_dict() | {"proxy": False}
    train_options = options | {"validation_conversations": validation_conversations, "seed": seed}
    train_files = [name for split in splits for name in split_files(split)]
    folder.step("train", train_files, [dataset_train, retriever_train], train_options, make_train)
    folder.step("dev", split_files("dev"), [dataset_dev, retriever_dev], options, make_dev)
    golds = read_golds(folder.path, [*splits, "dev"])

    def make_collection(bad: BadRecords) -> dict[str, Any]:
        return write_collection(folder.path / "collection.jsonl", passages(collection, bad), golds, bad)

    inputs = [collection, retriever_train, retriever_dev]
    folder.step("collection", ["collection.jsonl"], inputs, {"proxy": False}, make_collection)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m data_preprocess.topiocqa", description="TopiOCQA -> conversations, collection, qrels, parquet."
    )
    parser.add_argument(
        "--input",
        type=Path,
        metavar="ZIP_OR_DIR",
        help="find the files below in a folder or zip file, by their public names",
    )
    parser.add_argument("--dataset-train", type=Path, metavar="JSON", help="topiocqa_train.json")
    parser.add_argument("--dataset-dev", type=Path, metavar="JSON", help="topiocqa_dev.json")
    parser.add_argument(
        "--retriever-train", type=Path, metavar="JSON", help="data/retriever/all_history/train.json, with positive_ctxs"
    )
    parser.add_argument(
        "--retriever-dev", type=Path, metavar="JSON", help="data/retriever/all_history/dev.json, with positive_ctxs"
    )
    parser.add_argument("--collection", type=Path, metavar="TSV", help="full_wiki_segments.tsv: id, text, title")
    parser.add_argument(
        "--proxy",
        action="store_true",
        help="build pseudo-passages out of the conversations, where the gold passages are not at hand",
    )
    add_common_options(parser, validation_conversations=100)
    return parser


def main() -> None:
    arguments = build_parser().parse_args()
    found = Files.locate(arguments.input) if arguments.input else Files()
    given = {field.name: getattr(arguments, field.name) for field in fields(Files)}
    files = Files(**{name: Source(path) if path else getattr(found, name) for name, path in given.items()})
    folder = OutputFolder(arguments.output, arguments.skip_bad)
    if arguments.proxy:
        dataset_train, dataset_dev = files.conversations()
        topiocqa_proxy.convert(
            dataset_train,
            dataset_dev,
            folder,
            prompt_options(arguments),
            arguments.validation_conversations,
            arguments.seed,
        )
    else:
        convert(files, folder, prompt_options(arguments), arguments.validation_conversations, arguments.seed)


if __name__ == "__main__":
    cli.run(main)
