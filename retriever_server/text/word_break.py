"""The words of any Unicode text, as Lucene's StandardTokenizer cuts them: UAX #29, with other rules for emoji and Thai.

The grammar is that tokenizer's (org.apache.lucene.analysis.standard in Lucene 9: the word classes of Unicode 9, the
emoji of Unicode 11) over classes of characters, each a letter here, that word_break.txt lists. A word is the longest
match within 255 UTF-16 units; if nothing matches, one character is skipped.
"""

import re
from bisect import bisect_right
from collections.abc import Iterator
from functools import cache
from itertools import accumulate
from pathlib import Path
from typing import Any

_SURROGATE = re.compile("[\ud800-\udfff]")
DATA = Path(__file__).with_name("word_break.txt")
MAX_UNITS = 255  # StandardAnalyzer.DEFAULT_MAX_TOKEN_LENGTH: longer words are cut

# One letter per class, in the order of Lucene's numbers (tests/helpers_lucene.py compares the two):
#   - in no word   Q double quote   # # and *   ' single quote   , joins digits   . joins letters, and digits
#   9 ASCII digit   : joins letters   A letter   _ connector   P pictograph   x mark or format sign   H Hebrew
#   N other digit   T Thai, Lao, Khmer, Myanmar   t their marks   G Hangul   z zero-width joiner   k keycap
#   L letter and emoji (ℹ Ⓜ)   C Han   K Katakana   R Hiragana   v text style   V emoji style   I regional indicator
#   M skin tone   s tag   e end of tags
CLASSES = "-Q#',.9:A_PxHNTtGzkLCKRvVIMse"

Expression = tuple[Any, ...]  # ("set", letters), ("cat", a, b), ("alt", frozenset of expressions), ("star", a)
NOTHING: Expression = ("alt", frozenset())
EMPTY: Expression = ("star", NOTHING)


def one(letters: str) -> Expression:
    return ("set", frozenset(letters))


def alt(*parts: Expression) -> Expression:
    flat = frozenset(inner for part in parts for inner in (part[1] if part[0] == "alt" else [part]))
    return next(iter(flat)) if len(flat) == 1 else ("alt", flat)


def cat(first: Expression, *rest: Expression) -> Expression:
    if not rest:
        return first
    second = cat(*rest)
    if NOTHING in (first, second):
        return NOTHING
    if first == EMPTY:
        return second
    if second == EMPTY:
        return first
    return cat(first[1], cat(first[2], second)) if first[0] == "cat" else ("cat", first, second)


def star(part: Expression) -> Expression:
    return part if part[0] == "star" else ("star", part)


def plus(part: Expression) -> Expression:
    return cat(part, star(part))


def maybe(part: Expression) -> Expression:
    return alt(EMPTY, part)


def grammar() -> Expression:
    """One token of Lucene."""
    # WB4: marks, format signs and joiners belong to what they follow
    marks, unstyled = star(one("xtzkvVseM")), star(one("xtzkseM"))

    def each(letters: str) -> Expression:
        return cat(one(letters), marks)

    joiners = star(one("z"))
    pictograph = cat(joiners, one("PL"), unstyled, maybe(one("V")))
    toned = cat(maybe(cat(joiners, one("P"), unstyled)), one("M"), unstyled)
    picture = alt(pictograph, toned)
    emoji = alt(
        cat(picture, alt(star(cat(one("z"), picture)), cat(plus(one("s")), one("e")))),
        cat(one("9#"), unstyled, maybe(one("V")), one("k"), unstyled),
        cat(each("I"), each("I")),
    )
    connectors = star(each("_"))
    number = cat(each("9N"), star(cat(alt(connectors, each(",.'")), each("9N"))))
    letters = cat(each("AHGL"), star(cat(alt(connectors, each(":.'")), each("AHGL"))))
    hebrew = cat(each("H"), alt(each("'"), cat(each("Q"), each("H"))))
    katakana = cat(each("K"), star(cat(connectors, each("K"))))
    piece = alt(katakana, plus(alt(hebrew, number, letters)))
    word = cat(connectors, piece, star(cat(plus(each("_")), piece)), connectors)
    return alt(emoji, word, plus(each("Tt")), each("C"), each("R"))


@cache
def ends(expression: Expression) -> bool:
    """Whether it matches the empty word."""
    kind, *parts = expression
    if kind == "cat":
        return all(map(ends, parts))
    return kind == "star" or (kind == "alt" and any(map(ends, parts[0])))


