"""Text -> index terms, token for token those of Lucene's English analyzer with Anserini's default settings.

Words (UAX #29), no possessive 's, lower case, no stop words, Porter stems. Text is cut at white space into chunks,
which repeat so often that a bounded dictionary of chunks has nearly all of them. A new chunk goes through one regular
expression if it is ASCII, else through word_break.
"""

import re
from collections.abc import Iterable
from functools import lru_cache
from itertools import chain
from typing import TypeVar

from retriever_server.text import word_break
from retriever_server.text.porter import stem

NAME = "lucene-english-2"  # goes into each index's manifest: change it whenever a text's terms change

# org.apache.lucene.analysis.en.EnglishAnalyzer.ENGLISH_STOP_WORDS_SET
_STOP_WORDS = """a an and are as at be but by for if in into is it no not of on or such that the their then there these
they this to was will with"""
STOP_WORDS = frozenset(_STOP_WORDS.split())
MAX_CHUNKS = 1 << 18  # in one dictionary: about 90 MB with their words
MAX_CHUNK_CHARS = 40  # longer ones are rarely repeated

_ASCII_WORD = re.compile(
    r"_*[A-Za-z0-9]\w*(?:(?:(?<=[A-Za-z])['.:](?=[A-Za-z])|(?<=[0-9])['.,;](?=[0-9]))\w+)*", re.ASCII
)
_POSSESSIVES = ("'s", "'S", "\u2019s", "\u2019S", "\uff07s", "\uff07S")
_SPACE_BUT_CONNECTOR = re.compile(r"[^\S\u202f]+")


T = TypeVar("T")


def _ends_in_half_a_pair(text: str) -> bool:
    return "\ud800" <= text[-1:] <= "\udbff"


def _chunks(text: str) -> list[str]:
    """Pieces that no word crosses; a narrow no-break space joins words."""
    return _SPACE_BUT_CONNECTOR.split(text) if "\u202f" in text else text.split()


def _tokens(text: str) -> Iterable[str]:
    if text.isascii() and len(text) <= word_break.MAX_UNITS:
        return _ASCII_WORD.findall(text)
    return word_break.tokens(text, inside=True)


def _word(token: str) -> str:
    if token.endswith(_POSSESSIVES):
        token = token[:-2]
    return token.lower() if token.isascii() else token.translate(word_break.lower_table())


@lru_cache(maxsize=1 << 17)
def _term(token: str) -> str | None:
    """The index term of a word of the text; None for a stop word."""
    word = _word(token)
    if word in STOP_WORDS:
        return None
    if word.isascii() or max(word) <= "\uffff":
        return stem(word)
    # Lucene counts a word's letters in UTF-16 units
    units = "".join(map(chr, memoryview(word.encode("utf-16-le")).cast("H")))
    return stem(units).encode("utf-16-le", "surrogatepass").decode("utf-16-le")


class _ByChunk(dict[str, tuple[T, ...]]):
    """Chunk -> its terms, or their numbers. Threads may share it: at worst a chunk is analysed twice."""

    def _values(self, terms: Iterable[str]) -> tuple[T, ...]:
        raise NotImplementedError

    def __missing__(self, chunk: str) -> tuple[T, ...]:
        values = self._values(term for token in _tokens(chunk) if (term := _term(token)) is not None)
        if len(chunk) <= MAX_CHUNK_CHARS:
            if len(self) >= MAX_CHUNKS:
                self.clear()
            self[chunk] = values
        return values

    def __call__(self, text: str) -> list[T]:
        if _ends_in_half_a_pair(text):
            tokens = word_break.tokens(text)
            return list(self._values(term for token in tokens if (term := _term(token)) is not None))
        return list(chain.from_iterable(map(self.__getitem__, _chunks(text))))


class _Terms(_ByChunk[str]):
    def _values(self, terms: Iterable[str]) -> tuple[str, ...]:
        return tuple(terms)


class TermIds(_ByChunk[int]):
    """Text -> the numbers of its terms in ``vocabulary``, in order of first appearance. Not for several threads.

    ``ids = TermIds(); ids("dogs, a dog, cats") == [0, 0, 1]; ids.vocabulary == {"dog": 0, "cat": 1}``
    """

    def __init__(self, vocabulary: dict[str, int] | None = None) -> None:
        super().__init__()
        self.vocabulary = {} if vocabulary is None else vocabulary

    def _values(self, terms: Iterable[str]) -> tuple[int, ...]:
        vocabulary = self.vocabulary
        return tuple(vocabulary.setdefault(term, len(vocabulary)) for term in terms)


_terms = _Terms()


def analyze(text: str) -> list[str]:
    """The index terms of a text, in order and with repetitions: ``analyze("The dogs run") == ["dog", "run"]``."""
    return _terms(text)


def words(text: str) -> list[str]:
    """The words of a text in lower case, stop words included, not stemmed. ``words("The U.S. dog's 1,000 b_c")`` is
    ``["the", "u.s", "dog", "1,000", "b_c"]``."""
    return [_word(token) for token in word_break.tokens(text)]
