"""The one parser of model outputs, shared by distillation, rewards and inference, so that all three mean the same by "it parses"."""

import re
from collections.abc import Callable
from typing import Final

from convsearch.types import FinishReason, Rewrite

THINK_OPEN, THINK_CLOSE, REWRITE_OPEN, REWRITE_CLOSE = "<think>", "</think>", "<rewrite>", "</rewrite>"


def parse_rewrite(text: str, finish_reason: FinishReason = "stop") -> Rewrite:
    """Takes the rewrite out of ``<think>...</think>\\n<rewrite>...</rewrite>``; whatever the text, it never raises.

    The whole output must have that form, up to white space around and between the two parts: each tag once and in order, nothing before
    the first or behind the last, both parts non-empty. White space inside the rewrite becomes single spaces.

    Errors, the first that holds: ``truncated`` (ended by length before its last tag), ``no_tag`` (a tag is missing), ``many_tags`` (one occurs
    twice), ``format`` (other order, text outside the tags, empty thinking), ``empty`` (nothing inside ``<rewrite>``).
    """
    return _second_part(text, finish_reason, "rewrite")


def parse_answer(text: str, finish_reason: FinishReason = "stop") -> Rewrite:
    """The same form, strict in the same way, with ``<answer>`` in the place of ``<rewrite>``: the think/answer mode of RQR."""
    return _second_part(text, finish_reason, "answer")


def parse_text(text: str, finish_reason: FinishReason = "stop") -> Rewrite:
    """The whole output, stripped, also where its length ended it (RQR without tags); only an empty one is an error."""
    stripped = text.strip()
    return Rewrite(stripped, None) if stripped else Rewrite(None, "empty")


PARSERS: Final[dict[str, Callable[[str, FinishReason], Rewrite]]] = {
    "rewrite": parse_rewrite,
    "answer": parse_answer,
    "text": parse_text,
}


def _second_part(text: str, finish_reason: FinishReason, tag: str) -> Rewrite:
    opened, closed = f"<{tag}>", f"</{tag}>"
    counts = [text.count(found) for found in (THINK_OPEN, THINK_CLOSE, opened, closed)]
    if finish_reason == "length" and not text.rstrip().endswith(closed):
        return Rewrite(None, "truncated")
    if 0 in counts:
        return Rewrite(None, "no_tag")
    if max(counts) > 1:
        return Rewrite(None, "many_tags")
    match = re.fullmatch(
        rf"\s*{THINK_OPEN}(?P<think>.*?){THINK_CLOSE}\s*{opened}(?P<part>.*?){closed}\s*", text, re.DOTALL
    )
    if match is None or not match["think"].strip():
        return Rewrite(None, "format")
    part = " ".join(match["part"].split())
    return Rewrite(part, None) if part else Rewrite(None, "empty")


def thinking(text: str) -> str:
    """The text between the thinking tags, "" where there is none; for people to read, never for scoring."""
    _, opened, rest = text.partition(THINK_OPEN)
    return rest.partition(THINK_CLOSE)[0].strip() if opened else ""
