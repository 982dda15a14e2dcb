"""TopiOCQA (Adlakha et al., TACL 2022): its files, its turns with their gold passages, and its collection.

Three releases belong together: the conversations (topiocqa_train.json, topiocqa_dev.json), the gold passages (the
retriever's all_history/train.json and dev.json) and 25.7 million Wikipedia passages (full_wiki_segments.tsv).
data_preprocess/topiocqa_proxy.py needs only the first.
"""

from collections.abc import Iterator, Mapping
from functools import partial
from itertools import zip_longest
from typing import Any

from data_preprocess.sources import BadRecords, Record, Source, read_records, read_table
from data_preprocess.splits import held_out_conversations
from data_preprocess.writers import OutputFolder, Row

RETRIEVER_URL = "https://zenodo.org/records/6151011 (data/retriever/all_history/train.json and dev.json)"
COLLECTION_URL = "https://zenodo.org/records/6149599 (data/wikipedia_split/full_wiki_segments.tsv)"
DATASET_URL = "https://zenodo.org/records/7709644 (topiocqa_train.json and topiocqa_dev.json)"
Files = Mapping[str, Source]  # some of the files of NAMES
NAMES = {  # the flag without dashes -> the file's name in the public releases
    "dataset_train": ("topiocqa_train.json", "topiocqa_dataset/train.json"),
    "dataset_dev": ("topiocqa_dev.json", "topiocqa_dataset/dev.json"),
    "retriever_train": ("retriever/all_history/train.json", "all_history/train.json"),
    "retriever_dev": ("retriever/all_history/dev.json", "all_history/dev.json"),
    "collection": ("full_wiki_segments.tsv",),
}


def conversations(files: Files) -> tuple[Source, Source]:
    """The conversations of train and dev.

    Raises:
        ValueError: one is missing; says where to get it.
    """
    if not {"dataset_train", "dataset_dev"} <= files.keys():
        remedy = f"give --dataset-train and --dataset-dev, from {DATASET_URL}"
        raise ValueError(f"TopiOCQA's conversations are missing: {remedy}")
    return files["dataset_train"], files["dataset_dev"]


def golds(files: Files) -> tuple[Source, Source, Source]:
    """The gold passages of train and dev and the collection.

    Raises:
        ValueError: one is missing; says which, where to get it, and that ``--proxy`` does not need it.
    """
    names = ("retriever_train", "retriever_dev", "collection")
    missing = ", ".join(f"--{name.replace('_', '-')}" for name in names if name not in files)
    if missing:
        raise ValueError(
            f"TopiOCQA's conversations have no gold passages, and {missing} did not come with them: "
            f"get the gold passages from {RETRIEVER_URL} and the collection from {COLLECTION_URL}, "
            "by hand or by python -m data_preprocess.download topiocqa, "
            "or pass --proxy to build pseudo-passages from the conversations alone"
        )
    return files["retriever_train"], files["retriever_dev"], files["collection"]


def turn_record(turn: Record, split: str) -> dict[str, Any]:
    """A turn as a line of a conversations file, without its golds; ``split`` is the data set's own, train or dev."""
    conv_id, turn_id = turn.number("Conversation_no"), turn.number("Turn_no")
    context = turn.texts("Context")
    if len(context) % 2:
        raise turn.error("Context", f"must alternate question and answer, got {len(context)} strings")
    return {
        "qid": f"topiocqa-{split}_{conv_id}_{turn_id}",
        "conv_id": conv_id,
        "turn_id": turn_id,
        "question": turn.text("Question"),
        "context": context,
        "answer": turn.text("Answer"),
        "topic": turn.text("Topic", blank=True),
        "topic_section": turn.text("Topic_section", blank=True),
    }


def gold_rows(
    dataset: Source, retriever: Source, own_split: str, validation: frozenset[str], bad: BadRecords
) -> Iterator[Row]:
    """Joins turns and gold passages, which have the same order in the two files.

    The first gold passage counts, as in the reference's qrels.

    Raises:
        ValueError: the two files do not go together.
    """
    other = "they are not of one release"
    turns, golds = read_records(dataset, bad, f"topiocqa {own_split}"), read_records(retriever, bad)
    for turn, gold in zip_longest(turns, golds):
        if turn is None or gold is None:
            raise ValueError(f"{dataset} and {retriever} do not have the same number of turns: {other}")
        with bad.tolerate():
            record = turn_record(turn, own_split)
            ids, gold_ids = (record["conv_id"], record["turn_id"]), (gold.number("conv_id"), gold.number("turn_id"))
            if gold_ids != ids:
                found = f"fields 'conv_id' and 'turn_id' are {gold_ids[0]} and {gold_ids[1]}"
                beside = f"the turn beside it ({turn.where}) is {ids[0]} and {ids[1]}"
                raise ValueError(f"{gold.where}: {found}, but {beside}: {other}")
            if not (passages := gold.objects("positive_ctxs")):
                raise gold.error("positive_ctxs", "is empty")
            record["gold_docids"] = [passages[0].docid("passage_id")]
            record["positive_ctxs"] = [passage.data for passage in passages]
            yield Row("validation" if str(record["conv_id"]) in validation else own_split, record, turn.where)


def passages(collection: Source, bad: BadRecords) -> Iterator[tuple[str, str]]:
    """(id, title + " " + text); " [SEP] " between article and section becomes a space, as in the reference."""
    for row in read_table(collection, ("id", "text", "title"), bad, "topiocqa collection"):
        with bad.tolerate():
            yield row.docid("id"), f"{row.data['title'].replace(' [SEP] ', ' ')} {row.data['text']}"


def convert(files: Files, folder: OutputFolder, held_out: int, seed: int) -> None:
    """The whole data set: train, ``held_out`` validation conversations from it, dev, collection."""
    (train, dev), (train_golds, dev_golds, collection) = conversations(files), golds(files)
    splits = ["train", "validation"] if held_out else ["train"]
    title = f"{train.suffix_path}: conversations"

    def train_rows(bad: BadRecords) -> Iterator[Row]:
        validation = held_out_conversations(train, title, lambda turn: True, held_out, seed)
        return gold_rows(train, train_golds, "train", validation, bad)

    options = {"proxy": False}
    train_options = options | {"validation_conversations": held_out, "seed": seed}
    folder.splits_step("train", splits, [train, train_golds], train_options, train_rows, "topiocqa")
    dev_rows = partial(gold_rows, dev, dev_golds, "dev", frozenset())
    folder.splits_step("dev", ["dev"], [dev, dev_golds], options, dev_rows, "topiocqa")
    inputs = [collection, train_golds, dev_golds]
    folder.collection_step(inputs, options, partial(passages, collection), [*splits, "dev"])
