"""Which conversation belongs to which split: by a seeded hash of its id, the same for any order and platform."""

import hashlib
from collections.abc import Callable, Iterable, Mapping

from data_preprocess.sources import BadRecords, Record, Source, read_records


def conversation_hash(conv_id: object, seed: int) -> str:
    return hashlib.sha256(f"{seed}:{conv_id}".encode()).hexdigest()


def _shuffled(conv_ids: Iterable[object], seed: int) -> list[str]:
    return sorted({str(conv_id) for conv_id in conv_ids}, key=lambda conv_id: conversation_hash(conv_id, seed))


def hold_out(conv_ids: Iterable[object], count: int, seed: int, what: str = "conversation") -> frozenset[str]:
    """``count`` conversations (as strings) for validation. A larger count keeps those of a smaller one.

    Raises:
        ValueError: nothing would be left to train on; ``what`` is the noun of the message.
    """
    shuffled = _shuffled(conv_ids, seed)
    if count < 0 or (count and count >= len(shuffled)):
        problem = f"leaves no {what} to train on (there are {len(shuffled)})"
        raise ValueError(f"--validation-{what}s {count} {problem}; hold out fewer")
    return frozenset(shuffled[:count])


def held_out_conversations(
    turns: Source, description: str, is_query: Callable[[Record], bool], count: int, seed: int
) -> frozenset[str]:
    """``count`` of the conversations that have a query (a first pass; the second one finds the malformed records)."""
    unchecked = BadRecords(limit=1 << 62)
    ids: set[int] = set()
    for turn in read_records(turns, unchecked, description) if count else ():
        with unchecked.tolerate():
            if is_query(turn):
                ids.add(turn.number("Conversation_no"))
    return hold_out(ids, count, seed)


def partition(conv_ids: Iterable[object], fractions: Mapping[str, float], seed: int) -> dict[str, str]:
    """Maps each conversation (as a string) to a split. Sizes are the fractions, rounded; the last split gets the rest.

    Raises:
        ValueError: a fraction is negative, or they do not add up to 1.
    """
    if min(fractions.values()) < 0 or abs(sum(fractions.values()) - 1) > 1e-6:
        shown = ", ".join(f"{name} {value:g}" for name, value in fractions.items())
        raise ValueError(f"the fractions of the splits must be at least 0 and add up to 1, got {shown}")
    shuffled = _shuffled(conv_ids, seed)
    placed: dict[str, str] = {}
    cumulative, start = 0.0, 0
    for number, (split, fraction) in enumerate(fractions.items(), start=1):
        cumulative += fraction
        end = len(shuffled) if number == len(fractions) else round(cumulative * len(shuffled))
        placed.update(dict.fromkeys(shuffled[start:end], split))
        start = end
    return placed
