"""The flags that the data sets share."""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from convsearch.cli import command_parser
from convsearch.prompts import STYLES, PromptStyle

DEFAULT_SEED = 13


@dataclass(frozen=True, slots=True)
class PromptOptions:
    """How the prompt column is rendered; ``max_history_turns`` None keeps the whole history."""

    style: PromptStyle = "paper"
    max_history_turns: int | None = None

    def as_dict(self) -> dict[str, Any]:
        return {"prompt_style": self.style, "max_history_turns": self.max_history_turns}


DEFAULT_PROMPT = PromptOptions()


def data_parser(name: str, description: str | None) -> argparse.ArgumentParser:
    """The parser of ``python -m data_preprocess.<name>``, with --output and --skip-bad."""
    parser = command_parser(f"data_preprocess.{name}", description)
    add = parser.add_argument
    add("--output", type=Path, required=True, metavar="DIR", help="folder to write to; what is up to date is reused")
    add("--skip-bad", type=count, default=0, metavar="N", help="leave out and list at most N malformed records (0)")
    return parser


def conversations_parser(name: str, title: str) -> argparse.ArgumentParser:
    """A parser with --output, --skip-bad and the flags of ``PromptOptions``."""
    parser = data_parser(name, f"{title} -> conversations, collection, qrels, parquet.")
    add = parser.add_argument
    add("--prompt-style", choices=STYLES, default="paper", help="wording of the prompt in the parquet files")
    add("--max-history-turns", type=count, metavar="N", help="newest turns to keep in the prompt (default: all)")
    return parser


def add_split_options(parser: argparse.ArgumentParser, validation_conversations: int | None = None) -> None:
    """Adds --seed and, with the default ``validation_conversations``, the flag of that name."""
    add, held_out = parser.add_argument, "conversations of TRAIN to hold out; 0: none"
    add("--seed", type=int, default=DEFAULT_SEED, help="seed of the split by conversation")
    if (default := validation_conversations) is not None:
        add("--validation-conversations", type=count, default=default, metavar="N", help=held_out)


def count(text: str) -> int:
    """A whole number of at least 0, for argparse."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 0, got {text!r}")
    return int(text)
