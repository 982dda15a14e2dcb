"""The one parser of model outputs, shared by distillation, rewards and inference, so that all three mean the same by "it parses"."""

import re

from convsearch.types import FinishReason, Rewrite

THINK_OPEN, THINK_CLOSE, REWRITE_OPEN, REWRITE_CLOSE = "<think>", "</think>", "<rewrite>", "</rewrite>"
_TAGS = (THINK_OPEN, THINK_CLOSE, REWRITE_OPEN, REWRITE_CLOSE)
_FORM = re.compile(rf"\s*{THINK_OPEN}(?P<think>.*?){THINK_CLOSE}\s*{REWRITE_OPEN}(?P<rewrite>.*?){REWRITE_CLOSE}\s*", re.DOTALL)


def parse_rewrite(text: str, finish_reason: FinishReason = "stop") -> Rewrite:
    """Takes the rewrite out of ``<think>...</think>\\n<rewrite>...</rewrite>``; whatever the text, it never raises.

    The whole output must have that form, up to white space around and between the two parts: each tag once and in order, nothing before
    the first or behind the last, both parts non-empty. White space inside the rewrite becomes single spaces.

    Errors, the first that holds: ``truncated`` (ended by length before its last tag), ``no_tag`` (a tag is missing), ``many_tags`` (one occurs
    twice), ``format`` (other order, text outside the tags, empty thinking), ``empty`` (nothing inside ``<rewrite>``).
    """
    counts = [text.count(tag) for tag in _TAGS]
    if finish_reason == "length" and not text.rstrip().endswith(REWRITE_CLOSE):
        return Rewrite(None, "truncated")
    if 0 in counts:
        return Rewrite(None, "no_tag")
    if max(counts) > 1:
        return Rewrite(None, "many_tags")
    match = _FORM.fullmatch(text)
    if match is None or not match["think"].strip():
        return Rewrite(None, "format")
    rewrite = " ".join(match["rewrite"].split())
    return Rewrite(rewrite, None) if rewrite else Rewrite(None, "empty")


def thinking(text: str) -> str:
    """The text between the thinking tags, "" where there is none; for people to read, never for scoring."""
    _, opened, rest = text.partition(THINK_OPEN)
    return rest.partition(THINK_CLOSE)[0].strip() if opened else ""
