"""The Porter stemmer of Lucene's PorterStemFilter.

M. F. Porter, "An algorithm for suffix stripping", Program 14(3), 1980, with its author's later changes: -bli becomes
-ble, -logi becomes -log, and words of one or two letters stay as they are. Every character but a, e, i, o, u and some y
counts as a consonant, digits and foreign letters too.
"""

# The first suffix that fits decides, even if its condition then fails: a longer one is before those that end it.
_STEP_2 = (
    ("ational", "ate"), ("tional", "tion"), ("enci", "ence"), ("anci", "ance"), ("izer", "ize"), ("bli", "ble"),
    ("alli", "al"), ("entli", "ent"), ("eli", "e"), ("ousli", "ous"), ("ization", "ize"), ("ation", "ate"),
    ("ator", "ate"), ("alism", "al"), ("iveness", "ive"), ("fulness", "ful"), ("ousness", "ous"), ("aliti", "al"),
    ("iviti", "ive"), ("biliti", "ble"), ("logi", "log"),
)  # fmt: skip
_STEP_3 = (("icate", "ic"), ("ative", ""), ("alize", "al"), ("iciti", "ic"), ("ical", "ic"), ("ful", ""), ("ness", ""))
_DROPPED = "al ance ence er ic able ible ant ement ment ent ion ou ism ate iti ous ive ize"
_STEP_4 = tuple((suffix, "") for suffix in _DROPPED.split())


def _by_last_two(rules: tuple[tuple[str, str], ...]) -> dict[str, tuple[tuple[str, str], ...]]:
    return {end: tuple(rule for rule in rules if rule[0].endswith(end)) for end in {suffix[-2:] for suffix, _ in rules}}


_RULES_2, _RULES_3, _RULES_4 = _by_last_two(_STEP_2), _by_last_two(_STEP_3), _by_last_two(_STEP_4)


def _kinds(word: str) -> str:
    """A "v" for each vowel, a "c" for each consonant; a y is a vowel after a consonant: ``_kinds("toy") == "cvc"``."""
    kinds, last = [], "v"
    for letter in word:
        last = "v" if letter in "aeiou" or (letter == "y" and last == "c") else "c"
        kinds.append(last)
    return "".join(kinds)


def _measure(word: str) -> int:
    """Porter's m: how often a consonant follows a vowel."""
    return _kinds(word).count("vc")


def _ends_short(word: str) -> bool:
    """Porter's *o: consonant, vowel, consonant at the end, the last not w, x or y."""
    return len(word) > 2 and word[-1] not in "wxy" and _kinds(word).endswith("cvc")


def _ends_double(word: str) -> bool:
    return len(word) > 1 and word[-1] == word[-2] and word[-1] not in "aeiou" and _kinds(word)[-1] == "c"


def _replace(word: str, rules: dict[str, tuple[tuple[str, str], ...]], least: int) -> str:
    """Replaces the suffix that fits, if what is before it measures at least ``least``."""
    for suffix, new in rules.get(word[-2:], ()):
        if word.endswith(suffix):
            stem = word[: -len(suffix)]
            if suffix == "ion" and not stem.endswith(("s", "t")):
                continue
            return stem + new if _measure(stem) >= least else word
    return word


def _plural_and_past(word: str) -> str:
    if word.endswith("s"):
        if word.endswith(("sses", "ies")):
            word = word[:-2]
        elif not word.endswith("ss"):
            word = word[:-1]
    if word.endswith("eed"):
        return word[:-1] if _measure(word[:-3]) > 0 else word
    stem = word[:-2] if word.endswith("ed") else word[:-3] if word.endswith("ing") else ""
    if "v" not in _kinds(stem):
        return word
    if stem.endswith(("at", "bl", "iz")):
        return stem + "e"
    if _ends_double(stem):
        return stem if stem[-1] in "lsz" else stem[:-1]
    return stem + "e" if _measure(stem) == 1 and _ends_short(stem) else stem


def stem(word: str) -> str:
    """The stem of a lower-case word: ``stem("relational") == "relat"``."""
    if len(word) <= 2:
        return word
    word = _plural_and_past(word)
    if word.endswith("y") and "v" in _kinds(word[:-1]):
        word = word[:-1] + "i"
    if len(word) > 1:
        word = _replace(word, _RULES_2, 1)
    word = _replace(word, _RULES_3, 1)
    if len(word) > 1:
        word = _replace(word, _RULES_4, 2)
    if word.endswith("e"):
        measure = _measure(word)
        if measure > 1 or (measure == 1 and not _ends_short(word[:-1])):
            word = word[:-1]
    if word.endswith("ll") and _measure(word) > 1:
        word = word[:-1]
    return word
