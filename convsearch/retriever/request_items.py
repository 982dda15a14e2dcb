"""Texts on their way into requests: made fit for UTF-8, shortened for messages, parted into requests of bearable size."""

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

CHARS_A_REQUEST = 2_000_000
T = TypeVar("T")


def clean(query: str) -> str:
    """Half surrogate pairs, which a decoder may leave in a broken output, have no UTF-8 form; they match no term either."""
    return query.encode("utf-8", "replace").decode("utf-8")


def short(query: str) -> str:
    return repr(query if len(query) <= 60 else query[:57] + "...")


def chunks(items: Sequence[T], most: int, chars_of: Callable[[T], int]) -> Iterator[list[T]]:
    """Consecutive parts of at most ``most`` items and about CHARS_A_REQUEST characters."""
    chunk: list[T] = []
    chars = 0
    for item in items:
        size = chars_of(item)
        if chunk and (len(chunk) == most or chars + size > CHARS_A_REQUEST):
            yield chunk
            chunk, chars = [], 0
        chunk.append(item)
        chars += size
    if chunk:
        yield chunk
