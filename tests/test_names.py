"""Rewrites without a model, worked out by hand; and whatever the conversation, each can be learned from."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from convsearch.generation.names import Guess, guesses, names, subjects
from convsearch.parsing import parse_rewrite
from convsearch.types import Conversation, Turn


def topics_of(question: str, *texts: str) -> list[str]:
    """Of a question after the turns (question 1, answer 1, question 2, ...): those that the rewrite adds."""
    turns = tuple(Turn(*texts[i : i + 2]) for i in range(0, len(texts), 2))
    found = guesses(Conversation("q", turns, question, ()))
    return [guess.topic for guess in found if guess.rewrite.endswith(f": {' '.join(question.split())}")]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("who saw it?", []),
        ("What is it? It was there. The end", []),
        ("It's his. What's that? I'm here; They’re not", []),  # contractions of such words are no names either
        ("When did Ada Lovelace meet Babbage?", ["Ada Lovelace", "Babbage"]),
        ("The Book of Kells is in Dublin.", ["Book of Kells", "Dublin"]),
        ("Vincent van Gogh saw Lord of the Rings", ["Vincent van Gogh", "Lord of the Rings"]),
        ("In the Alps", ["Alps"]),
        ("Rodin's studio, and Claudel’s", ["Rodin", "Claudel"]),
        ("Rodin's Thinker", ["Rodin's Thinker"]),
        ("rome, Rome, ROME!", ["Rome"]),  # each once, in its first spelling
        ("It is in Rome. The city is old. Paris. Oslo.", ["Rome", "Paris", "Oslo"]),  # sentences are not joined
        ("John F. Kennedy flew over Mount St. Helens.", ["John F. Kennedy", "Mount St. Helens"]),
        ("In 1914 Serbia", ["1914 Serbia"]),
        ("T or J. or I?", []),  # one letter alone is no name
        ("an iPhone of the 1990s", []),  # not "Phone", and a name begins with a capital letter
    ],
)
def test_names(text: str, found: list[str]) -> None:
    assert names([text]) == found


def test_the_newest_names_come_first() -> None:
    history = "Who was Ada?", "A friend of Babbage.", "And Byron?", "He was in Greece with Shelley."
    assert topics_of("when?", *history) == [
        "Greece",
        "Shelley",
        "Byron",
        "Babbage",
        "Ada",
    ]  # of a turn first the answer
    assert topics_of("when?") == []


def test_what_the_question_says_is_no_topic() -> None:
    assert topics_of("was ADA his  friend?", "who?", "Ada and Byron; Ad") == ["Ada and Byron"]
    assert topics_of("is Mount\nKenya high?", "who?", "Mount Kenya") == []


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("How fast is a cheetah?", ["fast", "cheetah"]),
        ("what did he really do there, then?", []),  # function words
        ("the cheetah's cub, CHEETAH", ["cheetah"]),  # each once; "cub" has three letters
        ("in 1914 or 1,000 x2", []),  # a word begins with a letter
        ("pot-au-feu, Éclair", ["pot-au-feu", "Éclair"]),
    ],
)
def test_subjects(text: str, found: list[str]) -> None:
    assert subjects([text]) == found


def test_subjects_come_after_the_names() -> None:
    history = "how fast is the cheetah of Iran?", "that of Ada.", "and an antelope?", "slower animals, too"
    assert topics_of("how big?", *history) == ["Ada", "Iran", "antelope", "fast", "cheetah"]  # words of questions alone
    assert topics_of("a fast cheetah?", "how fast is the cheetah", "very") == []


def test_guesses() -> None:
    conversation = Conversation("q", (Turn("how fast is a cheetah?", "Ask Ada."),), " was  Byron's horse fast? ", ())
    question, complete = "was Byron's horse fast?", "The question is complete."
    assert guesses(conversation) == [
        Guess(question, question, complete),
        Guess("Byron", question, complete),
        Guess("horse", question, complete),
        Guess("fast", question, complete),
        Guess("Ask Ada", f"Ask Ada: {question}", "The question is about Ask Ada."),
        Guess("cheetah", f"cheetah: {question}", "The question is about cheetah."),
    ]


WORDS = [
    "he",
    "Her",
    "its",
    "It's",
    "Ada",
    "St.",
    "Kells",
    "of",
    "The",
    "1914",
    "why",
    "cheetah",
    "Éva",
    "O'Neil’s",
    "(",
    "?",
    ".",
]
TEXT = st.one_of(
    st.lists(st.sampled_from(WORDS), min_size=1).map(" ".join),
    st.text().map(lambda text: text.replace("<", "")),  # a question that itself has the tags cannot be learned from
)


@given(TEXT.filter(str.strip), st.lists(st.tuples(TEXT, TEXT), max_size=3))
def test_every_rewrite_parses_back(question: str, history: list[tuple[str, str]]) -> None:
    conversation = Conversation("q", tuple(Turn(*turn) for turn in history), question, ())
    found = guesses(conversation)
    assert found[0].rewrite == " ".join(question.split())
    for guess in found:
        parsed = parse_rewrite(f"<think>{guess.thought}</think>\n<rewrite>{guess.rewrite}</rewrite>")
        assert (parsed.text, parsed.error) == (guess.rewrite, None)
