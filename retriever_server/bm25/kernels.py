"""The compiled loops that search and gold ranks by BM25 share, and the search for the best k passages; without the GIL.

A posting is a passage number and a code. A code stands for a (tf, length byte) pair. ``gain[code]`` is 1 - 1 / (1 + tf
x inverse norm), so weight x gain is the term's score up to float32 rounding. Codes are numbered by ascending gain.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar, cast

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

WINDOW = 1 << 15  # passages whose sums are in use at a time: 256 KiB of float64 stay in the second-level cache

Array = Any
F = TypeVar("F", bound=Callable[..., Any])


class Postings(NamedTuple):
    """All lists, one after the other, and what a code stands for."""

    docs: Array  # int32[postings], ascending in each list
    codes: Array  # unsigned [postings]
    tf: Array  # float32[codes]
    inverse_norm: Array  # float32[codes]
    gain: Array  # float32[codes]


def compiled(function: F) -> F:
    """Compiled at the first call and cached beside this file; runs without the GIL."""
    return cast(F, njit(nogil=True, cache=True)(function))


@intrinsic  # type: ignore[untyped-decorator]
def prefetch(typing_context: Any, array: Any, index: Any) -> Any:
    """Prefetches the cache line of ``array[index]``; harmless beyond the array's end."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        data = context.make_array(signature.args[0])(context, builder, arguments[0]).data
        byte, word = ir.IntType(8).as_pointer(), ir.IntType(32)
        function_type = ir.FunctionType(ir.VoidType(), [byte, word, word, word])
        function = builder.module.declare_intrinsic("llvm.prefetch", (byte,), function_type)
        place = builder.bitcast(builder.gep(data, [arguments[1]]), byte)
        builder.call(function, [place, word(0), word(3), word(1)])  # to be read; to stay in all caches; data
        return context.get_dummy_value()

    return types.void(array, types.intp), generate


@compiled
def lower_bound(docs: Array, low: int, high: int, doc: int) -> int:
    """The first position in docs[low:high], ascending, whose passage is ``doc`` or later; ``high`` if there is none."""
    while low < high:
        middle = (low + high) >> 1
        if docs[middle] < doc:
            low = middle + 1
        else:
            high = middle
    return low


@compiled
def seek(docs: Array, low: int, high: int, doc: int, num_passages: int) -> int:
    """lower_bound in docs[low:high], begun where ``doc`` would be if passages were spread evenly.

    A search from ``low`` would wait for memory at every step; this one mostly stays within a few cache lines.
    """
    if low >= high or docs[low] >= doc:
        return low
    at = min(low + (high - low) * (doc - docs[low]) // (num_passages - docs[low]), high - 1)
    step = 1
    if docs[at] < doc:
        while at + step < high and docs[at + step] < doc:
            at += step
            step <<= 1
        return lower_bound(docs, at, min(at + step + 1, high), doc)
    while at - step >= low and docs[at - step] >= doc:
        at -= step
        step <<= 1
    return lower_bound(docs, max(at - step, low), at, doc)


@compiled
def exact_score(doc: int, starts: Array, ends: Array, weights: Array, postings: Postings) -> np.float32:
    """Lucene's float32 score of one passage."""
    docs, codes, tf, inverse_norm, _ = postings
    total = 0.0
    for t in range(len(starts)):
        p = lower_bound(docs, starts[t], ends[t], doc)
        if p < ends[t] and docs[p] == doc:
            code = codes[p]
            total += weights[t] - weights[t] / (np.float32(1) + tf[code] * inverse_norm[code])
    return np.float32(total)


@compiled
def best(
    starts: Array,
    ends: Array,
    weights: Array,
    k: int,
    num_passages: int,
    postings: Postings,
    sums: Array,
    top_docs: Array,
    top_scores: Array,
) -> int:
    """Fills ``top_docs`` and ``top_scores`` with the ``k`` best passages, best first, ties by number; returns how many.

    ``sums`` is float64[window], all zero before and after.
    """
    docs, codes, tf, inverse_norm, _ = postings
    at = starts.copy()
    size = 0
    for base in range(0, num_passages, len(sums)):
        last = min(base + len(sums), num_passages)
        touched = 0
        for t in range(len(starts)):
            weight, stop = weights[t], seek(docs, at[t], ends[t], last, num_passages)
            its_docs, its_codes = docs[at[t] : stop], codes[at[t] : stop]
            for p in range(len(its_docs)):
                code = its_codes[p]
                sums[np.uint32(its_docs[p]) - np.uint32(base)] += weight - weight / (
                    np.float32(1) + tf[code] * inverse_norm[code]
                )
            touched += stop - at[t]
            at[t] = stop
        if touched == 0:
            continue
        for i in range(last - base):
            if sums[i] > 0:
                score = np.float32(sums[i])
                if score > 0 and (size < k or score > top_scores[0]):
                    size = push(top_docs, top_scores, size, k, base + i, score)
        sums[: last - base] = 0
    for end in range(size - 1, 0, -1):  # heap sort: the worst goes to the end
        top_docs[0], top_docs[end] = top_docs[end], top_docs[0]
        top_scores[0], top_scores[end] = top_scores[end], top_scores[0]
        sift_down(top_docs, top_scores, end)
    return size


@compiled
def worse(docs: Array, scores: Array, i: int, j: int) -> bool:
    return bool(scores[i] < scores[j] or (scores[i] == scores[j] and docs[i] > docs[j]))


@compiled
def sift_down(docs: Array, scores: Array, size: int) -> None:
    """Restores the heap after its root, the worst passage, was replaced."""
    i = 0
    while True:
        child = 2 * i + 1
        if child >= size:
            return
        if child + 1 < size and worse(docs, scores, child + 1, child):
            child += 1
        if not worse(docs, scores, child, i):
            return
        docs[i], docs[child] = docs[child], docs[i]
        scores[i], scores[child] = scores[child], scores[i]
        i = child


@compiled
def push(docs: Array, scores: Array, size: int, k: int, doc: int, score: np.float32) -> int:
    """Adds a passage to the heap of the best ``k`` (to a full one only if it beats the root); returns the new size."""
    if size == k:
        docs[0], scores[0] = doc, score
        sift_down(docs, scores, size)
        return size
    i = size
    docs[i], scores[i] = doc, score
    while i > 0 and worse(docs, scores, i, (i - 1) >> 1):
        parent = (i - 1) >> 1
        docs[i], docs[parent] = docs[parent], docs[i]
        scores[i], scores[parent] = scores[parent], scores[i]
        i = parent
    return size + 1
