"""The parser of model outputs.

1. An output parses if and only if it is ``<think>...</think>`` and ``<rewrite>...</rewrite>``, with white space around.
2. Nothing raises: every text is a rewrite or one named error.
3. A rewrite is clean: no tag in it, single spaces, never empty.
4. Text that was put into the form is extracted unchanged.
"""

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from convsearch.parsing import (
    REWRITE_CLOSE,
    REWRITE_OPEN,
    THINK_CLOSE,
    THINK_OPEN,
    parse_answer,
    parse_rewrite,
    parse_text,
    thinking,
)
from convsearch.prompts import EXAMPLE_OUTPUT
from convsearch.types import FinishReason, Rewrite

TAGS = (THINK_OPEN, THINK_CLOSE, REWRITE_OPEN, REWRITE_CLOSE)
GOOD = "<think>who is she</think>\n<rewrite>who is Anne Hathaway</rewrite>"

PARSES = {
    "the published form": (GOOD, "who is Anne Hathaway"),
    "no line break between the parts": ("<think>a</think><rewrite>b</rewrite>", "b"),
    "blank lines between the parts": ("<think>a</think>\n \n\t<rewrite>b</rewrite>", "b"),
    "white space around": (" \n<think>a</think>\n<rewrite>b</rewrite>\r\n\n", "b"),
    "white space inside": (
        "<think>\na\n</think>\n<rewrite>\n  who\twrote \n\n Hamlet? \n</rewrite>",
        "who wrote Hamlet?",
    ),
    "other scripts": ("<think>он</think>\n<rewrite>кто такой Пушкин?　東京 🎭</rewrite>", "кто такой Пушкин? 東京 🎭"),
    "line separators of Unicode": ("<think>a</think>\u2028<rewrite>b\u2029c\u00a0d\x85e</rewrite>", "b c d e"),
    "angle brackets that are no tags": (
        "<think>a < b > c <b>x</b></think>\n<rewrite>is 1 < 2 in <html>?</rewrite>",
        "is 1 < 2 in <html>?",
    ),
    "tags in capitals are text": ("<think><THINK></think>\n<rewrite>b <REWRITE></rewrite>", "b <REWRITE>"),
    "many lines of thinking": ("<think>1\n2\n\n3</think>\n<rewrite>b</rewrite>", "b"),
    "braces and backslashes": ("<think>{0}</think>\n<rewrite>what is {x} \\1 $1?</rewrite>", "what is {x} \\1 $1?"),
}

FAILS = {
    "nothing": ("", "no_tag"),
    "an answer": ("Anne Hathaway was his wife.", "no_tag"),
    "no thinking": ("<rewrite>b</rewrite>", "no_tag"),
    "no rewrite": ("<think>a</think>\nwho is Anne Hathaway", "no_tag"),
    "thinking never ends": ("<think>a\n<rewrite>b</rewrite>", "no_tag"),
    "thinking never begins": ("a</think>\n<rewrite>b</rewrite>", "no_tag"),
    "rewrite never ends": ("<think>a</think>\n<rewrite>b", "no_tag"),
    "rewrite never begins": ("<think>a</think>\nb</rewrite>", "no_tag"),
    "a space in a tag": ("<think>a</think>\n<rewrite >b</rewrite>", "no_tag"),
    "capitals": (GOOD.upper(), "no_tag"),
    "twice the whole form": (f"{GOOD}\n{GOOD}", "many_tags"),
    "two rewrites": ("<think>a</think>\n<rewrite>b</rewrite>\n<rewrite>c</rewrite>", "many_tags"),
    "a doubled opening tag": ("<think><think>a</think>\n<rewrite>b</rewrite>", "many_tags"),
    "a doubled closing tag": ("<think>a</think>\n<rewrite>b</rewrite></rewrite>", "many_tags"),
    "a rewrite inside the thinking, another behind it": (
        "<think><rewrite>b</rewrite></think>\n<rewrite>c</rewrite>",
        "many_tags",
    ),
    "a rewrite inside a rewrite": ("<think>a</think>\n<rewrite>b<rewrite>c</rewrite></rewrite>", "many_tags"),
    "the only rewrite inside the thinking": ("<think>a <rewrite>b</rewrite></think>", "format"),
    "the thinking inside the rewrite": ("<rewrite><think>a</think>b</rewrite>", "format"),
    "tags that cross": ("<think>a<rewrite>b</think>c</rewrite>", "format"),
    "the parts swapped": ("<rewrite>b</rewrite>\n<think>a</think>", "format"),
    "closed before opened": ("</think>a<think>\n<rewrite>b</rewrite>", "format"),
    "text in front": (f"Sure! {GOOD}", "format"),
    "text behind": (f"{GOOD} I hope this helps.", "format"),
    "text between": ("<think>a</think> so: <rewrite>b</rewrite>", "format"),
    "a stray end token behind": (f"{GOOD}<|im_end|>", "format"),
    "a zero byte behind": (f"{GOOD}\x00", "format"),
    "empty thinking": ("<think></think>\n<rewrite>b</rewrite>", "format"),
    "blank thinking": ("<think> \n\t</think>\n<rewrite>b</rewrite>", "format"),
    "empty thinking and empty rewrite": ("<think></think>\n<rewrite></rewrite>", "format"),
    "empty rewrite": ("<think>a</think>\n<rewrite></rewrite>", "empty"),
    "blank rewrite": ("<think>a</think>\n<rewrite> \u00a0\n\u3000</rewrite>", "empty"),
}


