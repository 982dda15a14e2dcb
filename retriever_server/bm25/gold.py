"""The compiled loops of exact gold ranks by BM25, without a ranking. Threads run them without the GIL.

The gold passage is scored first. Its score is a threshold that a top-k search never has. Scores are then added up in
whole units, each posting's rounded up, so that a sum below the threshold is final; a passage whose sum does not decide
is scored again, exactly as Lucene does. The loops work on one window of passages at a time, for all queries of a batch:

* The postings of a common term of several queries are written once, as a column with one byte per passage, and added to
  each query's sums by vector instructions, in 10 microseconds per million passages (100,000 postings take 50 and more).
* The postings of the other terms are added one by one, except for the tail, the terms with the lowest bounds: a passage
  that has only terms of the tail cannot reach the threshold. It is looked up for the few other candidates.

The inner loops use slices and unsigned indices, because numba checks every signed index for being negative.
"""

from typing import NamedTuple

import numpy as np

from retriever_server.bm25.kernels import Array, Postings, compiled, exact_score, lower_bound, prefetch, seek

ESSENTIAL = np.float32(0.5)  # terms that together cannot reach this part of the gold's score are the tail
LONG = 64  # a list with more than one posting per this many passages is worth looking up instead of adding
LOOK_UP = 32  # looking up one passage takes as long as adding this many postings
STRIDE = 64  # sums that are compared with the threshold at once; divides the window
AHEAD = 2  # queries and columns between prefetching postings and reading them


class Batch(NamedTuple):
    """Queries as flat arrays: query q has the terms ``term_ends[q]`` to ``term_ends[q + 1]``; golds likewise."""

    term_ends: Array
    starts: Array  # int64[terms], where each term's postings start
    ends: Array
    times: Array  # int64[terms], in the query
    weights: Array  # float32[terms], times x idf
    max_codes: Array  # the largest code of each list
    gold_ends: Array
    golds: Array  # passage numbers, ascending in each query


class Golds(NamedTuple):
    """What ``score_golds`` finds for each query."""

    gold: Array  # int64[Q]: the best gold, -1 if none scores
    threshold: Array  # float32[Q]: its score
    error: Array  # float64[Q]: the largest float32 error of a sum of scores
    order: Array  # int64[terms]: the query's terms by falling upper bound
    num_head: Array  # int64[Q]: how many are the head; the others together cannot reach ESSENTIAL of the threshold


class Columns(NamedTuple):
    """The terms that are columns: where their postings are, and their idf."""

    starts: Array
    ends: Array
    idf: Array
    of_term: Array  # int64[terms], -1 if a query's term is not a column


class Plan(NamedTuple):
    """A query's terms, head first: those that are scanned, and the columns, each as often as its term is in the query.

    ``..._rest[j]`` is the most that those from j on can add together; both arrays have one more place per query.
    """

    scanned: Array  # int64[terms], from term_ends[q] on
    scanned_rest: Array  # float32[terms + Q], from term_ends[q] + q on
    num_scanned: Array  # int64[Q]
    scanned_head: Array  # int64[Q]
    column_ends: Array
    columns: Array
    columns_rest: Array
    columns_head: Array


class Places(NamedTuple):
    """Where each list's postings in the current window begin and end, per thread."""

    began: Array  # int64[terms]
    at: Array
    column_began: Array  # int64[columns]
    column_at: Array


class Work(NamedTuple):
    """All that a scan reads."""

    num_passages: int
    batch: Batch
    golds: Golds
    columns: Columns
    plan: Plan
    postings: Postings
    unit: float  # of the whole numbers that scores are added up in