@cache
def after(expression: Expression, letter: str) -> Expression:
    """Brzozowski's derivative: what may follow ``letter``. It has finitely many values, the states of a machine."""
    kind, *parts = expression
    if kind == "set":
        return EMPTY if letter in parts[0] else NOTHING
    if kind == "alt":
        return alt(*(after(part, letter) for part in parts[0]))
    if kind == "star":
        return cat(after(parts[0], letter), expression)
    first, second = parts
    rest = cat(after(first, letter), second)
    return alt(rest, after(second, letter)) if ends(first) else rest


@cache
def machine() -> tuple[list[dict[str, int]], list[bool]]:
    """The grammar as a table: per state, class letter -> next state (absent if no token goes on so), and if it ends
    one."""
    states = [grammar()]
    steps: list[dict[str, int]] = []
    numbers = {states[0]: 0}
    for state in states:  # the list grows during the loop
        steps.append({})
        for letter in CLASSES:
            target = after(state, letter)
            if target != NOTHING:
                if target not in numbers:
                    numbers[target] = len(states)
                    states.append(target)
                steps[-1][letter] = numbers[target]
    return steps, [ends(state) for state in states]


class _Classes(dict[str, str]):
    """Character -> class letter, filled when a character is first seen."""

    def __init__(self) -> None:
        rows = [line.split() for line in DATA.read_text(encoding="ascii").splitlines() if line.startswith("class ")]
        self._firsts = [int(first, 16) for _, first, _, _ in rows]
        self._runs = [(int(last, 16), letter) for _, _, last, letter in rows]

    def __missing__(self, character: str) -> str:
        code = ord(character)
        # the first run starts below every other character that is in a word
        last, letter = self._runs[bisect_right(self._firsts, code) - 1]
        self[character] = letter if self._firsts[0] <= code <= last else "-"
        return self[character]


_classes = cache(_Classes)


@cache
def lower_table() -> dict[int, int]:
    """Code point -> its lower case, one to one, as java.lang.Character.toLowerCase in Java 21."""
    rows = [line.split()[1:] for line in DATA.read_text(encoding="ascii").splitlines() if line.startswith("lower ")]
    runs = [(int(first, 16), int(last, 16), int(step), int(shift)) for first, last, step, shift in rows]
    return {code: code + shift for first, last, step, shift in runs for code in range(first, last + 1, step)}


def tokens(text: str, inside: bool = False) -> Iterator[str]:
    """The words of a text, unchanged; ``inside``: more text follows, after a space.

    ``list(tokens("naïve 3,5 東京 👍🏽")) == ["naïve", "3,5", "東", "京", "👍🏽"]``
    """
    if _SURROGATE.search(text):  # two halves of a pair are one character in Java
        text = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "surrogatepass")
        if not inside and "\ud800" <= text[-1] <= "\udbff":
            yield from _tokens_before_half_a_pair(text)
            return
    start, size = 0, len(text)
    while start < size:
        end = _match(text, start)
        if end > start:
            yield text[start:end]
        start = max(end, start + 1)


def _match(text: str, start: int) -> int:
    """Where the longest word from ``start`` ends; ``start`` if none begins there."""
    steps, final = machine()
    classes = _classes()
    state, end, units = 0, start, 0
    for position in range(start, len(text)):
        character = text[position]
        units += 1 if character <= "\uffff" else 2
        following = steps[state].get(classes[character])
        if following is None or units > MAX_UNITS:
            break
        state = following
        if final[state]:
            end = position + 1
    return end


def _tokens_before_half_a_pair(text: str) -> Iterator[str]:
    """``tokens`` if the last character is the first half of a surrogate pair.

    When Lucene's reader meets that half while it fills its buffer of 255 units, it takes the text for finished: it cuts
    the current word there, and loses what begins there. So this function has to follow the buffer.
    """
    steps, final = machine()
    classes = _classes()
    units = text.encode("utf-16-le", "surrogatepass")
    offsets = list(accumulate((1 if character <= "\uffff" else 2 for character in text), initial=0))
    base = filled = held = 0  # the units base:filled are in the buffer, and one more that must wait for its other half
    start = 0
    while start < len(text):
        state, end = 0, start
        for position in range(start, len(text)):
            if offsets[position] == filled:
                if offsets[start] > base:
                    base, filled, held = offsets[start], filled + held, 0
                asked = MAX_UNITS - (filled - base) - held
                got = min(asked, offsets[-1] - filled - held)
                filled += got
                halved = got > 0 and 0xD8 <= units[2 * filled - 1] <= 0xDB
                if halved and got == asked:
                    filled, held = filled - 1, 1
                if got == 0 or (halved and (got < asked or got == 1)):
                    if position == start:
                        return
                    break
            following = steps[state].get(classes[text[position]])
            if following is None:
                break
            state = following
            if final[state]:
                end = position + 1
        if end > start:
            yield text[start:end]
        start = max(end, start + 1)