@pytest.mark.parametrize(("text", "expected"), PARSES.values(), ids=PARSES)
def test_outputs_that_parse(text: str, expected: str) -> None:
    assert parse_rewrite(text) == Rewrite(expected, None)


@pytest.mark.parametrize(("text", "error"), FAILS.values(), ids=FAILS)
def test_outputs_that_do_not_parse(text: str, error: str) -> None:
    assert parse_rewrite(text) == Rewrite(None, error)  # type: ignore[arg-type]


@pytest.mark.parametrize("cut", range(len(GOOD)))
def test_an_output_cut_by_length_is_truncated(cut: int) -> None:
    assert parse_rewrite(GOOD[:cut], "length") == Rewrite(None, "truncated")
    assert parse_rewrite(GOOD[:cut], "stop") == Rewrite(None, "no_tag")


def test_a_complete_output_cut_by_length_parses() -> None:
    assert parse_rewrite(GOOD, "length") == Rewrite("who is Anne Hathaway", None)
    assert parse_rewrite(f"{GOOD} \n", "length") == Rewrite("who is Anne Hathaway", None)
    assert parse_rewrite(f"{GOOD} and", "length") == Rewrite(None, "truncated")
    assert parse_rewrite("<rewrite>b</rewrite>", "length") == Rewrite(None, "no_tag")  # it has an end but no start


def test_the_worked_example_parses() -> None:
    assert parse_rewrite(EXAMPLE_OUTPUT).error is None


# Pieces of the form in any order: they give outputs that are nearly right; random text hardly ever has a tag.
pieces = st.lists(
    st.sampled_from(TAGS) | st.text(max_size=5) | st.sampled_from(["\n", " ", "<", ">", "</", "think", "rewrite>"]),
    max_size=12,
)
plain = st.text(max_size=40).filter(lambda text: not any(tag in text for tag in TAGS))
visible = plain.filter(lambda text: bool(text.strip()))
blank = st.text(alphabet=" \t\n\r\u2028\u3000", max_size=3)


