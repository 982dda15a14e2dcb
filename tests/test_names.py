"""Rewrites without a model, worked out by hand; and whatever the conversation, each can be learned from."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from convsearch.generation.names import names, subjects, with_names, with_subject
from convsearch.parsing import parse_rewrite
from convsearch.types import Conversation, Turn


def rewrites(question: str, *texts: str) -> list[str]:
    """Of a question after the turns (question 1, answer 1, question 2, ...)."""
    turns = tuple(Turn(*texts[i : i + 2]) for i in range(0, len(texts), 2))
    return [rewrite for rewrite, _ in with_names(Conversation("q", turns, question, ()))]


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


def test_the_question_comes_first_and_then_the_newest_names() -> None:
    history = "Who was Ada?", "A friend of Babbage.", "And Byron?", "He was in Greece with Shelley."
    towns = ["Greece", "Shelley", "Byron", "Babbage", "Ada"]  # of a turn first the answer
    assert rewrites("when?", *history) == ["when?", *(f"{name}: when?" for name in towns)]
    assert rewrites("when?") == ["when?"]


@pytest.mark.parametrize(
    ("question", "expected"),
    [
        ("did he win?", ["did Ada win?"]),
        ("It was new?", ["Ada was new?"]),
        ("did THEY meet him", ["did Ada meet him", "did THEY meet Ada"]),
        ("its food?", ["Ada's food?"]),
        ("where is his?", ["where is Ada's?"]),
        ("and Their towns", ["and Ada's towns"]),
        ("what of her?", ["what of Ada?"]),  # no noun follows
        ("what of her, and why", ["what of Ada, and why"]),
        ("her books?", ["Ada's books?"]),
        ("who saw her", ["who saw Ada"]),
        ("did it and she like him?", ["did Ada and she like him?", "did it and Ada like him?"]),  # two pronouns at most
        ("hero of the items", []),  # no pronouns
        ("did  he\n win? ", ["did Ada win?"]),  # white space as the parser has it
    ],
)
def test_pronouns_are_replaced_and_the_topic_comes_last(question: str, expected: list[str]) -> None:
    plain = " ".join(question.split())
    assert rewrites(question, "who?", "it was Ada") == [plain, *expected, f"Ada: {plain}"]


def test_a_name_of_the_question_is_not_tried_again() -> None:
    assert rewrites("was ADA his friend?", "who?", "Ada and Byron; Ad") == [
        "was ADA his friend?",
        *("was ADA Ada and Byron's friend?", "Ada and Byron: was ADA his friend?"),
    ]
    assert rewrites("was Ada his friend?", "who?", "it was Ada") == ["was Ada his friend?"]


def test_the_thought_says_what_was_done() -> None:
    conversation = Conversation("q", (Turn("who?", "it was Ada"),), "Did her book sell?", ())
    assert list(with_names(conversation)) == [
        ("Did her book sell?", "The question is complete."),
        ("Did Ada's book sell?", '"her" is Ada.'),
        ("Ada: Did her book sell?", "The question is about Ada."),
    ]


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
    topics = ["Ada", "Iran", "antelope", "fast", "cheetah"]  # subjects are words of questions alone
    assert rewrites("how big?", *history) == ["how big?", *(f"{topic}: how big?" for topic in topics)]
    assert rewrites("a fast cheetah?", "how fast is the cheetah", "very") == ["a fast cheetah?"]


def test_a_second_subject() -> None:
    turns = Turn("how fast is the cheetah of Ada?", "very"), Turn("and an antelope?", "slower")
    conversation = Conversation("q", turns, "its  food?", ())
    assert list(with_subject(conversation, "its food?", "The question is complete.")) == []
    assert list(with_subject(conversation, "cheetah: its food?", "The question is about cheetah.")) == [
        ("cheetah, antelope: its food?", "The question is about cheetah and antelope."),
        ("cheetah, fast: its food?", "The question is about cheetah and fast."),
    ]
    assert list(with_subject(conversation, "Ada's food?", '"its" is Ada.'))[2] == (
        "cheetah: Ada's food?",
        '"its" is Ada. The question is about cheetah.',
    )


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
    found = list(with_names(conversation))
    assert found[0][0] == " ".join(question.split())
    longer = [pair for first in found for pair in with_subject(conversation, *first)]
    for rewrite, thought in found + longer:
        parsed = parse_rewrite(f"<think>{thought}</think>\n<rewrite>{rewrite}</rewrite>")
        assert (parsed.text, parsed.error) == (rewrite, None)
