"""StackExchange questions with their answers as positives -> RQR's training rows (arXiv 2506.11603, section 4.1).

    python -m data_preprocess.stackexchange --input stack-exchange-preferences/data --output data/stackexchange                  # V2: accepted answers
    python -m data_preprocess.stackexchange ... --answers model --endpoint http://127.0.0.1:8001/v1 --model NAME                 # V1: a model's answers

The input is one of: a folder of parquet shards of HuggingFaceH4/stack-exchange-preferences (streamed), RQR's own JSON
{question: answer or answers}, the parquet that its build_dataset.py makes of it, or JSON lines of {query, gold_answer}. Questions with ".png", over
16,000 characters, or without an answer are dropped and counted.
Writes train and validation (conversations of one turn, qrels, parquet with extra_info.positives), and collection.jsonl of all positives, for rank rewards.
"""

import argparse
from collections import Counter
from pathlib import Path
from typing import Any

from convsearch import cli
from data_preprocess.options import DEFAULT_SEED, count
from data_preprocess.sources import BadRecords, Source
from data_preprocess.splits import hold_out
from data_preprocess.stackexchange_answers import Endpoint, model_answers
from data_preprocess.stackexchange_questions import SITES, Filters, Question, read_questions, sample
from data_preprocess.writers import OutputFolder, PromptOptions, Row, split_files, write_collection, write_splits


def find_inputs(places: list[Path]) -> list[Source]:
    """The files themselves, and every parquet file below a folder.

    Raises:
        ValueError: there is no such place, or nothing in it.
    """
    found: list[Source] = []
    for place in places:
        if not place.exists():
            raise ValueError(f"there is no {place}")
        inside = sorted(place.rglob("*.parquet")) if place.is_dir() else [place]
        if not inside:
            raise ValueError(f"{place} has no parquet file in it")
        found += map(Source, inside)
    return found


def rows(questions: list[Question], held_out: frozenset[str]) -> list[Row]:
    """One turn a question; the positives are its gold passages too."""
    made = []
    for question in questions:
        record = {
            "qid": question.qid,
            "conv_id": question.qid,
            "turn_id": 1,
            "question": question.text,
            "context": [],
            "answer": question.answers[0],
            "gold_docids": [f"{question.qid}-{number}" for number in range(len(question.answers))],
            "positives": list(question.answers),
            "site": question.site,
        }
        made.append(Row("validation" if question.qid in held_out else "train", record, question.qid))
    return made


def convert(arguments: argparse.Namespace) -> None:
    """Writes everything below ``--output``."""
    folder = OutputFolder(arguments.output, arguments.skip_bad)
    inputs = find_inputs(arguments.input)
    prompt = PromptOptions("rqr_think" if arguments.think else "rqr")
    splits = ["train", "validation"] if arguments.validation_questions else ["train"]
    with_model = arguments.answers == "model"
    endpoint = Endpoint(arguments.endpoint, arguments.model, arguments.max_tokens) if with_model else None

    def make(bad: BadRecords) -> dict[str, Any]:
        dropped: Counter[str] = Counter()
        filters = Filters(arguments.max_chars, need_answer=not with_model)
        found = read_questions(inputs, frozenset(site.lower() for site in arguments.sites), filters, bad, dropped)
        questions = sample(found, arguments.max_per_site, arguments.seed)
        if endpoint is not None:
            questions = model_answers(
                questions, endpoint, arguments.output / "answers.jsonl", arguments.parallel, dropped
            )
        if not questions:
            raise ValueError(
                f"no question is left of {', '.join(map(str, arguments.input))} (dropped: {dict(dropped)}): is this the right input?"
            )
        if len(questions) <= arguments.validation_questions:
            raise ValueError(
                f"--validation-questions {arguments.validation_questions} leaves none of {len(questions)} to train on; ask for fewer"
            )
        held_out = hold_out([question.qid for question in questions], arguments.validation_questions, arguments.seed)
        counts = write_splits(
            folder.path,
            splits,
            rows(questions, held_out),
            data_source="stackexchange",
            prompt=prompt,
            bad=bad,
            with_positives=True,
        )
        passages = [
            (f"{question.qid}-{number}", text) for question in questions for number, text in enumerate(question.answers)
        ]
        collection = write_collection(folder.path / "collection.jsonl", passages, {docid for docid, _ in passages}, bad)
        sites = Counter(question.site for question in questions)
        return counts | {"collection": collection, "sites": dict(sites), "dropped": dict(dropped)}

    options = {
        name: getattr(arguments, name)
        for name in ("answers", "model", "max_per_site", "max_chars", "sites", "seed", "think")
    }
    options["validation_questions"] = arguments.validation_questions
    folder.step(
        "splits",
        [name for split in splits for name in split_files(split)] + ["collection.jsonl"],
        inputs,
        options,
        make,
    )


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m data_preprocess.stackexchange",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        "--input",
        type=Path,
        nargs="+",
        required=True,
        metavar="PLACE",
        help="folder of parquet shards, or files of a form above",
    )
    add(
        "--output",
        type=Path,
        required=True,
        metavar="DIR",
        help="folder to write to; what is up to date in it is reused",
    )
    add(
        "--answers",
        choices=("accepted", "model"),
        default="accepted",
        help="whose answers are the positives (default: accepted)",
    )
    add("--endpoint", metavar="URL", help="OpenAI-compatible, ending in /v1; the key is taken from $OPENAI_API_KEY")
    add("--model", help="the model that answers")
    add("--max-tokens", type=count, default=8192, metavar="N", help="of an answer (default: 8192)")
    add("--parallel", type=count, default=8, metavar="N", help="requests at a time (default: 8)")
    add(
        "--sites",
        nargs="+",
        default=list(SITES),
        metavar="SITE",
        help=f"first words of their addresses (default: {' '.join(SITES)})",
    )
    add(
        "--max-per-site",
        type=count,
        default=1200,
        metavar="N",
        help="questions of a site at most (default: 1200; 0: all)",
    )
    add(
        "--max-chars", type=count, default=16_000, metavar="N", help="characters of a question at most (default: 16000)"
    )
    add("--validation-questions", type=count, default=64, metavar="N", help="questions held out (default: 64; 0: none)")
    add(
        "--think",
        action="store_true",
        help="prompt for <think>..</think> <answer>..</answer> (reward_model.reward.form=answer)",
    )
    add(
        "--skip-bad",
        type=count,
        default=0,
        metavar="N",
        help="leave out and list at most N malformed records (default: 0)",
    )
    add("--seed", type=int, default=DEFAULT_SEED, help=f"seed of sample and split (default: {DEFAULT_SEED})")
    return parser


def main() -> None:
    arguments = build_parser().parse_args()
    if (arguments.answers == "model") != (arguments.endpoint is not None and arguments.model is not None):
        raise ValueError("--answers model needs --endpoint and --model, and --answers accepted takes neither")
    convert(arguments)


if __name__ == "__main__":
    cli.run(main)
