"""The messages that pass between the packages. Frozen, free of torch, one worked example each.

Shape suffixes of the whole project: ``_P`` prompts, ``_G`` samples per prompt, ``_N`` = P x G sequences in group-major
order (the samples of one prompt are neighbours), ``_B`` rows, ``_T`` tokens, ``_s`` seconds, ``_tokens`` tokens.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

RewriteError = Literal["no_tag", "many_tags", "empty", "truncated", "format"]
FinishReason = Literal["stop", "length"]
Message = dict[str, str]


@dataclass(frozen=True, slots=True)
class Turn:
    """One exchange. ``Turn("who wrote Hamlet?", "William Shakespeare")``."""

    question: str
    answer: str


@dataclass(frozen=True, slots=True)
class Conversation:
    """A question and what was said before it.

    ``Conversation("demo-test_3_2", (Turn("who wrote Hamlet?", "William Shakespeare"),), "and his wife?", ("d17",))``
    """

    qid: str
    history: tuple[Turn, ...]  # oldest first
    question: str
    gold_docids: tuple[str, ...]  # empty if no gold passage is known

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> "Conversation":
        """Reads one line of a conversations file: ``gold_docids``, or the reference's ``positive_ctxs``, names the
        golds.

        Raises:
            ValueError: a field is missing, is of the wrong type, or the context does not alternate question, answer.
        """
        qid, question, context = record.get("qid"), record.get("question"), record.get("context", [])
        if not isinstance(qid, str) or not qid:
            raise ValueError(f"field 'qid' must be a non-empty string, got {qid!r}")
        if not isinstance(question, str) or not question.strip():
            raise ValueError(f"{qid}: field 'question' must be a non-empty string, got {question!r}")
        if not isinstance(context, list) or len(context) % 2 or not all(isinstance(text, str) for text in context):
            raise ValueError(
                f"{qid}: field 'context' must be a list of strings [question 1, answer 1, ...] of even length"
            )
        turns = tuple(Turn(context[i], context[i + 1]) for i in range(0, len(context), 2))
        return cls(qid, turns, question, _gold_docids(qid, record))


def _gold_docids(qid: str, record: Mapping[str, Any]) -> tuple[str, ...]:
    golds = record.get("gold_docids")
    if golds is None:
        passages = record.get("positive_ctxs") or []
        if not isinstance(passages, list) or not all(
            isinstance(passage, dict) and "passage_id" in passage for passage in passages
        ):
            raise ValueError(f"{qid}: field 'positive_ctxs' must be a list of objects with a 'passage_id'")
        golds = [passage["passage_id"] for passage in passages]
    if not isinstance(golds, list) or not all(isinstance(docid, str | int) for docid in golds):
        raise ValueError(f"{qid}: field 'gold_docids' must be a list of passage ids, got {golds!r}")
    return tuple(str(docid) for docid in golds)


@dataclass(frozen=True, slots=True)
class Completion:
    """What a sampler returns. ``Completion((5, 9, 2), (-0.1, -2.3, -0.01), "<think>...", "stop")``.

    ``logprobs``: one per token, of the distribution that was sampled from (after temperature). A stop token that ended
    the sample is part of ``token_ids``.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    text: str
    finish_reason: FinishReason
    weights_version: int = 0

    def __post_init__(self) -> None:
        assert len(self.token_ids) == len(self.logprobs), (len(self.token_ids), len(self.logprobs))


@dataclass(frozen=True, slots=True)
class Rewrite:
    """A parsed output: exactly one of ``text`` and ``error`` is set. ``Rewrite("who wrote Hamlet?", None)``"""

    text: str | None
    error: RewriteError | None

    def __post_init__(self) -> None:
        assert (self.text is None) != (self.error is None), (self.text, self.error)


@dataclass(frozen=True, slots=True)
class Example:
    """One training row: what the model reads, and what the retriever has to find.

    ``Example("train_1_2", ({"role": "user", "content": "..."},), "and his wife?", ("d17",), prompt_ids=(1, 52))``
    """

    qid: str
    messages: tuple[Message, ...]
    question: str
    gold_docids: tuple[str, ...]
    positives: tuple[str, ...] = ()  # texts that an output should be similar to; empty: the gold passages
    prompt_ids: tuple[int, ...] = ()  # the encoded messages; empty until a tokenizer is known
