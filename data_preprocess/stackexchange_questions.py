"""StackExchange questions from the forms of RQR's data, filtered as RQR filters them, and sampled by site."""

import hashlib
import heapq
import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from data_preprocess.sources import BadRecords, Record, Source, read_parquet_records, read_records
from data_preprocess.splits import conversation_hash

ANY_SITE = "unnamed"  # of files without site names; --sites does not apply to them
# The reference's question texts contain its instruction; our prompt adds it again.
_INSTRUCTION = re.compile(r"(?s)\AInstructions:\n1\. Identify the essential problem\.\n.*?\n(?:Query|Question): ")


@dataclass(frozen=True, slots=True)
class Question:
    """``Question("se-0f3a...", "biology", "why do moths fly to lamps?", ("They keep their back to the light.",))``"""

    qid: str
    site: str
    text: str
    answers: tuple[str, ...]  # none if a model shall answer


@dataclass(frozen=True, slots=True)
class Filters:
    """RQR's: no pictures, no very long questions, at least one answer."""

    max_chars: int = 16_000
    need_answer: bool = True

    def reason(self, text: str, answers: Iterable[str]) -> str | None:
        """Why a question is dropped; None if it is not."""
        if ".png" in text:
            return "with_png"
        if len(text) > self.max_chars:
            return "too_long"
        if not text.strip():
            return "empty_question"
        return "empty_answer" if self.need_answer and not any(answer.strip() for answer in answers) else None


def read_questions(
    inputs: Iterable[Source], sites: frozenset[str], filters: Filters, bad: BadRecords, dropped: Counter[str]
) -> Iterator[Question]:
    """Questions in the order of the input, each text once; ``dropped`` counts the others of the sites by reason."""
    seen: set[str] = set()
    for source in inputs:
        for site, text, answers in raw_questions(source, bad):
            if site != ANY_SITE and site not in sites:
                continue
            text = _INSTRUCTION.sub("", text)
            qid = "se-" + hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]
            reason = "repeated" if qid in seen else filters.reason(text, answers)
            seen.add(qid)
            if reason is None:
                yield Question(qid, site, text.strip(), tuple(answer.strip() for answer in answers if answer.strip()))
            else:
                dropped[reason] += 1


def raw_questions(source: Source, bad: BadRecords) -> Iterator[tuple[str, str, list[str]]]:
    """(site, question, answers) of a file of any of the forms.

    Raises:
        ValueError: it is of none of them.
    """
    if source.path.suffix == ".parquet":
        first = next(read_parquet_records(source), None)
        if first is not None and "pos_docs_list" in str(first.data.get("answer")):
            records, parse = read_parquet_records(source, ("prompt", "answer")), _built
        else:
            records, parse = read_parquet_records(source, ("question", "answers", "metadata")), _preferences
        for record in records:
            with bad.tolerate():
                yield parse(record)
    elif source.path.suffix == ".json":
        yield from _mapping(source)
    else:
        for record in read_records(source, bad, source.path.name):
            with bad.tolerate():
                answer = record.optional_text("gold_answer") or record.optional_text("answer") or ""
                question = record.text("query" if "query" in record.data else "question")
                yield str(record.data.get("site") or ANY_SITE).lower(), question, [answer]


def _preferences(record: Record) -> tuple[str, str, list[str]]:
    """stack-exchange-preferences: the first address names the site, ``selected`` the accepted answer."""
    addresses = record.texts("metadata")
    host = urlsplit(addresses[0]).hostname or "" if addresses else ""
    selected = (answer for answer in record.objects("answers") if answer.data.get("selected") is True)
    accepted = [answer.text("text", blank=True) for answer in selected]
    return host.removeprefix("www.").partition(".")[0], record.text("question", blank=True), accepted


def _built(record: Record) -> tuple[str, str, list[str]]:
    """A row of build_dataset.py: ``answer`` is JSON of query, pos_docs_list and think_flag."""
    try:
        solution = Record(json.loads(record.text("answer")), record.where)
    except ValueError as error:
        raise record.error("answer", f"is not JSON ({error})") from error
    return ANY_SITE, solution.text("query", blank=True), solution.texts("pos_docs_list")


def _mapping(source: Source) -> Iterator[tuple[str, str, list[str]]]:
    """{question: answer or [answers]}, the input of build_dataset.py."""
    try:
        found: Any = json.loads(source.path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{source}: not valid JSON ({error})") from error
    if not isinstance(found, dict):
        raise ValueError(f"{source}: expected one object {{question: answer or answers}}, got {type(found).__name__}")
    for question, answers in found.items():
        texts = answers if isinstance(answers, list) else [answers]
        if not all(isinstance(text, str) for text in texts):
            raise ValueError(f"{source}: the answers to {question[:60]!r} must be texts")
        yield ANY_SITE, question, texts


def sample(questions: Iterable[Question], most: int, seed: int) -> list[Question]:
    """At most ``most`` per site (0: all), by a seeded hash, so that the order of the shards does not matter."""
    kept: dict[str, list[tuple[int, str, Question]]] = defaultdict(list)
    for question in questions:
        entry = (-int(conversation_hash(question.qid, seed), 16), question.qid, question)
        if question.site == ANY_SITE or not most or len(kept[question.site]) < most:
            heapq.heappush(kept[question.site], entry)
        else:
            heapq.heappushpop(kept[question.site], entry)
    return [question for site in sorted(kept) for _, _, question in sorted(kept[site], key=lambda entry: -entry[0])]