@compiled
def score_golds(which: Array, num_passages: int, batch: Batch, golds: Golds, postings: Postings) -> None:
    """Fills ``golds`` for the queries in ``which``."""
    for q in which:
        a, b = batch.term_ends[q], batch.term_ends[q + 1]
        starts, ends, weights = batch.starts[a:b], batch.ends[a:b], batch.weights[a:b]
        golds.gold[q], golds.threshold[q] = -1, 0
        for candidate in batch.golds[batch.gold_ends[q] : batch.gold_ends[q + 1]]:
            score = exact_score(candidate, starts, ends, weights, postings)
            if score > golds.threshold[q]:
                golds.gold[q], golds.threshold[q] = candidate, score
        # gains, products and scores are rounded, by about 2**-24 of the weight each
        golds.error[q] = np.sum(weights) * 2.0**-20
        bounds = weights * postings.gain[batch.max_codes[a:b]]
        golds.order[a:b] = np.argsort(-bounds)
        rest, at_most = np.sum(bounds), min(ESSENTIAL * golds.threshold[q], golds.threshold[q] - golds.error[q])
        golds.num_head[q] = 0
        for t in golds.order[a:b]:
            if rest < at_most and (ends[t] - starts[t]) * LONG > num_passages:
                break
            rest -= bounds[t]
            golds.num_head[q] += 1


@compiled
def arrange(which: Array, batch: Batch, golds: Golds, columns: Columns, plan: Plan, postings: Postings) -> None:
    """Fills ``plan`` for the queries in ``which``."""
    for q in which:
        a, n, c, m = batch.term_ends[q], 0, plan.column_ends[q], 0
        plan.scanned_head[q], plan.columns_head[q] = 0, 0
        for j in range(batch.term_ends[q + 1] - a):
            t = a + golds.order[a + j]
            if columns.of_term[t] < 0:
                plan.scanned[a + n] = t
                n += 1
            else:
                bound = batch.weights[t] / batch.times[t] * postings.gain[batch.max_codes[t]]
                plan.columns[c + m : c + m + batch.times[t]] = columns.of_term[t]
                plan.columns_rest[c + q + m : c + q + m + batch.times[t]] = bound
                m += batch.times[t]
            if j + 1 == golds.num_head[q]:
                plan.scanned_head[q], plan.columns_head[q] = n, m
        plan.num_scanned[q] = n
        plan.scanned_rest[a + q + n] = 0
        for j in range(n - 1, -1, -1):
            t = plan.scanned[a + j]
            bound = batch.weights[t] * postings.gain[batch.max_codes[t]]
            plan.scanned_rest[a + q + j] = plan.scanned_rest[a + q + j + 1] + bound
        plan.columns_rest[c + q + m] = 0
        for j in range(m - 1, -1, -1):
            plan.columns_rest[c + q + j] += plan.columns_rest[c + q + j + 1]


@compiled
def scan(
    low: int, high: int, me: int, depth: int, work: Work, written: Array, sums: Array, found: Array, beaten: Array
) -> None:
    """Adds to ``beaten[me, q]`` how many of the passages ``low`` to ``high`` beat query q's gold.

    A query stops when all threads together have found ``depth`` of them.

    Args:
        written: uint8[columns, window], sums: unsigned [window], found: int32[window]; this thread's scratch arrays.
        beaten: int64[threads, Q], all zero at the start.
    """
    num_passages, batch, golds, columns, plan, postings, unit = work
    places = Places(batch.starts.copy(), batch.starts.copy(), columns.starts.copy(), columns.starts.copy())
    for t in range(len(batch.starts)):
        places.at[t] = seek(postings.docs, batch.starts[t], batch.ends[t], low, num_passages)
    for c in range(len(columns.starts)):
        places.column_at[c] = seek(postings.docs, columns.starts[c], columns.ends[c], low, num_passages)
    for base in range(low, high, len(sums)):
        top = min(base + len(sums), high)
        write_columns(base, top, work, places, written)
        for q in range(len(golds.gold)):
            if golds.gold[q] < 0 or np.sum(beaten[:, q]) >= depth:
                continue
            if q + AHEAD < len(golds.gold):
                prefetch_head(q + AHEAD, work, places)
            a, c = batch.term_ends[q], plan.column_ends[q]
            sums[:] = 0
            for t in plan.scanned[a : a + plan.scanned_head[q]]:
                places.began[t] = places.at[t]
                scale = np.float32(batch.weights[t] / unit)
                places.at[t] = add_list(base, top, places.at[t], batch.ends[t], scale, postings, sums)
            add_columns(written, plan.columns[c : c + plan.columns_head[q]], sums)
            needed = (golds.threshold[q] - golds.error[q]) / unit
            without = needed - plan.scanned_rest[a + q + plan.scanned_head[q]] / unit
            least = without - plan.columns_rest[c + q + plan.columns_head[q]] / unit
            count = at_least(sums, max(1, int(np.ceil(least))), found)
            if count:
                count = add_tail_columns(q, count, without, plan, unit, written, sums, found)
            if count:
                count = add_tail(q, count, needed, base, top, work, places, sums, found)
                beaten[me, q] += num_beating(q, base, found[:count], work, written, places, sums)


