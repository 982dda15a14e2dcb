"""One byte per number: a coarse copy of the vectors with a known error, so that most vectors need not be read.

With m the mean vector, d' = d - m and q' = q - m, exactly q.d = q'.d' + m.d' + q.m; the last term is the same for all
d. d' is stored as scale x code, code int8, scale = max|d'| / 127, with r >= |d' - scale x code|; q' likewise, with
error e. By Cauchy and Schwarz |q'.d' - coarse product| <= |q'| r + e (|d'| + r). The coarse product is an integer sum,
hence exact. Centring matters for encoders such as ANCE, whose vectors point in similar directions: it removes the
common part of the error.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from retriever_server.storage import Array, NpyAppender, load_array

BLOCK = 8192  # rows encoded at a time
SAMPLE = 65_536  # rows, evenly spread, whose mean is subtracted
UP = 1 + 1e-6  # norms are rounded to float32: upwards, so that a bound stays one


@dataclass(frozen=True, slots=True)
class Codes:
    """``codes`` int8 [N, D]; ``scale``, ``offset`` (m.d'), ``error`` (r), ``norm`` (|d'|) float32 [N]; ``mean`` [D]."""

    codes: Array
    scale: Array
    offset: Array
    error: Array
    norm: Array
    mean: Array

    @classmethod
    def of(cls, vectors: Array) -> "Codes":
        """Of vectors in memory."""
        mean = sample_mean(vectors)
        blocks = [encode(vectors[start : start + BLOCK], mean) for start in range(0, len(vectors), BLOCK)]
        columns = [np.concatenate(column) for column in zip(*blocks, strict=True)]
        return cls(*columns, mean)  # type: ignore[call-arg]  # mypy cannot count them

    @classmethod
    def load(cls, folder: Path, count: int, dim: int) -> "Codes":
        """Memory-mapped, as ``write`` left them; ValueError as storage.load_array."""
        codes = load_array(folder / "codes.npy", "int8", count * dim).reshape(count, dim)
        names = ("scale", "offset", "error", "norm")
        columns = [load_array(folder / f"codes_{name}.npy", "float32", count) for name in names]
        return cls(codes, *columns, load_array(folder / "codes_mean.npy", "float32", dim))  # type: ignore[call-arg]

    def rows(self, start: int, end: int) -> "Codes":
        """Those of a range of passages; views."""
        columns = (self.codes, self.scale, self.offset, self.error, self.norm)
        return Codes(*(column[start:end] for column in columns), self.mean)  # type: ignore[call-arg]


def write(folder: Path, vectors: Array, progress: Callable[[int], Any]) -> None:
    """Writes the codes of ``vectors`` [N, D] block by block; calls ``progress`` with the number of rows of each."""
    names = ("codes", "codes_scale", "codes_offset", "codes_error", "codes_norm")
    files = [NpyAppender(folder / f"{name}.npy", "int8" if name == "codes" else "float32") for name in names]
    mean = sample_mean(vectors)
    for start in range(0, len(vectors), BLOCK):
        block = vectors[start : start + BLOCK]
        for file, values in zip(files, encode(block, mean), strict=True):
            file.append(values)
        progress(len(block))
    for file in files:
        file.close()
    np.save(folder / "codes_mean.npy", mean)


def sample_mean(vectors: Array) -> Array:
    """float32 [D]; results are exact with any vector, the mean makes the bounds narrow."""
    step = max(1, len(vectors) // SAMPLE)
    total = np.zeros(vectors.shape[1])
    for start in range(0, len(vectors), BLOCK * step):
        total += vectors[start : start + BLOCK * step : step].sum(axis=0, dtype=np.float64)
    return (total / len(range(0, len(vectors), step))).astype(np.float32)


def encode(vectors: Array, mean: Array) -> tuple[Array, Array, Array, Array, Array]:
    """(codes, scale, offset, error, norm) of vectors [n, D]."""
    centred = vectors.astype(np.float64) - mean
    scale = np.abs(centred).max(axis=1).astype(np.float32) / np.float32(127)
    scale = np.where(
        scale > np.finfo(np.float32).tiny, scale, np.float32(1)
    )  # for a vector that equals the mean, or nearly
    codes = np.clip(np.rint(centred / scale[:, None]), -127, 127).astype(np.int8)
    error = np.linalg.norm(centred - codes * scale[:, None].astype(np.float64), axis=1) * UP
    norm = np.linalg.norm(centred, axis=1) * UP
    return codes, scale, (centred @ mean.astype(np.float64)).astype(np.float32), _upwards(error), _upwards(norm)


def _upwards(values: Array) -> Array:
    rounded = values.astype(np.float32)
    return np.where(rounded < values, np.nextafter(rounded, np.float32(np.inf)), rounded)


@dataclass(frozen=True, slots=True)
class Queries:
    """Queries prepared for coarse products; see the module's formula. All [Q], but ``exact`` and ``coarse`` [Q, D]."""

    exact: Array  # float32, as the encoder gave them
    coarse: Array  # int8 codes, or the float32 vectors
    scale: Array  # float32
    shift: Array  # q.m, float64
    length: Array  # |q'|
    error: Array  # e
    full_length: Array  # |q|

    @classmethod
    def of(cls, queries: Array, mean: Array | None) -> "Queries":
        """``mean`` None: no centring and no rounding, for products of the vectors themselves."""
        exact = np.ascontiguousarray(queries, np.float32)
        if not np.isfinite(exact).all():
            raise ValueError("a query's vector has values that are not finite: the encoder's weights are damaged")
        full = np.linalg.norm(exact.astype(np.float64), axis=1) * UP
        if mean is None:
            zeros = np.zeros(len(exact))
            return cls(exact, exact, np.ones(len(exact), np.float32), zeros, full, zeros, full)
        codes, scale, _, error, length = encode(exact, mean)
        shift = exact.astype(np.float64) @ mean.astype(np.float64)
        return cls(exact, codes, scale, shift, length.astype(np.float64), error.astype(np.float64), full)

    def take(self, kept: Array) -> "Queries":
        return Queries(*(getattr(self, name)[kept] for name in self.__dataclass_fields__))


def bounds(queries: Queries, codes: Codes, arithmetic: float) -> Array:
    """The largest error of a block's coarse scores, float64 [Q]; ``arithmetic``: of the coarse product, relative."""
    error, norm = float(codes.error.max()), float(codes.norm.max())
    offset, mean = float(np.abs(codes.offset).max()), float(np.linalg.norm(codes.mean.astype(np.float64)))
    coarse = queries.length * error + queries.error * (norm + error)
    rounding = arithmetic * (queries.length + queries.error) * (norm + error) + 2**-21 * offset
    exact = 1e-12 * queries.full_length * (norm + mean)  # of dot and of the shift, both in float64
    return np.asarray((coarse + rounding + exact) * UP)
