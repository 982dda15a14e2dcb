"""Self-driven warm-up data: the base model rewrites the training set, the retriever says which rewrites are good.

arXiv 2505.15776, section 3.2: k samples per conversation with the one-example prompt. A sample is kept if its form is
right and its gold passage has rank 1. ``sft.parquet`` then has what is kept, with the ZERO-shot prompt.
"""

import argparse
import json
import math
import random
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from convsearch.files import atomic_write, read_jsonl, sole_writer
from convsearch.generation.names import guesses
from convsearch.generation.output import Record, ResumableLines, read_input
from convsearch.parsing import parse_rewrite
from convsearch.prompts import PromptStyle, render
from convsearch.retriever.client import RetrieverClient
from convsearch.retriever.embedded import open_retriever
from convsearch.retriever.golds import rows_without_gold
from convsearch.types import Completion, Conversation

NOT_FOUND = 1000  # taken as the rank of a gold passage that was not found


def distill(args: argparse.Namespace) -> None:
    """Writes samples.jsonl (all), sft.parquet (those that are kept) and yield.json into ``args.output_dir``."""
    with sole_writer(args.output_dir, inside=True):
        _distill(args)


def _distill(args: argparse.Namespace) -> None:
    records, everything = read_input(args.input_path)
    if args.drop_first_turns:
        records = [record for record in records if record.get("context")]
    if args.shuffle_seed is not None:
        random.Random(args.shuffle_seed).shuffle(records)
    records = records[: args.limit]
    output = Path(args.output_dir)
    conversations = [Conversation.from_record(record) for record in records]
    sample(args, conversations, output / "samples.jsonl", everything)
    samples = {record["qid"]: record for _, record in read_jsonl(output / "samples.jsonl")}
    records = [record for record in records if record["qid"] in samples]  # the others are bad
    rows, summary = select(args, records, samples)
    print_yield(summary)
    if not rows:
        remedy = "raise --k or --rank_limit, or use --scaffold if the form is the reason"
        raise ValueError(f"no sample of {summary['samples']} was kept; {remedy}")
    write_parquet(output / "sft.parquet", rows, args.prompt_style, args.max_history_turns)
    with atomic_write(output / "yield.json") as file:
        json.dump(summary, file, indent=1)
    print(f"\n{output / 'sft.parquet'}: {len(rows)} rows to learn from")


