"""The conversations of TopiOCQA, the same with gold passages and without."""

from typing import Any

from data_preprocess.sources import BadRecords, Record, Source, read_records


def turn_record(turn: Record, split: str) -> dict[str, Any]:
    """A turn of the data set as a line of a conversations file, without its golds; ``split`` is the data set's own, train or dev."""
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


def conversation_ids(dataset: Source) -> set[int]:
    """The conversations of a dataset file (a first pass; faults are left to the second)."""
    unchecked = BadRecords(limit=1 << 62)
    ids: set[int] = set()
    for turn in read_records(dataset, unchecked, f"{dataset.suffix_path}: conversations"):
        with unchecked.tolerate():
            ids.add(turn.number("Conversation_no"))
    return ids
