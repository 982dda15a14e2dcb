"""Inference: one or several rewrites per conversation, and a report of those that fell back to the raw question."""

import argparse
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from convsearch.files import read_jsonl, sole_writer
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
        for conversation, group in zip(part, groups, strict=True):
            yield outcome(by_qid[conversation.qid], group, form)

    with sole_writer(output):
        resumable = ResumableLines(output, args, "rewrite_error", conversations)
        prompts_per_slice = max(1, max(args.batch_size, 16) // args.n)
        resumable.complete(conversations[: args.limit], args.n, prompts_per_slice, lines, "rewriting")
    report(output)


def outcome(record: Record, completions: Sequence[Completion], form: str = "rewrite") -> Record:
    """The output line of one conversation: of the first completion that parses, else of the first one.

    With several completions it also has ``rewrites``: the texts that parse, else the raw question alone.
    """
    parsed = [(completion, PARSERS[form](completion.text, completion.finish_reason)) for completion in completions]
    texts = [rewrite.text for _, rewrite in parsed if rewrite.text is not None] or [record["question"]]
    completion, rewrite = next((pair for pair in parsed if pair[1].text is not None), parsed[0])
    line = {
        **record,
        "rewrite": texts[0],
        "reasoning_content": thinking(completion.text),
        "output": completion.text,
        "rewrite_error": rewrite.error,
        "fallback": rewrite.text is None,
    }
    return line | {"rewrites": texts} if len(completions) > 1 else line


def report(path: Path) -> None:
    """Prints how many lines fell back to the raw question, and why."""
    errors = Counter(record["rewrite_error"] or "ok" for _, record in read_jsonl(path))
    total, failed = errors.total(), errors.total() - errors["ok"]
    reasons = ", ".join(f"{name} {count}" for name, count in errors.most_common() if name != "ok")
    share = f" ({failed / total:.1%}): {reasons}" if failed else ""
    print(f"{path}: {total} rewrites, {failed} fell back to the raw question{share}")
