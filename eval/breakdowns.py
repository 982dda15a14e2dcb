"""Means of runs by what a query is like: its turn, a change of topic, the length of its history or of its rewrite."""

from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from convsearch.files import read_jsonl
from eval.measures import Floats

Record = dict[str, Any]
Group = int | str
HISTORY_WORDS = (0, 1, 50, 100, 200, 400, 800)  # lower ends of the groups
REWRITE_WORDS = (0, 1, 5, 9, 13, 17, 25)
SWITCHES = ("first turn", "same topic", "topic switch")


def means_by(
    qids: Sequence[str], groups: Mapping[str, Group], values: Mapping[str, Mapping[str, Floats]]
) -> list[Record]:
    """``[{group, queries, run, measure, mean}]`` in the order of ``groups``; queries without one come last, as None."""
    rows: dict[Group | None, list[int]] = {group: [] for group in dict.fromkeys(groups.values())}
    for index, qid in enumerate(qids):
        rows.setdefault(groups.get(qid), []).append(index)
    return [
        {"group": group, "queries": len(chosen), "run": run, "measure": measure, "mean": float(x[chosen].mean())}
        for group, chosen in rows.items()
        if chosen
        for run, measured in values.items()
        for measure, x in measured.items()
    ]


def labels_of(
    qids: Sequence[str],
    conversations: str | Path | None = None,
    rewrites: str | Path | None = None,
    fields: Sequence[str] = (),
) -> dict[str, dict[str, Group]]:
    """Name of a breakdown -> qid -> group, the groups in their order.

    The breakdowns are turn, topic switch (if the records have topics), history length, ``fields``, rewrite length.

    Raises:
        ValueError: a line lacks what a breakdown needs, or a file has none of the queries.
    """
    found: dict[str, dict[str, Group]] = {}
    if conversations is not None:
        lines = _records(qids, conversations)
        turn = "needs 'qid' (a string) and 'turn_id' (a whole number)"
        _require(lines, lambda record: type(record.get("turn_id")) is int, turn)
        records = [record for _, record in lines]
        found["turn"] = _sorted({record["qid"]: record["turn_id"] for record in records})
        if all(isinstance(record.get("topic"), str) and record.get("conv_id") is not None for record in records):
            found["topic switch"] = _switches(records)
        if all(isinstance(record.get("context"), list) for record in records):
            words = {record["qid"]: _words(record["context"]) for record in records}
            found["history length (words)"] = _bucketed(words, HISTORY_WORDS)
        for field in fields:
            found[field] = _by_field(lines, field)
    if rewrites is not None:
        lines = _records(qids, rewrites)
        problem = "the record has no 'rewrite': give the file that convsearch.infer wrote"
        _require(lines, lambda record: isinstance(record.get("rewrite"), str), problem)
        words = {record["qid"]: _words([record["rewrite"]]) for _, record in lines}
        found["rewrite length (words)"] = _bucketed(words, REWRITE_WORDS)
    return found


def _by_field(lines: Sequence[tuple[str, Record]], field: str) -> dict[str, Group]:
    problem = f"the record has no word or whole number under {field!r}: choose another field for --by"
    _require(lines, lambda record: isinstance(record.get(field), int | str), problem)
    return _sorted({record["qid"]: record[field] for _, record in lines})


def _require(lines: Iterable[tuple[str, Record]], holds: Callable[[Record], bool], problem: str) -> None:
    where = next((where for where, record in lines if not holds(record)), None)
    if where is not None:
        raise ValueError(f"{where}: {problem}")


def _records(qids: Sequence[str], path: str | Path) -> list[tuple[str, Record]]:
    """(where, record) of each line; those of other queries too, because they are turns of the same conversations."""
    lines = [(f"{path}:{number}", record) for number, record in read_jsonl(path)]
    _require(lines, lambda record: isinstance(record.get("qid"), str), "needs 'qid' (a string)")
    if not {record["qid"] for _, record in lines} & set(qids):
        remedy = "give the conversations that they come from"
        raise ValueError(f"{path} has none of the {len(qids)} queries of the qrels: {remedy}")
    return lines


def _switches(records: Sequence[Record]) -> dict[str, Group]:
    """Whether a turn's topic is that of the turn before it among ``records``."""
    last: dict[Any, str] = {}
    kinds: dict[str, str] = {}
    for record in sorted(records, key=lambda record: int(record["turn_id"])):
        before = last.get(record["conv_id"])
        kinds[record["qid"]] = SWITCHES[0] if before is None else SWITCHES[1 + (record["topic"] != before)]
        last[record["conv_id"]] = record["topic"]
    return dict(sorted(kinds.items(), key=lambda item: SWITCHES.index(item[1])))


def _sorted(groups: Mapping[str, Group]) -> dict[str, Group]:
    """Numbers by size, then words by the alphabet."""
    return dict(sorted(groups.items(), key=lambda item: (isinstance(item[1], str), item[1])))


def _words(texts: Iterable[Any]) -> int:
    return sum(len(str(text).split()) for text in texts)


def _bucketed(words: Mapping[str, int], lower: Sequence[int]) -> dict[str, Group]:
    names = [str(low) if high == low + 1 else f"{low} - {high - 1}" for low, high in pairwise(lower)]
    names.append(f"{lower[-1]} or more")
    ordered = sorted(words.items(), key=lambda item: item[1])
    return {qid: names[bisect_right(lower, count) - 1] for qid, count in ordered}
