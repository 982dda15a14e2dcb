"""QReCC (Anantha et al., NAACL 2021) in the form of the SCAI-QReCC-21 shared task -> conversations, collection, qrels and parquet.

Turns come as a JSON array (scai-qrecc21-{training,test}-turns.json), 54.6 million passages as the .jsonl files inside passages.zip, which
is read as a stream. Passages keep their own ids (URL and paragraph). Blank passages stay in the collection, as in the reference, and are
counted.
"""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from convsearch import cli
from data_preprocess.options import add_common_options, prompt_options
from data_preprocess.sources import BadRecords, Record, Source, find_sources, pick, read_records, zip_members
from data_preprocess.splits import hold_out
from data_preprocess.writers import (
    UNANSWERABLE,
    OutputFolder,
    PromptOptions,
    Row,
    read_golds,
    split_files,
    write_collection,
    write_splits,
)

TURNS_URL = "https://zenodo.org/records/5543685 (scai-qrecc21-training-turns.json, scai-qrecc21-test-turns.json)"
PASSAGES_URL = "https://zenodo.org/records/5115890 (passages.zip, 27.5 GB)"


@dataclass
class History:
    """What has been said so far in the conversation that the file is going through."""

    conv_id: int | None = None
    texts: list[str] = field(default_factory=list)

    def before(self, turn: Record, conv_id: int, turn_id: int) -> list[str]:
        """The context of a turn: of the turns before it in the file where these are all there, else of its own NewContext or Context field.

        Raises:
            RecordError: neither is whole.
        """
        if conv_id != self.conv_id:
            self.conv_id, self.texts = conv_id, []
        if len(self.texts) != 2 * (turn_id - 1):
            name = next((name for name in ("NewContext", "Context") if name in turn.data), None)
            if name is None:
                raise turn.error(
                    "Turn_no",
                    f"is {turn_id} in conversation {conv_id}, but the turns before it are not all in the file",
                )
            context = turn.texts(name)
            if len(context) != 2 * (turn_id - 1):
                raise turn.error(
                    name,
                    f"must hold {turn_id - 1} questions and answers before turn {turn_id}, got {len(context)} strings",
                )
            self.texts = [text if place % 2 == 0 else text or UNANSWERABLE for place, text in enumerate(context)]
        return list(self.texts)

    def add(self, question: str, answer: str) -> None:
        self.texts += [question, answer or UNANSWERABLE]


def turn_rows(turns: Source, own_split: str, validation: frozenset[str], bad: BadRecords) -> Iterator[Row]:
    """The turns with a gold passage; those without one, and those of conversations before them, stand in the contexts alone."""
    history = History()
    for turn in read_records(turns, bad, f"qrecc {own_split}"):
        with bad.tolerate():
            conv_id, turn_id = turn.number("Conversation_no"), turn.number("Turn_no")
            question, answer = turn.text("Question"), turn.text("Truth_answer", blank=True)
            context = history.before(turn, conv_id, turn_id)
            history.add(question, answer)
            golds = list(dict.fromkeys(docid for docid in turn.texts("Truth_passages") if docid))
            if not golds:
                continue
            record: dict[str, Any] = {
                "qid": f"QReCC-{own_split.capitalize()}_{conv_id}_{turn_id}",
                "conv_id": conv_id,
                "turn_id": turn_id,
                "question": question,
                "context": context,
                "answer": answer or UNANSWERABLE,
                "gold_docids": golds,
            }
            for name, value in (
                ("rewrite", turn.optional_text("Truth_rewrite")),
                ("source", turn.optional_text("Conversation_source")),
            ):
                if value is not None:
                    record[name] = value
            yield Row("validation" if str(conv_id) in validation else own_split, record, turn.where)


def conversations_with_golds(turns: Source) -> set[int]:
    """The conversations that have a query (a first pass; faults are left to the second)."""
    unchecked = BadRecords(limit=1 << 62)
    ids: set[int] = set()
    for turn in read_records(turns, unchecked, "qrecc conversations"):
        with unchecked.tolerate():
            if any(turn.texts("Truth_passages")):
                ids.add(turn.number("Conversation_no"))
    return ids


def passage_members(archive: Path) -> list[str]:
    """The .jsonl members in the reference's order: those of commoncrawl first, the others as they stand in the zip file.

    Raises:
        ValueError: there is none.
    """
    members = [name for name in zip_members(archive) if name.endswith(".jsonl")]
    if not members:
        raise ValueError(f"{archive}: holds no .jsonl member, so it is not QReCC's passages.zip")
    return sorted(members, key=lambda name: "commoncrawl" not in name)


