"""TopiOCQA-proxy: a retrieval task made of TopiOCQA's conversations alone, where gold passages and Wikipedia are not at hand.

One pseudo-passage for each (Topic, Topic_section) of both files: the topic, the section and all answers given under it, train first, in
the order of the files; a turn's gold is its own pair. UNANSWERABLE turns have no topic: they are no queries and feed no passage, but stay
in the history. A passage holds its own turns' answers, so these figures must never stand beside those of the real collection.
"""

from collections.abc import Iterator
from typing import Any

from data_preprocess.sources import BadRecords, Source, read_records
from data_preprocess.splits import hold_out
from data_preprocess.topiocqa_turns import turn_record
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

Pair = tuple[str, str]


class PseudoPassages:
    """(topic, section) -> its answers; the ids count the pairs in the order in which they came. All of them are held: some 6 MB of text."""

    def __init__(self) -> None:
        self.answers: dict[Pair, list[str]] = {}
        self._numbers: dict[Pair, int] = {}

    def add(self, pair: Pair, answer: str) -> None:
        self._numbers.setdefault(pair, len(self._numbers))
        self.answers.setdefault(pair, []).append(answer)

    def docid(self, pair: Pair) -> str:
        return f"proxy-{self._numbers[pair]:05d}"

    def passages(self) -> Iterator[tuple[str, str]]:
        for pair, answers in self.answers.items():
            yield self.docid(pair), " ".join([*pair, *answers])


def answered_turns(
    dataset: Source, own_split: str, bad: BadRecords, description: str
) -> Iterator[tuple[dict[str, Any], str]]:
    """(record, where) of each turn that has an answer and so a topic."""
    for turn in read_records(dataset, bad, description):
        with bad.tolerate():
            record = turn_record(turn, own_split)
            if record["answer"] == UNANSWERABLE:
                continue
            for name in ("Topic", "Topic_section"):
                turn.text(name)
            yield record, turn.where


def convert(
    dataset_train: Source,
    dataset_dev: Source,
    folder: OutputFolder,
    prompt: PromptOptions,
    validation_conversations: int,
    seed: int,
) -> None:
    """Writes train and validation (out of train), dev and the pseudo-passages."""
    splits = ["train", "validation", "dev"] if validation_conversations else ["train", "dev"]
    datasets = {"train": dataset_train, "dev": dataset_dev}

    def make(bad: BadRecords) -> dict[str, Any]:
        pseudo, train_convs = PseudoPassages(), set[int]()
        first_pass = BadRecords(bad.limit)
        for own_split, dataset in datasets.items():
            for record, _ in answered_turns(dataset, own_split, first_pass, f"proxy passages, {own_split}"):
                pseudo.add((record["topic"], record["topic_section"]), record["answer"])
                if own_split == "train":
                    train_convs.add(record["conv_id"])
        validation = hold_out(train_convs, validation_conversations, seed)

        def rows() -> Iterator[Row]:
            for own_split, dataset in datasets.items():
                for record, where in answered_turns(dataset, own_split, bad, f"topiocqa-proxy {own_split}"):
                    record["gold_docids"] = [pseudo.docid((record["topic"], record["topic_section"]))]
                    held_out = own_split == "train" and str(record["conv_id"]) in validation
                    yield Row("validation" if held_out else own_split, record, where)

        counts = write_splits(folder.path, splits, rows(), data_source="topiocqa-proxy", prompt=prompt, bad=bad)
        golds = read_golds(folder.path, splits)
        return counts | {
            "collection": write_collection(folder.path / "collection.jsonl", pseudo.passages(), golds, bad)
        }

    files = [name for split in splits for name in split_files(split)] + ["collection.jsonl"]
    options = prompt.as_dict() | {"proxy": True, "validation_conversations": validation_conversations, "seed": seed}
    folder.step("proxy", files, datasets.values(), options, make)