@settings(max_examples=200)
@given(pieces.map("".join) | st.text(max_size=80), st.sampled_from(["stop", "length"]))
@example("<think>a</think>\n<rewrite>" + "<" * 20_000 + "</rewrite>", "stop")
@example("<think>" * 5_000, "stop")
@example(" " * 50_000 + "<think>", "length")
def test_any_text_is_a_clean_rewrite_or_a_named_error(text: str, finish_reason: FinishReason) -> None:
    rewrite = parse_rewrite(text, finish_reason)
    if rewrite.text is None:
        assert rewrite.error in ("no_tag", "many_tags", "empty", "truncated", "format")
        return
    assert rewrite.text == " ".join(rewrite.text.split()) != ""
    assert not any(tag in rewrite.text for tag in TAGS)
    # It holds all the tags once and in order, and outside the two parts there is white space alone.
    before, think, between, inside, after = _split_at_tags(text)
    assert not (before + between + after).strip()
    assert think.strip()
    assert inside.split() == rewrite.text.split()


def _split_at_tags(text: str) -> list[str]:
    parts = []
    for tag in TAGS:
        assert text.count(tag) == 1
        part, _, text = text.partition(tag)
        parts.append(part)
    return [*parts, text]


@settings(max_examples=100)
@given(visible, visible, blank, blank, blank)
def test_text_in_the_form_is_extracted(think: str, rewrite: str, before: str, between: str, after: str) -> None:
    text = f"{before}<think>{think}</think>{between}<rewrite>{rewrite}</rewrite>{after}"
    assume(all(text.count(tag) == 1 for tag in TAGS))  # "<thi" + "nk>" across a border would be a fifth tag
    for finish_reason in ("stop", "length"):
        assert parse_rewrite(text, finish_reason) == Rewrite(" ".join(rewrite.split()), None)  # type: ignore[arg-type]
    assert thinking(text) == think.strip()


@settings(max_examples=100)
@given(visible, visible, visible, st.sampled_from(["before", "between", "after"]))
def test_text_outside_the_parts_does_not_parse(think: str, rewrite: str, stray: str, place: str) -> None:
    at = {name: stray if name == place else "" for name in ("before", "between", "after")}
    text = f"{at['before']}<think>{think}</think>{at['between']}<rewrite>{rewrite}</rewrite>{at['after']}"
    assert parse_rewrite(text).text is None


@settings(max_examples=100)
@given(visible, visible, st.sampled_from(TAGS), st.sampled_from(["think", "rewrite"]), st.integers(0, 40))
def test_one_tag_too_many_does_not_parse(think: str, rewrite: str, tag: str, part: str, position: int) -> None:
    parts = {"think": think, "rewrite": rewrite}
    parts[part] = parts[part][:position] + tag + parts[part][position:]
    assert parse_rewrite(f"<think>{parts['think']}</think>\n<rewrite>{parts['rewrite']}</rewrite>") == Rewrite(
        None, "many_tags"
    )


@settings(max_examples=100)
@given(visible, visible, st.sampled_from(TAGS))
def test_one_tag_too_few_does_not_parse(think: str, rewrite: str, tag: str) -> None:
    text = f"<think>{think}</think>\n<rewrite>{rewrite}</rewrite>".replace(tag, "", 1)
    assume(tag not in text)
    assert parse_rewrite(text) == Rewrite(None, "no_tag")


@pytest.mark.parametrize(
    ("text", "expected"),
    [(GOOD, "who is she"), ("<think> a", "a"), ("no tags", ""), ("a</think>", ""), ("", ""), ("<think></think>", "")],
)
def test_thinking_is_extracted(text: str, expected: str) -> None:
    assert thinking(text) == expected


def test_answers_are_strict_and_texts_must_not_be_empty() -> None:
    assert parse_answer("<think>so</think> <answer> an\nanswer </answer>\n") == Rewrite("an answer", None)
    assert parse_answer("<think>so</think> <answer>an answer") == Rewrite(None, "no_tag")
    assert parse_answer("<think>so</think> <answer>an answer</answer> and more").error == "format"
    assert parse_answer("<think>so</think><answer></answer>").error == "empty"
    assert parse_answer("<think>so</think><answer>a", "length").error == "truncated"
    assert parse_answer("<think>so</think>\n<rewrite>a</rewrite>").error == "no_tag"
    assert parse_text(" a\nlong  text ", "length") == Rewrite("a\nlong  text", None)
    assert parse_text(" \n").error == "empty"
