"""Rewrites without a model: the question as it is, and with each name of its conversation put into it.

A base model of 135M parameters hardly rewrites at all, but the retriever can teach what is missing: it says which of
these rewrites finds the gold passage. For English; a name is a run of capitalised words.
"""

import re
from collections.abc import Iterable, Iterator

from convsearch.types import Conversation

_FIRST, _WORD, _LINK = r"\b[A-Z][\w'’.-]*", r"[A-Z0-9][\w'’.-]*", r"(?:of|the|de|and|la|van|von|in|on|for|du|da|del)"
_NAME = re.compile(rf"{_FIRST}(?:\s+(?:{_LINK}\s+)*{_WORD})*")
_SENTENCE = re.compile(r"(?<=\w{3}\.)\s+")  # "Rome. The" is two; "St. Helens" and "John F. Kennedy" are one
_PRONOUN = re.compile(r"\b(he|she|it|they|him|them|his|her|its|their)\b", re.IGNORECASE)
_POSSESSIVE = {"his", "its", "their"}
# Words that begin sentences and are not names.
_NOT_NAMES = """
a about after also an and any as at because been before both but by can could did do does during for from had has have
he her his how i if in is it its many most no not of ok okay on once only or over she should since so some tell that the
their then there these they this those through to under until was we were what when where which while who why will with
would yes you
""".split()  # noqa: SIM905


def names(texts: Iterable[str]) -> list[str]:
    """The names in the texts, each once, in order."""
    found: dict[str, str] = {}
    for sentence in (sentence for text in texts for sentence in _SENTENCE.split(text)):
        for match in _NAME.finditer(sentence):
            words = match.group().rstrip(".,?!'’").split()
            while words and re.split("['’]", words[0].lower())[0] in _NOT_NAMES:  # also "It's"
                words.pop(0)
            name = re.sub(r"['’]s$", "", " ".join(words))
            if len(name) > 1:
                found.setdefault(name.lower(), name)
    return list(found.values())


def with_names(conversation: Conversation) -> Iterator[tuple[str, str]]:
    """(rewrite, thought): the question itself, then for each name, newest turn first, the question with it.

    A name replaces one of the first two pronouns, or stands before the question as its topic.
    """
    question = " ".join(conversation.question.split())
    yield question, "The question is complete."
    pronouns = list(_PRONOUN.finditer(question))[:2]
    texts = (text for turn in reversed(conversation.history) for text in (turn.answer, turn.question))
    for name in names(texts):
        if name.lower() in question.lower():
            continue
        for match in pronouns:
            word, rest = match.group().lower(), question[match.end() :]
            owned = word in _POSSESSIVE or (word == "her" and re.match(r"\s\w", rest) is not None)
            replaced = f"{name}'s" if owned else name
            yield f"{question[: match.start()]}{replaced}{rest}", f'"{match.group()}" is {name}.'
        yield f"{name}: {question}", f"The question is about {name}."
