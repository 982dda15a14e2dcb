"""What the conversations of data sets are like: ``python -m eval.conversations data/demo/test.json ...``.

Each file is one of ``data_preprocess`` and has collection.jsonl beside it. A later turn is any turn but the first of
its conversation. Content words are the distinct index terms (Lucene's English analyzer: stems, no stop words).
"""

import argparse
import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

import numpy as np

from convsearch import cli
from convsearch.files import read_jsonl
from eval.tables import percent
from retriever_server.text.analyzer import analyze

PRONOUNS = "he she it they him her them his hers its their theirs this that these those"
_PRONOUN = re.compile(rf"\b({PRONOUNS.replace(' ', '|')})\b", re.IGNORECASE)
SHORT_WORDS = 4


def build_parser() -> argparse.ArgumentParser:
    parser = cli.command_parser("eval.conversations", __doc__)
    what = "conversations of data_preprocess, with collection.jsonl beside them"
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help=what)
    return parser


def _shares(turns: Sequence[Mapping[str, Any]], passages: Mapping[str, str]) -> Iterable[float]:
    """Per question with content words, the share of them that is in its gold passages."""
    for turn in turns:
        if words := set(analyze(turn["question"])):
            golds = " ".join(passages[docid] for docid in turn["gold_docids"])
            yield len(words & set(analyze(golds))) / len(words)


def statistics(turns: Sequence[Mapping[str, Any]], passages: Mapping[str, str]) -> dict[str, str]:
    """{name: value} of a table's column; the turns of a conversation are neighbours, ``passages`` has their golds."""
    conversations = [list(group) for _, group in groupby(turns, key=lambda turn: turn["conv_id"])]
    pairs = [pair for conversation in conversations for pair in pairwise(conversation)]
    switches = [last["topic"] != turn["topic"] for last, turn in pairs]
    returns = [
        turn["topic"] != conversation[i]["topic"] and turn["topic"] in {other["topic"] for other in conversation[:i]}
        for conversation in conversations
        for i, turn in enumerate(conversation[1:])
    ]
    questions = [turn["question"] for turn in turns]
    lengths = [len(question.split()) for question in questions]
    figures = {
        "turns per conversation": len(turns) / len(conversations),
        "topics per conversation": np.mean([len({turn["topic"] for turn in group}) for group in conversations]),
        "topic switches per conversation": sum(switches) / len(conversations),
        "words per question": np.mean(lengths),
        "words per answer": np.mean([len(turn["answer"].split()) for turn in turns]),
    }
    shares = {
        "later turns with a new gold": np.mean([last["gold_docids"] != turn["gold_docids"] for last, turn in pairs]),
        "later turns that switch the topic": np.mean(switches),
        "later turns that return to a topic": np.mean(returns),
        "questions with a pronoun": np.mean([bool(_PRONOUN.search(question)) for question in questions]),
        f"questions of up to {SHORT_WORDS} words": np.mean([length <= SHORT_WORDS for length in lengths]),
        "content words of a question in its gold": np.mean(list(_shares(turns, passages))),
    }
    counts = {"conversations": f"{len(conversations):,}", "turns": f"{len(turns):,}"}
    return (
        counts
        | {name: f"{value:.1f}" for name, value in figures.items()}
        | {f"{name}, %": percent(float(value), 0) for name, value in shares.items()}
    )


def read_column(path: Path) -> dict[str, str]:
    """The statistics of a file.

    Raises:
        ValueError: a turn lacks a field, or its gold passage is not in the collection.
    """
    turns = [turn for _, turn in read_jsonl(path)]
    for turn in turns:
        if missing := {"conv_id", "question", "answer", "topic", "gold_docids"} - turn.keys():
            raise ValueError(f"{path}: {turn.get('qid')}: no field {min(missing)!r}; give a file with topics and golds")
    wanted = {docid for turn in turns for docid in turn["gold_docids"]}
    collection = path.with_name("collection.jsonl")
    passages = {record["id"]: record["contents"] for _, record in read_jsonl(collection) if record["id"] in wanted}
    if lost := wanted - passages.keys():
        raise ValueError(f"{collection}: no passage {min(lost)!r}, a gold of {path.name}; convert the data set again")
    return statistics(turns, passages)


def main() -> None:
    files = build_parser().parse_args().files
    columns = [read_column(path) for path in files]
    print(f"| | {' | '.join(f'{path.parent.name} {path.stem}' for path in files)} |\n{'|---' * (len(files) + 1)}|")
    for name in columns[0]:
        print(f"| {name} | {' | '.join(column[name] for column in columns)} |")


if __name__ == "__main__":
    cli.run(main)
