"""The compiled loops of BM25: exact gold ranks without a ranking, and the best k passages. Threads run them without the GIL.

A posting is a passage number and a code; a code stands for a (tf, length byte) pair. ``gain[code]`` is 1 - 1 / (1 + tf x inverse norm), so that
weight x gain is the term's score up to float32 rounding; codes are numbered by ascending gain. Sums of gains only decide what is clear without
rounding; what is not is scored again exactly as Lucene does. The inner loops run over slices and index with unsigned numbers, because numba
checks every signed index for being negative: 0.8 ns a posting instead of 1.5.
"""

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numpy as np
from numba import njit

WINDOW = 1 << 15  # passages whose sums are in use at a time: 128 KiB of float32 stay in the second-level cache; the kernels take len(sums)
ESSENTIAL = np.float32(0.5)  # lists that cannot reach this part of the gold's score together are only probed

Array = Any
F = TypeVar("F", bound=Callable[..., Any])


def compiled(function: F) -> F:
    """Compiled at the first call and kept beside this file; runs without the GIL."""
    return cast(F, njit(nogil=True, cache=True)(function))


@compiled
def lower_bound(docs: Array, low: int, high: int, doc: int) -> int:
    """The first position in docs[low:high], ascending, whose passage is ``doc`` or a later one; ``high`` where there is none."""
    while low < high:
        middle = (low + high) >> 1
        if docs[middle] < doc:
            low = middle + 1
        else:
            high = middle
    return low


@compiled
def seek(docs: Array, low: int, high: int, doc: int, num_passages: int) -> int:
    """lower_bound in docs[low:high], begun where ``doc`` would stand if passages were spread evenly up to ``num_passages``.

    A search from ``low`` would wait for memory at every step; this one mostly stays within a few lines of cache.
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
def exact_score(
    doc: int, starts: Array, ends: Array, weights: Array, docs: Array, codes: Array, tf: Array, inverse_norm: Array
) -> np.float32:
    """Lucene's float32 score of one passage."""
    total = 0.0
    for t in range(len(starts)):
        p = lower_bound(docs, starts[t], ends[t], doc)
        if p < ends[t] and docs[p] == doc:
            code = codes[p]
            total += weights[t] - weights[t] / (np.float32(1) + tf[code] * inverse_norm[code])
    return np.float32(total)


@compiled
def by_bound(weights: Array, max_codes: Array, gain: Array, order: Array, rest: Array) -> None:
    """Fills ``order`` with the query's terms by falling upper bound, and ``rest[j]`` with what terms j, j + 1, ... can add together at most."""
    bounds = weights * gain[max_codes]
    order[:] = np.argsort(-bounds)
    rest[len(order)] = 0
    for j in range(len(order) - 1, -1, -1):
        rest[j] = rest[j + 1] + bounds[order[j]]


@compiled
def gold_ranks(
    which: Array,
    term_ends: Array,
    starts: Array,
    ends: Array,
    weights: Array,
    max_codes: Array,
    gold_ends: Array,
    golds: Array,
    depth: int,
    num_passages: int,
    docs: Array,
    codes: Array,
    tf: Array,
    inverse_norm: Array,
    gain: Array,
    sums: Array,
    found: Array,
    ranks: Array,
) -> None:
    """Fills ``ranks[q]`` for the queries in ``which`` with 1 + the passages that beat the best gold; 0 where the gold scores nothing, or
    ``depth`` passages beat it.

    A threshold known before the first posting is read splits a query's terms: a passage that holds only terms of the tail cannot beat the gold.
    So the head's postings are scanned; passages that the tail could still lift over the threshold are looked up in the tail's lists. All queries go
    through one window of passages before the next, so that lists they share, as the samples of a prompt do, come from the cache.

    Args:
        term_ends, gold_ends: query q's terms are term_ends[q] to term_ends[q + 1], its golds (ascending passage numbers) likewise.
        starts, ends: int64[terms], where each term's postings stand in ``docs`` and ``codes``.
        weights: float32[terms], times in the query x idf.  max_codes: the largest code of each list.
        sums, found: float32 and int32 [window] of this thread, ``sums`` all zero (and left so).
    """
    gold, threshold = np.full(len(ranks), -1, np.int64), np.zeros(len(ranks), np.float32)
    order, rest, at = np.empty(len(starts), np.int64), np.empty(len(starts) + len(ranks), np.float32), starts.copy()
    for q in which:
        a, b = term_ends[q], term_ends[q + 1]
        for candidate in golds[gold_ends[q] : gold_ends[q + 1]]:
            score = exact_score(candidate, starts[a:b], ends[a:b], weights[a:b], docs, codes, tf, inverse_norm)
            if score > threshold[q]:
                gold[q], threshold[q] = candidate, score
        by_bound(weights[a:b], max_codes[a:b], gain, order[a:b], rest[a + q : b + q + 1])
        at[a:b] = starts[a:b][order[a:b]]
        ranks[q] = gold[q] >= 0
    for base in range(0, num_passages, len(sums)):
        for q in which:
            if ranks[q] == 0:
                continue
            a, b = term_ends[q], term_ends[q + 1]
            terms = order[a:b], rest[a + q : b + q + 1], at[a:b], starts[a:b], ends[a:b], weights[a:b]
            ranks[q] += beating(base, gold[q], threshold[q], num_passages, *terms, docs, codes, tf, inverse_norm, gain, sums, found)
            if ranks[q] > depth:
                ranks[q] = 0


