"""BM25 as org.apache.lucene.search.similarities.BM25Similarity: one-byte passage lengths, float32 arithmetic.

score(term, passage) = w - w / (1 + tf x inverse norm), with w = (times in the query) x idf. A passage's score is the
sum of its terms' scores in double precision, rounded to float32 at the end.
"""

import math

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]


def _decoded_lengths() -> npt.NDArray[np.int64]:
    """The 256 passage lengths of a byte (Lucene's SmallFloat.byte4ToInt): exact to 39, then 3 significant bits."""
    lengths = list(range(24))
    for code in range(256 - 24):
        bits, shift = code & 7, (code >> 3) - 1
        lengths.append(24 + (bits if shift < 0 else (bits | 8) << shift))
    return np.array(lengths, np.int64)


LENGTHS = _decoded_lengths()


def length_bytes(lengths: npt.NDArray[np.int64]) -> npt.NDArray[np.uint8]:
    """The byte of each length in terms: the largest whose decoded length is at most that (SmallFloat.intToByte4)."""
    return (np.searchsorted(LENGTHS, lengths, side="right") - 1).astype(np.uint8)


def inverse_norms(k1: float, b: float, num_tokens: int, num_nonempty: int) -> Floats:
    """float32[256]: 1 / (k1 x (1 - b + b x length / mean length)) per length byte; the mean is of non-empty
    passages."""
    k1_, b_, one = np.float32(k1), np.float32(b), np.float32(1)
    mean = np.float32(num_tokens / num_nonempty) if num_nonempty else one
    with np.errstate(divide="ignore"):  # k1 = 0: tf does not matter, and infinity says so
        return one / (k1_ * ((one - b_) + b_ * LENGTHS.astype(np.float32) / mean))


def idf(num_nonempty: int, frequencies: npt.NDArray[np.int32]) -> Floats:
    """ln(1 + (N - df + 0.5) / (df + 0.5)) of each term, over the N passages that hold a term at all."""
    distinct, which = np.unique(frequencies, return_inverse=True)
    values = [math.log(1 + (num_nonempty - frequency + 0.5) / (frequency + 0.5)) for frequency in distinct.tolist()]
    return np.array(values, np.float32)[which]


def gain(tf: Floats, inverse_norm: Floats) -> Floats:
    """What a posting scores for a weight of 1, up to float32 rounding."""
    one = np.float32(1)
    return one - one / (one + tf * inverse_norm)