def sample(
    args: argparse.Namespace, conversations: list[Conversation], path: Path, everything: Sequence[Conversation]
) -> None:
    """Appends the samples of every conversation that is not in ``path`` yet, with their gold ranks.

    They are k of the model and, with ``args.names``, the best rewrite of ``best_names``.

    Raises:
        ValueError: a conversation has no gold passage, or ``path`` is of another input than ``everything``, another k
            or another index, or lacks the rewrites of ``args.names``.
    """
    for conversation in conversations:
        if not conversation.gold_docids:
            what = f"{conversation.qid} has no gold passage (gold_docids): its rewrites cannot be ranked"
            raise ValueError(f"{args.input_path}: {what}")
    output = ResumableLines(path, args, "samples", everything)
    check_done(args, conversations, output)
    if not args.retriever_url and all(conversation.qid in output.done for conversation in conversations):
        output.complete(conversations, args.k, 1, lambda part, groups: (), "distilling")  # reports what is kept
        return
    depth = max(100, args.rank_limit)
    with open_retriever(args.retriever_url, depth=depth, index=args.retriever_index) as retriever:
        output.depends_on(index=retriever.index_id())
        golds = [(conversation.qid, conversation.gold_docids) for conversation in conversations]
        bad = rows_without_gold(retriever, golds, args.input_path, args.skip_bad, "--skip_bad")
        conversations = [conversation for number, conversation in enumerate(conversations) if number not in bad]

        def lines(part: Sequence[Conversation], groups: list[list[Completion]]) -> Iterator[Record]:
            rewrites = [parse_rewrite(c.text, c.finish_reason) for group in groups for c in group]
            golds = [conversation.gold_docids for conversation in part for _ in range(args.k)]
            judged = iter(zip(rewrites, retriever.gold_ranks(golds, [r.text for r in rewrites]), strict=True))
            named = best_names(retriever, part) if args.names else [{}] * len(part)
            for conversation, group, best in zip(part, groups, named, strict=True):
                samples = [
                    {"output": completion.text, "rewrite": rewrite.text, "error": rewrite.error, "rank": rank}
                    for completion, (rewrite, rank) in zip(group, judged, strict=False)
                ]
                yield {"qid": conversation.qid, **best, "samples": samples}

        output.complete(conversations, args.k, max(1, args.batch_size // max(1, args.k)), lines, "distilling")


def check_done(args: argparse.Namespace, conversations: Iterable[Conversation], output: ResumableLines) -> None:
    """Raises ValueError if the lines that are there have another k, or lack the rewrites of ``args.names``."""
    for conversation in conversations:
        qid, path = conversation.qid, output.path
        k = len(output.done[qid]["samples"]) if qid in output.done else args.k
        if k != args.k:
            remedy = "set it back or name another --output_dir"
            raise ValueError(f"{path} has {k} samples per conversation, not --k {args.k}: {remedy}")
        if args.names and "named" not in output.done.get(qid, {"named": None}):
            raise ValueError(f"{path} was written without --names: leave it out, or name another --output_dir")


def best_names(retriever: RetrieverClient, part: Sequence[Conversation]) -> list[Record]:
    """For each conversation {"named": the rewrite of the best of its ``guesses``, the first of equals}.

    A word may improve a rank by chance. So a product decides: the rewrite's gold rank times the square root of the
    gold rank of the topic as a query of its own, which is good for the right topic only.
    """
    tried = [guesses(conversation) for conversation in part]
    flat = [(conversation.gold_docids, guess) for conversation, own in zip(part, tried, strict=True) for guess in own]
    golds = [gold for gold, _ in flat]
    of_topics = retriever.gold_ranks(golds, [guess.topic for _, guess in flat])
    of_rewrites = retriever.gold_ranks(golds, [guess.rewrite for _, guess in flat])
    ranks = iter(zip(of_rewrites, of_topics, strict=True))
    best = []
    for own in tried:
        judged = [(guess, *next(ranks)) for guess in own]
        guess, rank, _ = min(judged, key=lambda entry: (entry[1] or NOT_FOUND) * math.sqrt(entry[2] or NOT_FOUND))
        output = f"<think>{guess.thought}</think>\n<rewrite>{guess.rewrite}</rewrite>"
        best.append({"named": {"output": output, "rewrite": guess.rewrite, "error": None, "rank": rank}})
    return best


def verdict(args: argparse.Namespace, record: Record, row: Record) -> str:
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


def select(args: argparse.Namespace, records: list[Record], samples: dict[str, Record]) -> tuple[list[Record], Record]:
    """The SFT rows, and the yield by turn and by reason.

    With ``args.names``, that rewrite is a candidate, too; it comes before samples of the same rank.

    Args:
        samples: the lines of samples.jsonl by query id.
    """
    rows: list[Record] = []
    reasons: Counter[str] = Counter()
    by_turn: dict[int, Counter[str]] = defaultdict(Counter)
    for record in records:
        turn = len(record.get("context", [])) // 2 + 1
        line = samples[record["qid"]]
        tried = [line["named"], *line["samples"]] if args.names else line["samples"]
        verdicts = [verdict(args, record, row) for row in tried]
        reasons.update(verdicts)
        kept = [row for row, word in zip(tried, verdicts, strict=True) if word == "kept"]
        unique = {row["output"]: row for row in sorted(kept, key=lambda row: row["rank"])}
        best = list(unique.values())[: args.max_kept]
        by_turn[turn].update(samples=len(verdicts), samples_kept=len(kept), questions=1, questions_kept=int(bool(kept)))
        rows += [{"record": record, "output": row["output"], "rank": row["rank"]} for row in best]
    return rows, {
        "rows": len(rows),
        "samples": reasons.total(),
        "by_reason": dict(reasons.most_common()),
        "by_turn": {str(turn): dict(by_turn[turn]) for turn in sorted(by_turn)},
    }


def write_parquet(path: Path, rows: Iterable[Record], style: PromptStyle, max_turns: int | None) -> None:
    """SFT rows with the zero-shot prompt, in the reference's columns."""
    table = []
    for index, row in enumerate(rows):
        conversation = Conversation.from_record(row["record"])
        prompt = render(conversation, style, max_turns)
        extra: Record = {"split": "train", "index": index}
        extra |= {"query_id": conversation.qid, "question": conversation.question}
        extra |= {"prompt": prompt[0]["content"], "answer": row["output"].strip()}
        table.append(
            {
                "data_source": "self-distillation",
                "prompt": list(prompt),
                "ability": "rewrite",
                "reward_model": {"style": "rule", "ground_truth": list(conversation.gold_docids)},
                "extra_info": extra,
            }
        )
    with atomic_write(path, "wb") as file:
        pq.write_table(pa.Table.from_pylist(table), file, write_page_checksum=True)


def print_yield(summary: Record) -> None:
    """Two small tables: why samples were dropped, and the yield of each turn."""
    print(f"\n{'reason':<28}{'samples':>9}{'share':>9}")
    for reason, count in summary["by_reason"].items():
        print(f"{reason:<28}{count:>9}{count / summary['samples']:>9.1%}")
    print(f"\n{'turn':<6}{'samples':>9}{'kept':>7}{'yield':>9}{'questions with one':>21}")
    for turn, row in summary["by_turn"].items():
        kept, share = row.get("samples_kept", 0), row.get("samples_kept", 0) / row["samples"]
        questions = f"{row['questions_kept']:>12} of {row['questions']}"
        print(f"{turn:<6}{row['samples']:>9}{kept:>7}{share:>9.1%}{questions}")
