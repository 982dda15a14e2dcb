"""The messages between the parts: what they hold, what they refuse, and that nothing changes them on the way."""

import dataclasses
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from convsearch import types
from convsearch.types import Completion, Conversation, Example, Rewrite, Turn

RECORD = {
    "qid": "t_1_2",
    "question": "and his wife?",
    "context": ["who wrote Hamlet?", "Shakespeare"],
    "gold_docids": ["d17"],
}


def changed(**fields: Any) -> dict[str, Any]:
    """The record with other fields; None leaves one out."""
    return {name: value for name, value in {**RECORD, **fields}.items() if value is not None}


def test_a_line_of_a_conversations_file() -> None:
    expected = Conversation("t_1_2", (Turn("who wrote Hamlet?", "Shakespeare"),), "and his wife?", ("d17",))
    assert Conversation.from_record(RECORD) == expected
    assert (
        Conversation.from_record(changed(answer="Anne", conv_id=1, turn_id=2, topic="plays")) == expected
    )  # what else it holds is let be


@pytest.mark.parametrize(
    ("fields", "golds"),
    [
        ({"gold_docids": ["a", "b"]}, ("a", "b")),
        ({"gold_docids": [17, "b"]}, ("17", "b")),
        ({"gold_docids": []}, ()),
        ({"gold_docids": None}, ()),
        ({"gold_docids": None, "positive_ctxs": [{"passage_id": 5, "text": "x"}, {"passage_id": "p"}]}, ("5", "p")),
        ({"gold_docids": None, "positive_ctxs": []}, ()),
        ({"gold_docids": ["a"], "positive_ctxs": [{"passage_id": "b"}]}, ("a",)),
    ],
)
def test_gold_passages_in_our_form_and_in_the_reference_s(fields: dict[str, Any], golds: tuple[str, ...]) -> None:
    assert Conversation.from_record(changed(**fields)).gold_docids == golds


def test_a_first_question_has_no_history() -> None:
    assert (
        Conversation.from_record(changed(context=None)).history
        == Conversation.from_record(changed(context=[])).history
        == ()
    )


@pytest.mark.parametrize(
    ("fields", "fault"),
    [
        ({"qid": None}, "field 'qid' must be a non-empty string, got None"),
        ({"qid": ""}, "field 'qid' must be a non-empty string, got ''"),
        ({"qid": 7}, "field 'qid' must be a non-empty string, got 7"),
        ({"question": None}, "t_1_2: field 'question' must be a non-empty string, got None"),
        ({"question": " \n"}, "t_1_2: field 'question' must be a non-empty string, got ' \\n'"),
        ({"question": ["who?"]}, "t_1_2: field 'question' must be a non-empty string, got ['who?']"),
        (
            {"context": ["who?"]},
            "t_1_2: field 'context' must be a list of strings [question 1, answer 1, ...] of even length",
        ),
        (
            {"context": ["who?", None]},
            "t_1_2: field 'context' must be a list of strings [question 1, answer 1, ...] of even length",
        ),
        (
            {"context": "who? he"},
            "t_1_2: field 'context' must be a list of strings [question 1, answer 1, ...] of even length",
        ),
        (
            {"gold_docids": "d17"},
            "t_1_2: field 'gold_docids' must be a list of passage ids, got 'd17'",
        ),  # not ("d", "1", "7")
        ({"gold_docids": 17}, "t_1_2: field 'gold_docids' must be a list of passage ids, got 17"),
        ({"gold_docids": [["d17"]]}, "t_1_2: field 'gold_docids' must be a list of passage ids, got [['d17']]"),
        (
            {"gold_docids": None, "positive_ctxs": ["d17"]},
            "t_1_2: field 'positive_ctxs' must be a list of objects with a 'passage_id'",
        ),
        (
            {"gold_docids": None, "positive_ctxs": [{"id": 1}]},
            "t_1_2: field 'positive_ctxs' must be a list of objects with a 'passage_id'",
        ),
    ],
)
def test_a_malformed_record_is_named_by_question_and_field(fields: dict[str, Any], fault: str) -> None:
    with pytest.raises(ValueError) as raised:
        Conversation.from_record(changed(**fields))
    assert str(raised.value) == fault


anything = (
    st.none()
    | st.integers()
    | st.text(max_size=4)
    | st.lists(st.none() | st.text(max_size=3) | st.integers(), max_size=3)
    | st.just({})
)


@settings(max_examples=100)
@given(st.fixed_dictionaries({}, optional=dict.fromkeys((*RECORD, "positive_ctxs"), anything)))
def test_any_record_is_a_conversation_or_a_value_error(fields: dict[str, Any]) -> None:
    try:
        conversation = Conversation.from_record({**RECORD, **fields})
    except ValueError:
        return
    assert conversation.question.strip()
    assert all(isinstance(docid, str) for docid in conversation.gold_docids)


def test_a_completion_has_one_log_prob_a_token() -> None:
    assert Completion((5, 9), (-0.1, -2.3), "hi", "stop").weights_version == 0
    assert Completion((), (), "", "length").token_ids == ()
    with pytest.raises(AssertionError):
        Completion((5, 9), (-0.1,), "hi", "stop")


def test_a_rewrite_is_a_text_or_an_error_and_never_both() -> None:
    assert Rewrite("a", None).error is None
    assert Rewrite(None, "empty").text is None
    for text, error in ((None, None), ("a", "empty")):
        with pytest.raises(AssertionError):
            Rewrite(text, error)  # type: ignore[arg-type]


MESSAGES = [
    Turn("q", "a"),
    Conversation("q", (), "who?", ()),
    Completion((1,), (-0.5,), "x", "stop"),
    Rewrite("a", None),
    Example("q", ({"role": "user", "content": "who?"},), "who?", ("d",)),
]


def test_every_message_is_tried() -> None:
    declared = {value for value in vars(types).values() if dataclasses.is_dataclass(value)}
    assert {type(message) for message in MESSAGES} == declared


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
def test_no_message_can_be_changed_or_grown(message: Any) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(message, dataclasses.fields(message)[0].name, "other")
    assert not hasattr(message, "__dict__")
    assert type(message).__doc__
    assert dataclasses.replace(message) == message
