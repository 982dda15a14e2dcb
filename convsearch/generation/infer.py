"""Conversations -> rewrites: ``python -m convsearch.infer --model_name_or_path MODEL --input_path dev.json --output_path rewrites.jsonl``.

Every input line comes out once, with ``rewrite`` (what to search for), ``reasoning_content``, ``output``, ``rewrite_error`` and ``fallback``. Where nothing
parses the raw question is the rewrite, counted and reported: leaving such lines out would inflate the metrics. Finished lines are kept when the command is
run again. ``--task rqr`` writes reasoned queries of single questions (BRIGHT's topics, or conversations), with RQR's prompt and sampling.
"""

import argparse
import json
import os
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from convsearch.prompts import STYLES

if TYPE_CHECKING:
    from convsearch.types import Conversation

# How RQR's reasoned queries are sampled (arXiv 2506.11603, and the script of its evaluation).
RQR_SAMPLING = {"temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.05, "max_tokens": 500}
FORMS = {"rqr": "text", "rqr_think": "answer"}  # prompt style -> form of its outputs; "rewrite" of the others
# The reference's names of output forms; ours has one parser, so a name says only which prompt is used.
MODEL_NAMES = ("ConvSearch-R1", "Get_SFT")


def add_sampling_flags(parser: argparse.ArgumentParser, max_tokens: int) -> None:
    """What inference and distillation are told alike: how to sample, which prompt, where the model runs."""
    add = parser.add_argument
    add("--temperature", type=float, default=0.7, help="0 is greedy")
    add("--top_p", type=float, default=1.0, help="share of the probability that is sampled from")
    add("--top_k", type=int, default=0, help="tokens that are sampled from; 0: all")
    add(
        "--repetition_penalty",
        type=float,
        default=1.0,
        help="tokens of prompt and output count so much less; 1: as much",
    )
    add("--max_tokens", type=int, default=max_tokens, help="tokens of an output at most")
    add("--seed", type=int, default=1, help="seed of the samples")
    add("--limit", type=int, default=None, help="only the first so many lines")
    add("--prompt_style", default="paper", choices=STYLES, help="the published prompt, or its short form")
    add("--max_history_turns", type=int, default=None, help="newest turns that stay in the prompt; all by default")
    add("--batch_size", type=int, default=64, help="sequences decoded at once")
    add(
        "--scaffold",
        action="store_true",
        help="write the tags for the model, each part up to a budget (not in the paper; for small models)",
    )
    add("--think_tokens", type=int, default=24, help="budget of the thinking under --scaffold, in tokens")
    add("--rewrite_tokens", type=int, default=32, help="budget of the rewrite under --scaffold, in tokens")
    add("--dtype", default="fp32", choices=("fp32", "bf16"), help="type of the arithmetic")
    add("--device", default="auto", choices=("auto", "cpu", "cuda"), help="where the model runs")
    add("--threads", type=int, default=None, help="CPU threads; torch decides by default")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags of the reference's infer.py, and ours."""
    parser = argparse.ArgumentParser(
        prog="python -m convsearch.infer", description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--model_name_or_path", required=True, help="model folder or hub name")
    add(
        "--model_name",
        default="ConvSearch-R1",
        choices=MODEL_NAMES,
        help="ConvSearch-R1: zero-shot prompt; Get_SFT: with the worked example",
    )
    add(
        "--task",
        default="rewrite",
        choices=("rewrite", "rqr"),
        help="rewrites of conversations, or RQR's reasoned queries of questions",
    )
    add(
        "--think",
        action="store_true",
        help="rqr: <think> </think> <answer> </answer>, of which the answer is searched for",
    )
    add("--input_path", required=True, help="conversations, one JSON object a line; rqr: also BRIGHT's topics")
    add("--output_path", required=True, help="rewrites, one JSON object a line")
    add_sampling_flags(parser, max_tokens=4096)
    add(
        "--dp_size",
        type=int,
        default=1,
        help="data-parallel engines; one process serves all lines in this version, more are accepted and noted",
    )
    add("--gpus_per_dp_rank", type=int, default=1, help="accepted as the reference has it")
    add("--dp_master_ip", default="127.0.0.1", help="accepted as the reference has it")
    if parser.parse_known_args(argv)[0].task == "rqr":
        parser.set_defaults(**RQR_SAMPLING)
    args = parser.parse_args(argv)
    if args.think and args.task != "rqr":
        parser.error("--think is of --task rqr: the others think already")
    if args.task == "rqr":
        args.prompt_style = "rqr_think" if args.think else "rqr"
    return args


def topic(record: dict[str, Any]) -> dict[str, Any]:
    """A line of BRIGHT's topics {id, query, ...} with the two fields that a question needs; other lines as they are."""
    return record if "qid" in record else {"qid": record.get("id"), "question": record.get("query")}


def read_input(path: str, task: str = "rewrite") -> tuple[list[dict[str, Any]], list["Conversation"]]:
    """The lines of a conversations file (rqr: or of topics), as they are and as conversations.

    Raises:
        ValueError: a line is no conversation, or a query id occurs twice; names file and line.
    """
    from convsearch.files import read_jsonl
    from convsearch.types import Conversation

    records, conversations = [], []
    lines: dict[str, int] = {}
    for number, record in read_jsonl(path):
        if task == "rqr":
            record = topic(record)
        try:
            conversation = Conversation.from_record(record)
        except ValueError as error:
            raise ValueError(f"{path}:{number}: {error}") from error
        if conversation.qid in lines:
            raise ValueError(
                f"{path}:{number}: query {conversation.qid!r} stands in line {lines[conversation.qid]} already"
            )
        lines[conversation.qid] = number
        records.append(record)
        conversations.append(conversation)
    return records, conversations


def finished(path: Path, qids: set[str], written: str) -> dict[str, dict[str, Any]]:
    """The lines that an earlier run has written, by query id; a half-written last line is cut off.

    Args:
        written: a field that every line of this command has.

    Raises:
        ValueError: the file holds a query that the input does not have, or lines that this command does not write.
    """
    done: dict[str, dict[str, Any]] = {}
    if not path.is_file():
        return done
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        os.truncate(path, len(whole))
    for number, line in enumerate(whole.splitlines(), start=1):
        try:
            record = json.loads(line)
        except ValueError as error:
            raise ValueError(
                f"{path}:{number}: not a line of JSON ({error}); delete the line, or name another output"
            ) from error
        if not isinstance(record, dict) or "qid" not in record or written not in record:
            raise ValueError(f"{path}:{number}: not a line that this command writes; name another output")
        if record["qid"] not in qids:
            raise ValueError(
                f"{path}:{number}: query {record['qid']!r} is not in the input; the file belongs to other data: name another output"
            )
        done[record["qid"]] = record
    return done


# What the lines of an output depend on; a file is never continued under other settings.
SETTINGS = (
    "model_name_or_path",
    "model_name",
    "temperature",
    "top_p",
    "top_k",
    "max_tokens",
    "repetition_penalty",
    "seed",
    "prompt_style",
    "max_history_turns",
    "scaffold",
    "think_tokens",
    "rewrite_tokens",
    "dtype",
)


def claim(path: Path, args: argparse.Namespace) -> None:
    """Writes ``<path>.settings.json`` beside a new output; beside lines that are there, checks that they were sampled under the same settings.

    Raises:
        ValueError: a setting has another value now; names it and both values.
    """
    from convsearch.files import atomic_write

    beside = path.with_name(f"{path.name}.settings.json")
    now = {name: getattr(args, name) for name in SETTINGS}
    if path.is_file() and path.stat().st_size and beside.is_file():
        before = json.loads(beside.read_text(encoding="utf-8"))
        for name in SETTINGS:
            if before.get(name, 1.0 if name == "repetition_penalty" else None) != now[name]:
                raise ValueError(
                    f"{path} was sampled with --{name} {before.get(name)}, now it is {now[name]}: set it back, delete the file, or name another output"
                )
        return
    with atomic_write(beside) as file:
        json.dump(now, file, indent=1)


def outcome(record: dict[str, Any], completion: Any, form: str = "rewrite") -> dict[str, Any]:
    """The output line of one conversation."""
    from convsearch.parsing import PARSERS, thinking

    rewrite = PARSERS[form](completion.text, completion.finish_reason)
    return {
        **record,
        "rewrite": record["question"] if rewrite.text is None else rewrite.text,
        "reasoning_content": thinking(completion.text),
        "output": completion.text,
        "rewrite_error": rewrite.error,
        "fallback": rewrite.text is None,
    }


def main() -> None:
    args = parse_args()
    from tqdm import tqdm

    from convsearch.files import named_errors

    records, conversations = read_input(args.input_path, args.task)
    by_qid = {record["qid"]: record for record in records}
    output = Path(args.output_path)
    done = finished(output, set(by_qid), "rewrite_error")
    claim(output, args)
    conversations = conversations[: args.limit]
    rest = [c for c in conversations if c.qid not in done]
    if done:
        kept = len(conversations) - len(rest)
        print(f"{output}: {kept} of {len(conversations)} lines are there already and are kept")
    form = FORMS.get(args.prompt_style, "rewrite")
    if rest:
        if args.dp_size > 1:
            print(f"note: --dp_size {args.dp_size}: this version samples in one process")
        rewriter, n_slice = build(args), max(args.batch_size, 16)
        output.parent.mkdir(parents=True, exist_ok=True)
        with (
            named_errors(output),
            output.open("a", encoding="utf-8") as file,
            tqdm(
                total=len(conversations), initial=len(conversations) - len(rest), desc="rewriting", unit="question"
            ) as bar,
        ):
            for part, completions in rewriter.slices(rest, 1, args.seed, n_slice):
                for conversation, completion in zip(part, completions, strict=True):
                    file.write(
                        json.dumps(outcome(by_qid[conversation.qid], completion, form), ensure_ascii=False) + "\n"
                    )
                file.flush()
                os.fsync(file.fileno())
                bar.update(len(part))
    report(output)


def build(args: argparse.Namespace) -> Any:
    """Loads the model; torch is imported here."""
    import torch

    from convsearch.generation.rewriter import Rewriter
    from convsearch.sampling.hf import SamplingConfig, Scaffold

    if args.threads:
        torch.set_num_threads(args.threads)
    return Rewriter(
        args.model_name_or_path,
        SamplingConfig(
            args.temperature, args.top_p, args.top_k, args.max_tokens, args.batch_size, args.repetition_penalty
        ),
        style=args.prompt_style,
        example=args.model_name == "Get_SFT",
        scaffold=Scaffold.rewrite_form(args.think_tokens, args.rewrite_tokens) if args.scaffold else None,
        max_turns=args.max_history_turns,
        device=args.device,
        bf16=args.dtype == "bf16",
    )


def report(path: Path) -> None:
    """Prints how many lines fell back to the raw question, and why."""
    from convsearch.files import read_jsonl

    errors = Counter(record["rewrite_error"] or "ok" for _, record in read_jsonl(path))
    total, failed = sum(errors.values()), sum(count for name, count in errors.items() if name != "ok")
    reasons = ", ".join(f"{name} {count}" for name, count in errors.most_common() if name != "ok")
    share = f" ({failed / total:.1%}): {reasons}" if failed else ""
    print(f"{path}: {total} rewrites, {failed} fell back to the raw question{share}")
