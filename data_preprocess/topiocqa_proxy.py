"""TopiOCQA-proxy: a retrieval task made from TopiOCQA's conversations alone, without gold passages and Wikipedia.

There is one pseudo-passage for each (Topic, Topic_section) of both files: the topic, the section and all answers given
under it, train first, in the order of the files; a turn's gold is its own pair. UNANSWERABLE turns have no topic: they
are no queries and add to no passage, but stay in the history. A passage contains the answers to its own turns, so these
figures must never be compared with those of the real collection.
"""

from collections.abc import Iterator
from typing import Any

from data_preprocess.sources import BadRecords, Source, read_records
from data_preprocess.splits import hold_out
from data_preprocess.topiocqa_data import Files, conversations, turn_record
from data_preprocess.writers import COLLECTION, UNANSWERABLE, OutputFolder, Row, split_files, write_splits

Pair = tuple[str, str]


class PseudoPassages:
    """(topic, section) -> its answers; the ids count the pairs in order of appearance. Memory holds all: about 6 MB."""

    def __init__(self) -> None:
        self.answers: dict[Pair, list[str]] = {}
        self._docids: dict[Pair, str] = {}

    def add(self, record: dict[str, Any]) -> None:
        pair = record["topic"], record["topic_section"]
        self._docids.setdefault(pair, f"proxy-{len(self._docids):05d}")
        self.answers.setdefault(pair, []).append(record["answer"])

    def docid(self, record: dict[str, Any]) -> str:
        return self._docids[record["topic"], record["topic_section"]]

    def passages(self) -> Iterator[tuple[str, str]]:
        for pair, answers in self.answers.items():
            yield self._docids[pair], " ".join([*pair, *answers])


def answered_turns(source: Source, split: str, bad: BadRecords, title: str) -> Iterator[tuple[dict[str, Any], str]]:
    """(record, where) of each turn that has an answer and so a topic."""
    for turn in read_records(source, bad, title):
        with bad.tolerate():
            record = turn_record(turn, split)
            if record["answer"] == UNANSWERABLE:
                continue
            for name in ("Topic", "Topic_section"):
                turn.text(name)
            yield record, turn.where


def convert(files: Files, folder: OutputFolder, held_out: int, seed: int) -> None:
    """Writes train, ``held_out`` validation conversations from it, dev and the pseudo-passages."""
    splits = ["train", "validation", "dev"] if held_out else ["train", "dev"]
    datasets = dict(zip(("train", "dev"), conversations(files), strict=True))

    def make(bad: BadRecords) -> dict[str, Any]:
        pseudo, train_convs = PseudoPassages(), set[int]()
        first_pass = BadRecords(bad.limit)
        for own_split, dataset in datasets.items():
            for record, _ in answered_turns(dataset, own_split, first_pass, f"proxy passages, {own_split}"):
                pseudo.add(record)
                if own_split == "train":
                    train_convs.add(record["conv_id"])
        validation = hold_out(train_convs, held_out, seed)

        def rows() -> Iterator[Row]:
            for own_split, dataset in datasets.items():
                for record, where in answered_turns(dataset, own_split, bad, f"topiocqa-proxy {own_split}"):
                    record["gold_docids"] = [pseudo.docid(record)]
                    in_validation = own_split == "train" and str(record["conv_id"]) in validation
                    yield Row("validation" if in_validation else own_split, record, where)

        passages = pseudo.passages()
        return write_splits(folder.path, splits, rows(), "topiocqa-proxy", folder.prompt, bad, passages=passages)

    options = folder.prompt.as_dict() | {"proxy": True, "validation_conversations": held_out, "seed": seed}
    folder.step("proxy", [*split_files(*splits), COLLECTION], datasets.values(), options, make)