@compiled
def write_columns(base: int, top: int, work: Work, places: Places, written: Array) -> None:
    """Writes the terms' scores in the window from ``base`` on, in units rounded up; 0 if a passage lacks the term."""
    columns, postings = work.columns, work.postings
    for c in range(len(columns.starts)):
        if c + AHEAD < len(columns.starts):
            for line in range(4):
                prefetch(postings.docs, places.column_at[c + AHEAD] + 16 * line)
                prefetch(postings.codes, places.column_at[c + AHEAD] + 32 * line)
        first, scale, column = places.column_at[c], np.float32(columns.idf[c] / work.unit), written[c]
        last = seek(postings.docs, first, columns.ends[c], top, work.num_passages)
        places.column_began[c], places.column_at[c] = first, last
        column[:] = 0
        its_docs, its_codes = postings.docs[first:last], postings.codes[first:last]
        for p in range(len(its_docs)):
            score = np.int32(scale * postings.gain[its_codes[p]]) + 1
            column[np.uint32(its_docs[p]) - np.uint32(base)] = np.uint8(score)


@compiled
def prefetch_head(q: int, work: Work, places: Places) -> None:
    """Prefetches the next postings of query q's head."""
    batch, plan, postings = work.batch, work.plan, work.postings
    a = batch.term_ends[q]
    for t in plan.scanned[a : a + plan.scanned_head[q]]:
        prefetch(postings.docs, places.at[t])
        prefetch(postings.docs, places.at[t] + 16)
        prefetch(postings.codes, places.at[t])


@compiled
def add_list(base: int, top: int, at: int, end: int, scale: np.float32, postings: Postings, sums: Array) -> int:
    """Adds the postings from ``at`` up to passage ``top`` to the sums; returns where the next ones begin."""
    docs, codes, gain = postings.docs, postings.codes, postings.gain
    while at + STRIDE <= end and docs[at + STRIDE - 1] < top:
        its_docs, its_codes = docs[at : at + STRIDE], codes[at : at + STRIDE]
        for p in range(STRIDE):
            sums[np.uint32(its_docs[p]) - np.uint32(base)] += np.uint16(np.int32(scale * gain[its_codes[p]]) + 1)
        at += STRIDE
    its_docs, its_codes = docs[at:end], codes[at:end]
    for p in range(len(its_docs)):
        if its_docs[p] >= top:
            return at + p
        sums[np.uint32(its_docs[p]) - np.uint32(base)] += np.uint16(np.int32(scale * gain[its_codes[p]]) + 1)
    return end


@compiled
def add_columns(written: Array, its_columns: Array, sums: Array) -> None:
    """Adds columns to the sums, four at a time, so that the sums are read and written a quarter as often."""
    whole = len(its_columns) // 4 * 4
    for c in range(0, whole, 4):
        one, two = written[its_columns[c]], written[its_columns[c + 1]]
        three, four = written[its_columns[c + 2]], written[its_columns[c + 3]]
        for i in range(len(sums)):
            sums[i] += np.uint16(one[i]) + np.uint16(two[i]) + np.uint16(three[i]) + np.uint16(four[i])
    for c in range(whole, len(its_columns)):
        one = written[its_columns[c]]
        for i in range(len(sums)):
            sums[i] += np.uint16(one[i])


