"""StackExchange's questions as training rows and a collection of all positives."""

import argparse
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_preprocess.options import PromptOptions
from data_preprocess.sources import BadRecords, Source
from data_preprocess.splits import hold_out
from data_preprocess.stackexchange_answers import Endpoint, model_answers
from data_preprocess.stackexchange_questions import Filters, Question, read_questions, sample
from data_preprocess.writers import COLLECTION, OutputFolder, Row, split_files, write_splits


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


def positives(question: Question) -> dict[str, str]:
    """Passage id -> answer."""
    return {f"{question.qid}-{number}": answer for number, answer in enumerate(question.answers)}


def rows(questions: list[Question], held_out: frozenset[str]) -> Iterator[Row]:
    """One turn per question; the positives are its gold passages too."""
    for question in questions:
        record = {
            "qid": question.qid,
            "conv_id": question.qid,
            "turn_id": 1,
            "question": question.text,
            "context": [],
            "answer": question.answers[0],
            "gold_docids": [*positives(question)],
            "positives": [*question.answers],
            "site": question.site,
        }
        yield Row("validation" if question.qid in held_out else "train", record, question.qid)


def convert(arguments: argparse.Namespace) -> None:
    """Writes everything below ``--output``; ``arguments`` are the flags of data_preprocess.stackexchange."""
    prompt = PromptOptions("rqr_think" if arguments.think else "rqr")
    folder = OutputFolder(arguments.output, arguments.skip_bad, prompt)
    inputs, num_held_out = find_inputs(arguments.input), arguments.validation_questions
    splits = ["train", "validation"] if num_held_out else ["train"]
    with_model = arguments.answers == "model"
    endpoint = Endpoint(arguments.endpoint, arguments.model, arguments.max_tokens) if with_model else None

    def make(bad: BadRecords) -> dict[str, Any]:
        dropped: Counter[str] = Counter()
        filters = Filters(arguments.max_chars, need_answer=not with_model)
        found = read_questions(inputs, frozenset(site.lower() for site in arguments.sites), filters, bad, dropped)
        questions = sample(found, arguments.max_per_site, arguments.seed)
        if endpoint is not None:
            path = arguments.output / "answers.jsonl"
            questions = model_answers(questions, endpoint, path, arguments.parallel, dropped)
        if not questions:
            places = ", ".join(map(str, arguments.input))
            raise ValueError(f"no question of {places} is left (dropped: {dict(dropped)}): is this the right input?")
        held_out = hold_out((question.qid for question in questions), num_held_out, arguments.seed, "question")
        passages = (passage for question in questions for passage in positives(question).items())
        made = folder.path, splits, rows(questions, held_out), "stackexchange", prompt, bad
        counts = write_splits(*made, passages=passages, with_positives=True)
        sites = Counter(question.site for question in questions)
        return counts | {"sites": dict(sites), "dropped": dict(dropped)}

    names = ("answers", "model", "max_per_site", "max_chars", "sites", "seed", "think", "validation_questions")
    options = {name: getattr(arguments, name) for name in names}
    folder.step("splits", [*split_files(*splits), COLLECTION], inputs, options, make)
