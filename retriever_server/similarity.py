"""How much nearer a text is to its positives than its question: mean over positives d of cos(output, d) - cos(question,
d).

The reward of RQR (arXiv 2506.11603, section 3) is ten times this. Whole batches are encoded at once. Questions and
positives, which come again with every sample and epoch, are encoded once and kept.
"""

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from retriever_server.storage import Array

KEPT = 50_000  # vectors: 150 MB at 768 numbers each
MAX_LENGTH = 512  # tokens, or the encoder's own limit if that is lower
BATCH, CPU_BATCH = 64, 8  # texts per forward pass; on a CPU a batch that fits its caches is a sixth faster
Encode = Callable[[Sequence[str]], Array]  # texts -> float32 [n, dim]


class Item(NamedTuple):
    """``Item("moths navigate by the moon", "why do moths fly to lamps?", ("Moths keep their back to light.",))``"""

    output: str
    question: str
    positives: tuple[str, ...]


class TextEncoder(Protocol):
    """What encoder.Encoder offers. This module does not import it, because it loads torch."""

    name: str
    device: str

    def encode(self, texts: Sequence[str], max_length: int, batch_size: int) -> Array: ...


class Similarity:
    """An encoder with its memory; thread-safe. ``Similarity.of(Encoder.load(model)).gains([item])`` is in -2..2."""

    def __init__(self, encode: Encode, name: str, kept: int = KEPT) -> None:
        """``kept``: how many vectors of questions and positives stay in memory; the least recently used are dropped."""
        self.name, self._encode, self._limit = name, encode, kept
        self._kept: OrderedDict[bytes, Array] = OrderedDict()
        self._lock = threading.Lock()

    @classmethod
    def of(cls, encoder: TextEncoder, max_length: int = MAX_LENGTH, batch_size: int | None = None) -> "Similarity":
        """``batch_size``: texts per forward pass, chosen by the device if None."""
        size = batch_size or (CPU_BATCH if encoder.device == "cpu" else BATCH)
        return cls(lambda texts: encoder.encode(texts, max_length, size), encoder.name)

    def gains(self, items: Sequence[Item]) -> list[float]:
        """One gain per item.

        Raises:
            ValueError: an item has no positive.
        """
        for item in items:
            if isinstance(item.positives, str) or not item.positives:
                raise ValueError(f"an item needs a list of at least one positive, got {item.positives!r}")
        anchors = {text for item in items for text in (item.question, *item.positives)}
        vectors = self._known(anchors)
        texts = dict.fromkeys(text for item in items for text in (item.output, item.question, *item.positives))
        missing = [text for text in texts if text not in vectors]
        vectors |= zip(missing, unit(self._encode(missing)), strict=True)
        self._keep({text: vectors[text] for text in anchors})
        positives = {item.positives: [vectors[text] for text in item.positives] for item in items}
        centres = {texts: np.mean(found, axis=0, dtype=np.float64) for texts, found in positives.items()}
        return [float((vectors[item.output] - vectors[item.question]) @ centres[item.positives]) for item in items]

    def _known(self, texts: set[str]) -> dict[str, Array]:
        with self._lock:
            keys = {text: key for text in texts if (key := _key(text)) in self._kept}
            for key in keys.values():
                self._kept.move_to_end(key)
            return {text: self._kept[key] for text, key in keys.items()}

    def _keep(self, vectors: dict[str, Array]) -> None:
        with self._lock:
            for text, vector in vectors.items():
                self._kept[_key(text)] = vector
            while len(self._kept) > self._limit:
                self._kept.popitem(last=False)


def _key(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()


def unit(vectors: Array) -> Array:
    """[n, dim] -> the same directions with length 1 (a vector of zeros stays)."""
    lengths = np.linalg.norm(vectors.astype(np.float64), axis=-1, keepdims=True)
    result: Array = (vectors / np.maximum(lengths, 1e-12)).astype(np.float32)
    return result