def passages(archive: Path, bad: BadRecords) -> Iterator[tuple[str, str]]:
    """(id, contents) of every passage; a blank one has contents ""."""
    members = passage_members(archive)
    with tqdm(desc="qrecc collection", unit=" passages", unit_scale=True, mininterval=1.0) as bar:
        for number, member in enumerate(members, start=1):
            bar.set_postfix_str(f"{member} ({number} of {len(members)})")
            for passage in read_records(Source(archive, member), bad):
                bar.update()
                with bad.tolerate():
                    yield passage.docid("id"), passage.text("contents", blank=True)


def convert(
    train: Source | None,
    test: Source | None,
    archive: Path | None,
    folder: OutputFolder,
    prompt: PromptOptions,
    held_out: int,
    seed: int,
) -> None:
    """Writes what it is given: train and ``held_out`` validation conversations of it, test, the collection; None leaves one out."""
    splits = ["train", "validation"] if held_out else ["train"]
    written: list[str] = []
    if train is not None:

        def make_train(bad: BadRecords) -> dict[str, Any]:
            validation = hold_out(conversations_with_golds(train), held_out, seed) if held_out else frozenset[str]()
            rows = turn_rows(train, "train", validation, bad)
            return write_splits(folder.path, splits, rows, data_source="qrecc", prompt=prompt, bad=bad)

        options = prompt.as_dict() | {"validation_conversations": held_out, "seed": seed}
        folder.step("train", [name for split in splits for name in split_files(split)], [train], options, make_train)
        written += splits
    if test is not None:

        def make_test(bad: BadRecords) -> dict[str, Any]:
            rows = turn_rows(test, "test", frozenset(), bad)
            return write_splits(folder.path, ["test"], rows, data_source="qrecc", prompt=prompt, bad=bad)

        folder.step("test", split_files("test"), [test], prompt.as_dict(), make_test)
        written.append("test")
    if archive is not None:

        def make_collection(bad: BadRecords) -> dict[str, Any]:
            return write_collection(
                folder.path / "collection.jsonl", passages(archive, bad), read_golds(folder.path, written), bad
            )

        inputs = [Source(archive)] + [source for source in (train, test) if source is not None]
        folder.step("collection", ["collection.jsonl"], inputs, {}, make_collection)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m data_preprocess.qrecc", description="QReCC -> conversations, collection, qrels, parquet."
    )
    parser.add_argument(
        "--input", type=Path, metavar="DIR", help="find the files below in a folder, by their public names"
    )
    parser.add_argument("--train", type=Path, metavar="JSON", help="scai-qrecc21-training-turns.json")
    parser.add_argument("--test", type=Path, metavar="JSON", help="scai-qrecc21-test-turns.json")
    parser.add_argument("--passages", type=Path, metavar="ZIP", help="passages.zip; it is not unpacked")
    parser.add_argument("--without-collection", action="store_true", help="write conversations, qrels and parquet only")
    parser.add_argument("--without-train", action="store_true", help="write the test set only")
    add_common_options(parser, validation_conversations=100)
    return parser


def main() -> None:
    arguments = build_parser().parse_args()
    sources = find_sources(arguments.input) if arguments.input else []
    train = Source(arguments.train) if arguments.train else pick(sources, "scai-qrecc21-training-turns.json")
    test = Source(arguments.test) if arguments.test else pick(sources, "scai-qrecc21-test-turns.json")
    found = pick(sources, "passages.zip")
    archive = arguments.passages or (found.path if found else None)
    wanted = {
        "--train": train or arguments.without_train,
        "--test": test,
        "--passages": archive or arguments.without_collection,
    }
    missing = [flag for flag, value in wanted.items() if not value]
    if missing:
        raise ValueError(
            f"QReCC lacks {', '.join(missing)}: get the turns from {TURNS_URL} and the passages from {PASSAGES_URL} "
            "(python -m data_preprocess.download qrecc fetches all), or pass --without-train or --without-collection"
        )
    folder = OutputFolder(arguments.output, arguments.skip_bad)
    convert(
        None if arguments.without_train else train,
        test,
        None if arguments.without_collection else archive,
        folder,
        prompt_options(arguments),
        arguments.validation_conversations,
        arguments.seed,
    )


if __name__ == "__main__":
    cli.run(main)
