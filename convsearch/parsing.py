"""The parser of model outputs. Distillation, rewards and inference share it and so agree on what parses."""

import re
from collections.abc import Callable
from typing import Final

from convsearch.types import FinishReason, Rewrite

THINK_OPEN, THINK_CLOSE, REWRITE_OPEN, REWRITE_CLOSE = "<think>", "</think>", "<rewrite>", "</rewrite>"


def parse_rewrite(text: str, finish_reason: FinishReason = "stop") -> Rewrite:
    """Extracts the rewrite from ``<think>...</think>\\n<rewrite>...</rewrite>``. Never raises.

    The whole output must have that form, except for white space around and between the two parts: each tag once and in
    order, no other text outside the tags, both parts non-empty. White space inside the rewrite becomes single spaces.

    Errors, the first that applies: ``truncated`` (length ended it before its last tag), ``no_tag`` (a tag is missing),
    ``many_tags`` (a tag occurs twice), ``format`` (other order, text outside the tags, empty thinking), ``empty``
    (nothing inside ``<rewrite>``).
    """
    return _second_part(text, finish_reason, "rewrite")


def parse_answer(text: str, finish_reason: FinishReason = "stop") -> Rewrite:
    """The same form with ``<answer>`` instead of ``<rewrite>``: the think/answer mode of RQR."""
    return _second_part(text, finish_reason, "answer")


def parse_text(text: str, finish_reason: FinishReason = "stop") -> Rewrite:
    """The whole output, stripped (RQR without tags). A truncated output is accepted; only an empty one is an error."""
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
    form = rf"\s*{THINK_OPEN}(?P<think>.*?){THINK_CLOSE}\s*{opened}(?P<part>.*?){closed}\s*"
    match = re.fullmatch(form, text, re.DOTALL)
    if match is None or not match["think"].strip():
        return Rewrite(None, "format")
    part = " ".join(match["part"].split())
    return Rewrite(part, None) if part else Rewrite(None, "empty")


def thinking(text: str) -> str:
    """The text between the thinking tags, or "" without them; for people to read, not for scoring."""
    _, opened, rest = text.partition(THINK_OPEN)
    return rest.partition(THINK_CLOSE)[0].strip() if opened else ""