@compiled
def at_least(sums: Array, needed: int, found: Array) -> int:
    """Fills ``found`` with the places whose sum is at least ``needed``, ascending; returns their number."""
    count = 0
    for start in range(0, len(sums), STRIDE):
        largest = sums[start]
        for i in range(start, start + STRIDE):
            largest = max(largest, sums[np.uint32(i)])
        if largest >= needed:
            for i in range(start, start + STRIDE):
                if sums[i] >= needed:
                    found[count] = i
                    count += 1
    return count


@compiled
def add_tail_columns(
    q: int, count: int, needed: float, plan: Plan, unit: float, written: Array, sums: Array, found: Array
) -> int:
    """Adds the columns of query q's tail to the passages in ``found``; keeps and counts those that can reach
    ``needed``."""
    c, kept = plan.column_ends[q], 0
    for i in found[:count]:
        total = float(sums[i])
        for j in range(plan.columns_head[q], plan.column_ends[q + 1] - c):
            if total + plan.columns_rest[c + q + j] / unit < needed:
                break
            total += written[plan.columns[c + j], i]
        if total >= needed:
            sums[i] = np.uint32(total)
            found[kept] = i
            kept += 1
    return kept


@compiled
def add_tail(
    q: int, count: int, needed: float, base: int, top: int, work: Work, places: Places, sums: Array, found: Array
) -> int:
    """Adds the scanned tail to the passages in ``found``; keeps and counts those that can reach ``needed``."""
    batch, plan, postings, unit = work.batch, work.plan, work.postings, work.unit
    a, n = batch.term_ends[q], plan.num_scanned[q]
    for j in range(plan.scanned_head[q], n + 1):
        kept, missing = 0, needed - plan.scanned_rest[a + q + j] / unit
        for i in found[:count]:
            if sums[i] >= missing:
                found[kept] = i
                kept += 1
        count = kept
        if count == 0 or j == n:
            break
        t = plan.scanned[a + j]
        scale = np.float32(batch.weights[t] / unit)
        first = seek(postings.docs, places.at[t], batch.ends[t], base, work.num_passages)
        last = seek(postings.docs, first, batch.ends[t], top, work.num_passages)
        places.began[t], places.at[t] = first, last
        if last - first < LOOK_UP * count:
            add_list(base, top, first, last, scale, postings, sums)
            continue
        for i in found[:count]:
            p = lower_bound(postings.docs, first, last, base + i)
            if p < last and postings.docs[p] == base + i:
                sums[i] += np.uint16(np.int32(scale * postings.gain[postings.codes[p]]) + 1)
    return count


@compiled
def num_beating(q: int, base: int, found: Array, work: Work, written: Array, places: Places, sums: Array) -> int:
    """How many of the passages ``found``, whose sums are complete, beat query q's gold."""
    golds, plan = work.golds, work.plan
    count, enough = 0, (golds.threshold[q] + golds.error[q]) / work.unit
    for i in found:
        rounded = plan.num_scanned[q]  # the most scores in the sum that were rounded up
        for c in plan.columns[plan.column_ends[q] : plan.column_ends[q + 1]]:
            rounded += written[c, i] > 0
        if base + i == golds.gold[q]:
            continue
        if sums[i] - rounded <= enough:
            score = score_in_window(q, base, i, work, written, places)
            if score < golds.threshold[q] or (score == golds.threshold[q] and base + i > golds.gold[q]):
                continue
        count += 1
    return count


@compiled
def score_in_window(q: int, base: int, i: int, work: Work, written: Array, places: Places) -> np.float32:
    """``exact_score`` of passage ``base + i``, by looking only at the postings of this window."""
    docs, codes, tf, inverse_norm, _ = work.postings
    batch, columns = work.batch, work.columns
    total, doc = 0.0, base + i
    for t in range(batch.term_ends[q], batch.term_ends[q + 1]):
        c = columns.of_term[t]
        if c >= 0 and written[c, i] == 0:
            continue
        first, last = (places.began[t], places.at[t]) if c < 0 else (places.column_began[c], places.column_at[c])
        p = lower_bound(docs, first, last, doc)
        if p < last and docs[p] == doc:
            total += batch.weights[t] - batch.weights[t] / (np.float32(1) + tf[codes[p]] * inverse_norm[codes[p]])
    return np.float32(total)