@compiled
def beating(
    base: int,
    gold: int,
    threshold: np.float32,
    num_passages: int,
    order: Array,
    rest: Array,
    at: Array,
    starts: Array,
    ends: Array,
    weights: Array,
    docs: Array,
    codes: Array,
    tf: Array,
    inverse_norm: Array,
    gain: Array,
    sums: Array,
    found: Array,
) -> int:
    """How many passages of the window from ``base`` on beat one query's gold; moves ``at``, where each list (in ``order``) has been read to."""
    top, n = min(base + len(sums), num_passages), len(order)
    error = np.sum(weights) * np.float32(n + 8) * np.float32(2.0**-23)  # twice what n additions and the gains' own rounding can amount to
    surely, hardly = threshold + error, threshold - error
    head = 0
    while head < n and rest[head] >= min(ESSENTIAL * threshold, hardly):
        head += 1
    enough = max(hardly - rest[head], np.float32(1e-30))  # above zero, so that a passage crosses it when it is first touched
    count, touched, beaten_by = 0, 0, 0
    for j in range(head):
        weight, last = weights[order[j]], seek(docs, at[j], ends[order[j]], top, num_passages)
        its_docs, its_codes = docs[at[j] : last], codes[at[j] : last]
        for p in range(len(its_docs)):
            i = np.uint32(its_docs[p]) - np.uint32(base)
            before = sums[i]
            after = before + weight * gain[its_codes[p]]
            sums[i] = after
            if after >= enough and before < enough:
                found[count] = i
                count += 1
        touched += last - at[j]
        at[j] = last
    if count:
        count = add_tail(head, count, base, top, num_passages, order, rest, hardly, ends, weights, docs, codes, gain, at, sums, found)
        for c in range(count):
            doc, total = base + found[c], sums[found[c]]
            if doc == gold or total < hardly:
                continue
            if total <= surely:
                score = exact_score(doc, starts, ends, weights, docs, codes, tf, inverse_norm)
                if score < threshold or (score == threshold and doc > gold):
                    continue
            beaten_by += 1
    if touched:
        sums[: top - base] = 0
    return beaten_by


@compiled
def add_tail(
    head: int,
    count: int,
    base: int,
    top: int,
    num_passages: int,
    order: Array,
    rest: Array,
    hardly: float,
    ends: Array,
    weights: Array,
    docs: Array,
    codes: Array,
    gain: Array,
    at: Array,
    sums: Array,
    found: Array,
) -> int:
    """Adds the tail's scores of the ``count`` passages in ``found``, dropping those that cannot reach ``hardly``; returns how many are left."""
    for j in range(head, len(order)):
        kept = 0
        for c in range(count):
            if sums[found[c]] + rest[j] >= hardly:
                found[kept] = found[c]
                kept += 1
        count = kept
        if count == 0:
            return 0
        end, weight = ends[order[j]], weights[order[j]]
        low = seek(docs, at[j], end, base, num_passages)
        high = seek(docs, low, end, top, num_passages)
        at[j] = low
        size, steps = high - low, 2
        while (1 << steps) < size:
            steps += 1
        if size > 2 * count * steps:
            for c in range(count):
                p = lower_bound(docs, low, high, base + found[c])
                if p < high and docs[p] == base + found[c]:
                    sums[found[c]] += weight * gain[codes[p]]
        else:
            its_docs, its_codes = docs[low:high], codes[low:high]
            for p in range(size):
                sums[np.uint32(its_docs[p]) - np.uint32(base)] += weight * gain[its_codes[p]]
    return count


@compiled
def best(
    starts: Array,
    ends: Array,
    weights: Array,
    k: int,
    num_passages: int,
    docs: Array,
    codes: Array,
    tf: Array,
    inverse_norm: Array,
    sums: Array,
    top_docs: Array,
    top_scores: Array,
) -> int:
    """Fills ``top_docs`` and ``top_scores`` with the ``k`` best passages, best first, ties by number; returns how many score at all.

    ``sums`` is float64[window], all zero, and left so.
    """
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
                sums[np.uint32(its_docs[p]) - np.uint32(base)] += weight - weight / (np.float32(1) + tf[code] * inverse_norm[code])
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
    """Restores the heap whose root, the worst of all, has been replaced."""
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
    """Adds a passage to the heap of the best ``k``, in whose full state it is better than the root; returns the new size."""
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
