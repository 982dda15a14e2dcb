"""Self-driven warm-up data: the base model rewrites the training set, the retriever says which rewrites are good (arXiv 2505.15776, section 3.2).

``python -m convsearch.distill --model_name_or_path BASE --input_path train.json --output_dir DIR --retriever_url embedded:INDEX``

k samples a conversation with the one-example prompt; a sample is kept when its form is right and its gold passage stands at rank 1. What is kept is
written to ``sft.parquet`` with the ZERO-shot prompt. All samples stay in ``samples.jsonl``, with ranks; the command resumes there when it is run again.
"""

import argparse
import json
import os
import random
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from convsearch.generation.infer import add_sampling_flags, claim, finished, read_input

if TYPE_CHECKING:
    from convsearch.types import Conversation


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m convsearch.distill", description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--model_name_or_path", required=True, help="the base model: folder or hub name")
    add("--input_path", required=True, help="training conversations, one JSON object a line")
    add("--output_dir", required=True, help="folder for samples.jsonl, sft.parquet and yield.json")
    add("--retriever_url", default="", help="http://host:port or embedded:INDEX_FOLDER; $RETRIEVER_URL by default")
    add("--retriever_index", default=None, help="which of the server's indexes; its default by default")
    add("--k", type=int, default=1, help="samples a conversation (the paper takes 1)")
    add("--rank_limit", type=int, default=1, help="worst gold rank that is kept (the paper keeps rank 1)")
    add("--max_kept", type=int, default=1, help="samples kept a conversation at most, the best ranks first")
    add(
        "--drop_first_turns", action="store_true", help="leave out questions without a history, which need no rewriting"
    )
    add(
        "--drop_copies",
        action="store_true",
        help="leave out rewrites that only repeat the question where it has a history (not in the paper)",
    )
    add(
        "--shuffle_seed",
        type=int,
        default=None,
        help="shuffle the conversations' questions by this seed before --limit; file order by default",
    )
    add_sampling_flags(parser, max_tokens=1024)
    args = parser.parse_args(argv)
    args.model_name = "Get_SFT"
    for name in ("k", "rank_limit", "max_kept"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} is {getattr(args, name)}; it must be at least 1")
    return args


