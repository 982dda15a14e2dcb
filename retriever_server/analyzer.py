"""Text -> index terms, after Lucene's English analyzer: words, no possessive 's, lower case, no stop words, Porter stems.

Word boundaries follow the parts of Unicode's UAX #29 that written English meets: letters and digits join; an apostrophe, a
dot or a colon joins two letters ("don't", "u.s"), an apostrophe, a dot, a comma or a semicolon joins two digits ("3.14",
"1,000"); an underscore joins anything; each ideograph or hiragana sign is a word. The stemmer is the published Porter
algorithm, which differs from Lucene's in two endings (-bli, -logi).
"""

import re
import threading
from typing import Any

NAME = "english-porter-1"  # goes into each index's manifest: change it whenever a text's terms change

# org.apache.lucene.analysis.en.EnglishAnalyzer.ENGLISH_STOP_WORDS_SET
STOP_WORDS = frozenset(
    re.findall(
        r"\w+",
        "a an and are as at be but by for if in into is it no not of on or such that the their then there these they this to was will with",
    )
)
MAX_TOKEN_CHARS = 255  # Lucene's StandardTokenizer cuts longer words

_SINGLE = "\u3040-\u309f\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"  # one sign, one word
_NUMBER_SIGNS = "\u00b2\u00b3\u00b9\u00bc-\u00be\u2070-\u209c\u2150-\u215f\u2460-\u249b"  # ² ½ ₂ ①: no part of a word
_MARKS = "\u0300-\u036f\u200d"
_WORD = rf"[^\W{_SINGLE}{_NUMBER_SIGNS}]"
_LETTER = rf"[^\W\d_{_SINGLE}{_NUMBER_SIGNS}]"
_QUOTES_AND_DOTS = "'.\u2018\u2019\u2024\ufe52\uff07\uff0e"
_TOKEN = re.compile(
    rf"[{_SINGLE}]|{_WORD}+(?:(?:[{_MARKS}]+|(?<={_LETTER})[{_QUOTES_AND_DOTS}:\u00b7](?={_LETTER})|(?<=\d)[{_QUOTES_AND_DOTS},;](?=\d)){_WORD}*)*"
)
_POSSESSIVES = ("'s", "\u2019s", "\uff07s")
_per_thread = threading.local()


def _stemmer() -> Any:
    """A Stemmer object caches inside itself and must not be shared by threads."""
    if not hasattr(_per_thread, "stemmer"):
        import Stemmer

        _per_thread.stemmer = Stemmer.Stemmer("porter")
    return _per_thread.stemmer


def words(text: str) -> list[str]:
    """The words of a text in lower case, stop words included, not stemmed. ``words("The U.S. dog's 1,000 b_c")`` is
    ``["the", "u.s", "dog", "1,000", "b_c"]``."""
    found = []
    for token in _TOKEN.findall(text.lower()):
        if token.endswith(_POSSESSIVES):
            token = token[:-2]
        if len(token) > MAX_TOKEN_CHARS:
            found += [token[start : start + MAX_TOKEN_CHARS] for start in range(0, len(token), MAX_TOKEN_CHARS)]
        elif token.strip("_"):
            found.append(token)
    return found


def analyze(text: str) -> list[str]:
    """The index terms of a text, in order and with repetitions. ``analyze("The dogs are running")`` is ``["dog", "run"]``."""
    kept = [word for word in words(text) if word not in STOP_WORDS]
    stems: list[str] = _stemmer().stemWords(kept)
    return [stem if len(word) > 2 else word for word, stem in zip(kept, stems, strict=True)]  # Lucene leaves "us" as it is
