"""The prompts: the published text word for word, turns unchanged, the newest turns kept, one worked example first."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from convsearch.parsing import parse_rewrite
from convsearch.prompts import EXAMPLE, EXAMPLE_OUTPUT, STYLES, render, with_worked_example
from convsearch.types import Conversation, Turn

HAMLET = Conversation(
    "q", (Turn("who wrote Hamlet?", "Shakespeare."), Turn("when?", "Around 1600.")), "and his wife?", ("d1",)
)

PAPER = """\
Given a query and its context, you must first think about the reasoning process in the mind to decontextualize the \
query by resolving coreference and omission issues. Then, provide the user with a rewrite that retains its original \
meaning and is as informative as possible to help search engines retrieve relevant documents effectively. \
The reasoning process and rewrite should be enclosed within <think> </think> and <rewrite> </rewrite> tags, \
respectively, i.e., <think> reasoning process here </think>
<rewrite> rewrite here </rewrite>.

### Context Begin ###
Q1: who wrote Hamlet?
A1: Shakespeare.
Q2: when?
A2: Around 1600.
### Context End ###

Query: and his wife?
Rewrite:"""

COMPACT = """\
Rewrite the last question of this conversation so that a search engine understands it alone. Think first.

Q1: who wrote Hamlet?
A1: Shakespeare.
Q2: when?
A2: Around 1600.
Question: and his wife?

Answer as <think>what the question leaves out</think>
<rewrite>the full question</rewrite>"""


def test_the_published_prompt() -> None:
    assert render(HAMLET) == render(HAMLET, "paper") == ({"role": "user", "content": PAPER},)


def test_the_short_prompt() -> None:
    assert render(HAMLET, "compact") == ({"role": "user", "content": COMPACT},)


@pytest.mark.parametrize(
    ("max_turns", "kept"),
    [
        (None, ["one", "two", "three"]),
        (5, ["one", "two", "three"]),
        (3, ["one", "two", "three"]),
        (2, ["two", "three"]),
        (1, ["three"]),
        (0, []),
    ],
)
def test_the_newest_turns_are_kept_and_numbered_from_one(max_turns: int | None, kept: list[str]) -> None:
    history = tuple(Turn(word, f"so {word}") for word in ("one", "two", "three"))
    text = render(Conversation("q", history, "last?", ()), "compact", max_turns)[0]["content"]
    assert re.findall(r"^Q(\d+): (.*)\nA\1: so \2$", text, re.MULTILINE) == [
        (str(i), word) for i, word in enumerate(kept, 1)
    ]
    assert "Question: last?" in text


def test_a_first_question_has_an_empty_context() -> None:
    assert (
        "### Context Begin ###\n\n### Context End ###\n\nQuery: who?\nRewrite:"
        in render(Conversation("q", (), "who?", ()))[0]["content"]
    )


words = st.text(max_size=30)


@settings(max_examples=100)
@given(st.lists(st.builds(Turn, words, words), max_size=4), words, st.sampled_from(STYLES))
def test_turns_and_question_are_in_the_prompt_unchanged(turns: list[Turn], question: str, style: str) -> None:
    """Braces, percent signs or the template's own fields in it are text, not fields."""
    awkward = [*turns, Turn("{context} {query} {0}", "%s \\n {{}}")]
    (message,) = render(Conversation("q", tuple(awkward), question, ()), style)  # type: ignore[arg-type]
    history = "\n".join(f"Q{i}: {turn.question}\nA{i}: {turn.answer}" for i, turn in enumerate(awkward, 1))
    assert message["role"] == "user"
    (template,) = render(Conversation("q", (Turn("\0", "\1"),), "\2", ()), style)  # type: ignore[arg-type]
    before, _, rest = template["content"].partition("Q1: \0\nA1: \1")
    between, _, after = rest.partition("\2")
    assert message["content"] == before + history + between + question + after


def test_an_unknown_style_is_named() -> None:
    with pytest.raises(ValueError, match=r"^prompt style 'short' is not one of paper, compact, rqr, rqr_think$"):
        render(HAMLET, "short")  # type: ignore[arg-type]


@pytest.mark.parametrize("style", STYLES)
def test_the_warm_up_prompt_is_the_worked_example_and_the_zero_shot_prompt(style: str) -> None:
    zero_shot = render(HAMLET, style)  # type: ignore[arg-type]
    messages = with_worked_example(zero_shot, style)  # type: ignore[arg-type]
    assert [message["role"] for message in messages] == ["user", "assistant", "user"]
    assert messages[:1] == render(EXAMPLE, style)  # type: ignore[arg-type]
    assert messages[1]["content"] == EXAMPLE_OUTPUT
    assert messages[2:] == zero_shot


def test_the_worked_example_completes_its_question() -> None:
    rewrite = parse_rewrite(EXAMPLE_OUTPUT).text
    assert rewrite is not None
    for name in ("Antoni Gaudi", "Sagrada Familia"):
        assert name in rewrite
        assert name not in EXAMPLE.question
        assert any(name in turn.question + turn.answer for turn in EXAMPLE.history)


def test_the_rqr_prompt_equals_the_published_one() -> None:
    (message,) = render(Conversation("q", (), "why do moths\nfly to {lamps}?", ()), "rqr")
    assert message == {
        "role": "user",
        "content": "Instructions:\n1. Identify the essential problem.\n"
        "2. Think step by step to reason and describe what information could be relevant and helpful to address the "
        "questions in detail.\n"
        "3. Draft an answer with as many thoughts as you have.\nQuery: why do moths\nfly to {lamps}?\n\n",
    }
    system, asked = render(Conversation("q", (), "why do moths\nfly to {lamps}?", ()), "rqr_think")
    assert asked == message
    assert system["role"] == "system"
    assert "<think> reasoning process here </think> <answer> answer here </answer>" in system["content"]