def sample(args: argparse.Namespace, conversations: list["Conversation"], samples_path: Path, qids: set[str]) -> None:
    """Appends k samples with their gold ranks for every conversation that ``samples.jsonl`` does not have yet.

    Raises:
        ValueError: a conversation has no gold passage, or ``samples.jsonl`` is of another input (``qids``) or of another k.
    """
    from tqdm import tqdm

    from convsearch.files import named_errors
    from convsearch.generation.infer import build
    from convsearch.parsing import parse_rewrite
    from convsearch.retriever.client import open_retriever

    done = finished(samples_path, qids, "samples")
    claim(samples_path, args)
    for conversation in conversations:
        if not conversation.gold_docids:
            raise ValueError(
                f"{args.input_path}: {conversation.qid} has no gold passage (gold_docids), without which no rewrite can be judged"
            )
        there = len(done[conversation.qid]["samples"]) if conversation.qid in done else args.k
        if there != args.k:
            raise ValueError(
                f"{samples_path} has {there} samples a conversation, not --k {args.k}: set it back or name another --output_dir"
            )
    rest = [c for c in conversations if c.qid not in done]
    if len(rest) < len(conversations):
        kept = len(conversations) - len(rest)
        print(f"{samples_path}: {kept} of {len(conversations)} conversations are there already and are kept")
    if not rest:
        return
    with open_retriever(args.retriever_url, depth=max(100, args.rank_limit), index=args.retriever_index) as retriever:
        rewriter, n_slice = build(args), max(1, args.batch_size // args.k)
        with (
            named_errors(samples_path),
            samples_path.open("a", encoding="utf-8") as file,
            tqdm(
                total=len(conversations), initial=len(conversations) - len(rest), desc="distilling", unit="question"
            ) as bar,
        ):
            for part, completions in rewriter.slices(rest, args.k, args.seed, n_slice):
                rewrites = [parse_rewrite(completion.text, completion.finish_reason) for completion in completions]
                golds = [conversation.gold_docids for conversation in part for _ in range(args.k)]
                ranks = retriever.gold_ranks(golds, [rewrite.text for rewrite in rewrites])
                for i, conversation in enumerate(part):
                    mine = range(i * args.k, (i + 1) * args.k)
                    rows = [
                        {
                            "output": completions[j].text,
                            "rewrite": rewrites[j].text,
                            "error": rewrites[j].error,
                            "rank": ranks[j],
                        }
                        for j in mine
                    ]
                    file.write(json.dumps({"qid": conversation.qid, "samples": rows}, ensure_ascii=False) + "\n")
                file.flush()
                os.fsync(file.fileno())
                bar.update(len(part))


def verdict(args: argparse.Namespace, record: dict[str, Any], row: dict[str, Any]) -> str:
    """Why a sample is not kept, or "kept"."""
    if row["error"] is not None:
        return f"form: {row['error']}"
    if row["rank"] is None:
        return "gold not found"
    if row["rank"] > args.rank_limit:
        return f"gold below rank {args.rank_limit}"
    if args.drop_copies and record.get("context") and _words(row["rewrite"]) == _words(record["question"]):
        return "copy of the question"
    return "kept"


def _words(text: str) -> list[str]:
    return "".join(char if char.isalnum() else " " for char in text.lower()).split()


def select(
    args: argparse.Namespace, records: list[dict[str, Any]], samples: dict[str, list[dict[str, Any]]]
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The SFT rows, and the yield by turn and by reason."""
    rows: list[dict[str, Any]] = []
    reasons: Counter[str] = Counter()
    by_turn: dict[int, Counter[str]] = defaultdict(Counter)
    for record in records:
        turn = len(record.get("context", [])) // 2 + 1
        verdicts = [verdict(args, record, row) for row in samples[record["qid"]]]
        reasons.update(verdicts)
        kept = [row for row, word in zip(samples[record["qid"]], verdicts, strict=True) if word == "kept"]
        unique = list({row["output"]: row for row in sorted(kept, key=lambda row: row["rank"])}.values())[
            : args.max_kept
        ]
        by_turn[turn].update(samples=len(verdicts), samples_kept=len(kept), questions=1, questions_kept=int(bool(kept)))
        rows += [{"record": record, "output": row["output"], "rank": row["rank"]} for row in unique]
    summary = {
        "rows": len(rows),
        "samples": sum(reasons.values()),
        "by_reason": dict(reasons.most_common()),
        "by_turn": {str(turn): dict(by_turn[turn]) for turn in sorted(by_turn)},
    }
    return rows, summary


def write_parquet(path: Path, rows: Iterable[dict[str, Any]], style: Any, max_turns: int | None) -> None:
    """SFT rows with the zero-shot prompt, in the reference's columns."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from convsearch.files import atomic_write
    from convsearch.prompts import render
    from convsearch.types import Conversation

    table = []
    for index, row in enumerate(rows):
        conversation = Conversation.from_record(row["record"])
        prompt = render(conversation, style, max_turns)
        extra: dict[str, Any] = {
            "split": "train",
            "index": index,
            "query_id": conversation.qid,
            "question": conversation.question,
        }
        table.append(
            {
                "data_source": "self-distillation",
                "prompt": list(prompt),
                "ability": "rewrite",
                "reward_model": {"style": "rule", "ground_truth": list(conversation.gold_docids)},
                "extra_info": extra | {"prompt": prompt[0]["content"], "answer": row["output"].strip()},
            }
        )
    with atomic_write(path, "wb") as file:
        pq.write_table(pa.Table.from_pylist(table), file)


def print_yield(summary: dict[str, Any]) -> None:
    """Two small tables: why samples went, and what each turn gave."""
    print(f"\n{'reason':<28}{'samples':>9}{'share':>9}")
    for reason, count in summary["by_reason"].items():
        print(f"{reason:<28}{count:>9}{count / summary['samples']:>9.1%}")
    print(f"\n{'turn':<6}{'samples':>9}{'kept':>7}{'yield':>9}{'questions with one':>21}")
    for turn, row in summary["by_turn"].items():
        kept, share = row.get("samples_kept", 0), row.get("samples_kept", 0) / row["samples"]
        print(f"{turn:<6}{row['samples']:>9}{kept:>7}{share:>9.1%}{row['questions_kept']:>12} of {row['questions']}")


def main() -> None:
    args = parse_args()
    from convsearch.files import atomic_write, read_jsonl
    from convsearch.types import Conversation

    records, everything = read_input(args.input_path)
    if args.drop_first_turns:
        records = [record for record in records if record.get("context")]
    if args.shuffle_seed is not None:
        random.Random(args.shuffle_seed).shuffle(records)
    records = records[: args.limit]
    output = Path(args.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    conversations = [Conversation.from_record(record) for record in records]
    sample(args, conversations, output / "samples.jsonl", {conversation.qid for conversation in everything})
    samples = {record["qid"]: record["samples"] for _, record in read_jsonl(output / "samples.jsonl")}
    rows, summary = select(args, records, samples)
    print_yield(summary)
    if not rows:
        raise ValueError(
            f"no sample of {summary['samples']} was kept; raise --k or --rank_limit, or let --scaffold write the tags where the form is the reason"
        )
    write_parquet(output / "sft.parquet", rows, args.prompt_style, args.max_history_turns)
    with atomic_write(output / "yield.json") as file:
        json.dump(summary, file, indent=1)
    print(f"\n{output / 'sft.parquet'}: {len(rows)} rows to learn from")
