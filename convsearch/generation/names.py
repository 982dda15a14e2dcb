"""Rewrites without a model: the question as it is, and with each name or subject of its conversation put into it.

A base model of 135M parameters hardly rewrites at all, but the retriever can teach what is missing: it says which of
these rewrites finds the gold passage. For English. A name is a run of capitalised words in a question or an answer. A
subject is a content word of an earlier question ("how fast is a cheetah?").
"""

import re
from collections.abc import Iterable, Iterator

from convsearch.types import Conversation

_FIRST, _WORD, _LINK = r"\b[A-Z][\w'’.-]*", r"[A-Z0-9][\w'’.-]*", r"(?:of|the|de|and|la|van|von|in|on|for|du|da|del)"
_NAME = re.compile(rf"{_FIRST}(?:\s+(?:{_LINK}\s+)*{_WORD})*")
_SENTENCE = re.compile(r"(?<=\w{3}\.)\s+")  # "Rome. The" is two; "St. Helens" and "John F. Kennedy" are one
_SUBJECT = re.compile(r"[^\W\d_][\w'’-]*")
_PRONOUN = re.compile(r"\b(he|she|it|they|him|them|his|her|its|their)\b", re.IGNORECASE)
_POSSESSIVE = {"his", "its", "their"}
# Words that begin sentences and are not names.
_NOT_NAMES = """
a about after also an and any as at because been before both but by can could did do does during for from had has have
he her his how i if in is it its many most no not of ok okay on once only or over she should since so some tell that the
their then there these they this those through to under until was we were what when where which while who why will with
would yes you
""".split()  # noqa: SIM905
# Further words of questions that say nothing about their subject.
_NOT_SUBJECTS = """
again against already away back become became been begin began being between came called come does doing done else even
ever every everything exactly find first found gave get give given goes going gone good got happen happened happens here
into instead just keep kept kind know known last less like live long look lots made main make makes many maybe mean mean
means meant more much must named need needed never next none nothing number often once ones other others part people
place really right said same say says sort still such sure take taken than them thing things think time times today
told took turn used using want wanted week went were what work would year years
""".split()  # noqa: SIM905
_FUNCTION_WORDS = {*_NOT_NAMES, *_NOT_SUBJECTS}


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


def subjects(questions: Iterable[str]) -> list[str]:
    """The content words of the questions, each once, in order."""
    found: dict[str, str] = {}
    for match in _SUBJECT.finditer(" ".join(questions)):
        word = re.sub(r"['’]s$", "", match.group())
        if len(word) > 3 and word.lower() not in _FUNCTION_WORDS:
            found.setdefault(word.lower(), word)
    return list(found.values())


def with_names(conversation: Conversation) -> Iterator[tuple[str, str]]:
    """(rewrite, thought): the question itself, then with each name, and then each subject, newest turn first.

    A name replaces one of the first two pronouns, or stands before the question as its topic. A subject is a topic.
    """
    question = " ".join(conversation.question.split())
    yield question, "The question is complete."
    pronouns = list(_PRONOUN.finditer(question))[:2]
    history = conversation.history[::-1]
    known = names(text for turn in history for text in (turn.answer, turn.question))
    for name in known:
        if name.lower() in question.lower():
            continue
        for match in pronouns:
            word, rest = match.group().lower(), question[match.end() :]
            owned = word in _POSSESSIVE or (word == "her" and re.match(r"\s\w", rest) is not None)
            replaced = f"{name}'s" if owned else name
            yield f"{question[: match.start()]}{replaced}{rest}", f'"{match.group()}" is {name}.'
        yield f"{name}: {question}", f"The question is about {name}."
    tried = {question.lower(), *(name.lower() for name in known)}
    for word in subjects(turn.question for turn in history):
        if not any(word.lower() in text for text in tried):
            yield f"{word}: {question}", f"The question is about {word}."


def with_subject(conversation: Conversation, rewrite: str, thought: str) -> Iterator[tuple[str, str]]:
    """(rewrite, thought): a rewrite of ``with_names`` that has a name or subject, with one more subject each."""
    question = " ".join(conversation.question.split())
    topic = rewrite.removesuffix(f": {question}")
    for word in subjects(turn.question for turn in reversed(conversation.history)) if rewrite != question else ():
        if word.lower() in rewrite.lower():
            continue
        if topic != rewrite:
            yield f"{topic}, {word}: {question}", f"The question is about {topic} and {word}."
        else:
            yield f"{word}: {rewrite}", f"{thought} The question is about {word}."
