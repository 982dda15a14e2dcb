"""The analyzer for whole collections: many texts at once, from bytes to term numbers, in compiled code for known words.

Text is cut into chunks at ASCII white space, which no word crosses. A hash table in compiled code maps known chunks to
the numbers of their terms. A new chunk goes through ``analyzer``, once.
"""

from typing import Any

import numpy as np

from retriever_server.bm25.kernels import Array, compiled
from retriever_server.text.analyzer import TermIds

MOST_CHUNKS = 1 << 19  # in the table at the start of a call: 60 MB with their bytes; beyond that it is emptied
MOST_TERMS = 1 << 20  # likewise in the vocabulary


class BulkAnalyzer:
    """Texts -> the numbers of their terms in ``vocabulary``, as TermIds gives them. Not for several threads.

    Example: ``BulkAnalyzer()([b"dogs, a dog", b"cats"])`` is ``([0, 0, 1], [2, 1])``, with the vocabulary dog 0, cat 1.
    """

    def __init__(self) -> None:
        self._reset()

    def _reset(self) -> None:
        self._term_ids = TermIds()
        self._count = 0  # of known chunks
        self._slots = np.full(1 << 14, -1, np.int32)  # hash -> chunk; a power of two, at most a quarter of it in use
        self._hashes = np.empty(1 << 12, np.uint64)
        self._bytes, self._byte_ends = np.empty(1 << 16, np.uint8), np.zeros((1 << 12) + 1, np.int64)
        self._terms, self._term_ends = np.empty(1 << 14, np.int32), np.zeros((1 << 12) + 1, np.int64)

    @property
    def vocabulary(self) -> dict[str, int]:
        """Term -> number. A call may empty it: read it before the next one."""
        return self._term_ids.vocabulary

    def __call__(self, texts: list[bytes]) -> tuple[Array, Array]:
        """(term numbers of all texts, int64[terms]; their counts per text, int64[texts]). ``texts`` are valid UTF-8."""
        if len(self.vocabulary) > MOST_TERMS or self._count > MOST_CHUNKS:
            self._reset()
        joined = np.frombuffer(b"\n".join(texts) + b"\n", np.uint8)
        ends = np.cumsum(np.fromiter((len(text) + 1 for text in texts), np.int64, len(texts)))
        starts, stops, hashes, chunks_each = cut(joined, ends)
        chunks = np.empty(len(starts), np.int32)
        known, at = (self._slots, self._hashes, self._bytes, self._byte_ends), 0
        while (at := find(at, joined, starts, stops, hashes, *known, chunks)) < len(starts):
            self._learn(joined[starts[at] : stops[at]], hashes[at])
            known = self._slots, self._hashes, self._bytes, self._byte_ends
        terms, terms_each = expand(chunks, chunks_each, self._terms, self._term_ends)
        return terms, terms_each

    def _learn(self, chunk: Array, value: Any) -> None:
        """Gives a new chunk, whose hash is ``value``, the next number."""
        number, self._count = self._count, self._count + 1
        if number == len(self._hashes):
            self._hashes = np.resize(self._hashes, 2 * number)
            self._byte_ends = np.resize(self._byte_ends, 2 * number + 1)
            self._term_ends = np.resize(self._term_ends, 2 * number + 1)
            self._slots = np.full(8 * number, -1, np.int32)
            for other in range(number):
                self._slots[free_slot(self._slots, self._hashes[other])] = other
        self._hashes[number] = value
        self._slots[free_slot(self._slots, value)] = number
        self._bytes = _append(self._bytes, self._byte_ends, number, chunk)
        terms = np.array(self._term_ids(chunk.tobytes().decode("utf-8")), np.int32)
        self._terms = _append(self._terms, self._term_ends, number, terms)


def _append(values: Array, ends: Array, number: int, new: Any) -> Array:
    """Appends a row to values whose rows end at ``ends``; returns the array, which may have grown."""
    start, end = int(ends[number]), int(ends[number]) + len(new)
    if end > len(values):
        values = np.resize(values, max(2 * len(values), end))
    values[start:end] = new
    ends[number + 1] = end
    return values


@compiled
def cut(data: Array, ends: Array) -> Any:
    """(start, stop, hash) of every chunk, and the number of chunks per text; texts end at ``ends`` with a space."""
    most = len(data) // 2 + 1
    starts, stops, hashes = np.empty(most, np.int64), np.empty(most, np.int64), np.empty(most, np.uint64)
    each = np.zeros(len(ends), np.int64)
    count, i = 0, 0
    for text in range(len(ends)):
        before = count
        start, value = i, np.uint64(0xCBF29CE484222325)  # FNV-1a
        for i in range(start, ends[text]):
            byte = data[i]
            if byte == 32 or 9 <= byte <= 13 or 28 <= byte <= 31:
                if i > start:
                    starts[count], stops[count], hashes[count] = start, i, value
                    count += 1
                start, value = i + 1, np.uint64(0xCBF29CE484222325)
            else:
                value = (value ^ np.uint64(byte)) * np.uint64(0x100000001B3)
        i = ends[text]
        each[text] = count - before
    return starts[:count], stops[:count], hashes[:count], each


@compiled
def slot_of(value: Any, slots: int) -> Any:
    return np.int64((value ^ (value >> np.uint64(29))) & np.uint64(slots - 1))


@compiled
def free_slot(slots: Array, value: Any) -> Any:
    slot = slot_of(value, len(slots))
    while slots[slot] >= 0:
        slot = (slot + 1) & (len(slots) - 1)
    return slot


@compiled
def find(
    at: int,
    data: Array,
    starts: Array,
    stops: Array,
    hashes: Array,
    slots: Array,
    known_hashes: Array,
    known_bytes: Array,
    known_ends: Array,
    chunks: Array,
) -> int:
    """Fills ``chunks`` from position ``at`` with the numbers of known chunks; returns where the first new one is."""
    for c in range(at, len(starts)):
        slot, found = slot_of(hashes[c], len(slots)), -1
        while slots[slot] >= 0:
            number = slots[slot]
            size, first = stops[c] - starts[c], known_ends[number]
            if known_hashes[number] == hashes[c] and known_ends[number + 1] - first == size:
                same = True
                for b in range(size):
                    if known_bytes[first + b] != data[starts[c] + b]:
                        same = False
                        break
                if same:
                    found = number
                    break
            slot = (slot + 1) & (len(slots) - 1)
        if found < 0:
            return c
        chunks[c] = found
    return len(starts)


@compiled
def expand(chunks: Array, chunks_each: Array, terms: Array, term_ends: Array) -> Any:
    """The terms of all chunks one after the other, and their counts per text."""
    total = 0
    for c in chunks:
        total += term_ends[c + 1] - term_ends[c]
    found, each = np.empty(total, np.int64), np.zeros(len(chunks_each), np.int64)
    at, c = 0, 0
    for text in range(len(chunks_each)):
        before = at
        for _ in range(chunks_each[text]):
            for t in range(term_ends[chunks[c]], term_ends[chunks[c] + 1]):
                found[at] = terms[t]
                at += 1
            c += 1
        each[text] = at - before
    return found, each
