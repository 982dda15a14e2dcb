"""Rewrites without a model: the question as it is, and with a topic of its conversation before it.

A base model of 135M parameters hardly rewrites at all, but the retriever can teach what is missing: it says which of
these rewrites finds the gold passage. For English. A topic is a name (a run of capitalised words in a question or an
answer) or a subject (a content word of an earlier question: "how fast is a cheetah?").
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from convsearch.types import Conversation

_FIRST, _WORD, _LINK = r"\b[A-Z][\w'’.-]*", r"[A-Z0-9][\w'’.-]*", r"(?:of|the|de|and|la|van|von|in|on|for|du|da|del)"
_NAME = re.compile(rf"{_FIRST}(?:\s+(?:{_LINK}\s+)*{_WORD})*")
_SENTENCE = re.compile(r"(?<=\w{3}\.)\s+")  # "Rome. The" is two; "St. Helens" and "John F. Kennedy" are one
_SUBJECT = re.compile(r"[^\W\d_][\w'’-]*")
# Words that begin sentences and are not names.
_NOT_NAMES = """
a about after also an and any as at because been before both but by can could did do does during for from had has have
he her his how i if in is it its many most no not of ok okay on once only or over she should since so some tell that the
their then there these they this those through to under until was we were what when where which while who why will with
would yes you
""".split()  # noqa: SIM905
# Further words of questions that say nothing about their subject.
_NOT_SUBJECTS = """
again against already away back became become been began begin being between called came come does doing done else even
ever every everything exactly find first found gave get give given goes going gone good got happen happened happens here
instead into just keep kept kind know known last less like live long look lots made main make makes many maybe mean
means meant more much must name named names need needed never next none nothing number often once ones other others part
people place really right said same say says sort still such sure take taken taking than them thing things think time
times today told took turn used using want wanted week went were what work would year years
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


@dataclass(frozen=True, slots=True)
class Guess:
    """What a question may be about, and the rewrite and thought that say so."""

    topic: str
    rewrite: str
    thought: str


def guesses(conversation: Conversation) -> list[Guess]:
    """First those that leave the question as it is: the topic is the question itself, or something that it says.

    Then one for each topic of the history that the question does not say: names before subjects, the newest first.
    """
    question = " ".join(conversation.question.split())
    turns = conversation.history[::-1]
    said = topics([question], [question])
    past = topics((text for turn in turns for text in (turn.answer, turn.question)), (turn.question for turn in turns))
    complete = [Guess(topic, question, "The question is complete.") for topic in (question, *said)]
    missing = [topic for topic in past if topic.lower() not in question.lower()]
    return complete + [Guess(topic, f"{topic}: {question}", f"The question is about {topic}.") for topic in missing]


def topics(texts: Iterable[str], questions: Iterable[str]) -> list[str]:
    """The names in the texts, then the subjects of the questions that are in none of these names."""
    named = names(texts)
    return named + [word for word in subjects(questions) if not any(word.lower() in name.lower() for name in named)]
