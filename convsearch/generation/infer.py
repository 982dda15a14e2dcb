"""Inference: one rewrite per conversation, and a report of those that fell back to the raw question."""

import argparse
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from convsearch.files import read_jsonl
from convsearch.generation.options import FORMS
from convsearch.generation.output import Record, ResumableLines, read_input
from convsearch.parsing import PARSERS, thinking
from convsearch.types import Completion, Conversation


def infer(args: argparse.Namespace) -> None:
    """Writes the lines of ``args.output_path`` that are missing."""
    records, conversations = read_input(args.input_path, args.task)
    by_qid = {record["qid"]: record for record in records}
    output = Path(args.output_path)
    form = FORMS.get(args.prompt_style, "rewrite")

    def lines(part: Sequence[Conversation], groups: list[list[Completion]]) -> Iterator[Record]:
        for conversation, (completion,) in zip(part, groups, strict=True):
            yield outcome(by_qid[conversation.qid], completion, form)

    resumable = ResumableLines(output, args, "rewrite_error", by_qid)
    resumable.complete(conversations[: args.limit], 1, max(args.batch_size, 16), lines, "rewriting")
    report(output)


def outcome(record: Record, completion: Completion, form: str = "rewrite") -> Record:
    """The output line of one conversation."""
    rewrite = PARSERS[form](completion.text, completion.finish_reason)
    return {
        **record,
        "rewrite": record["question"] if rewrite.text is None else rewrite.text,
        "reasoning_content": thinking(completion.text),
        "output": completion.text,
        "rewrite_error": rewrite.error,
        "fallback": rewrite.text is None,
    }


def report(path: Path) -> None:
    """Prints how many lines fell back to the raw question, and why."""
    errors = Counter(record["rewrite_error"] or "ok" for _, record in read_jsonl(path))
    total, failed = errors.total(), errors.total() - errors["ok"]
    reasons = ", ".join(f"{name} {count}" for name, count in errors.most_common() if name != "ok")
    share = f" ({failed / total:.1%}): {reasons}" if failed else ""
    print(f"{path}: {total} rewrites, {failed} fell back to the raw question{share}")
