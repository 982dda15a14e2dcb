"""The flags that the data sets share."""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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


def command_parser(name: str, description: str | None) -> argparse.ArgumentParser:
    """A parser of ``python -m data_preprocess.<name>``."""
    form = argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(f"python -m data_preprocess.{name}", None, description, formatter_class=form)


def data_parser(name: str, description: str | None) -> argparse.ArgumentParser:
    """A parser with --output and --skip-bad."""
    parser = command_parser(name, description)
    output = "folder to write to; what is up to date in it is reused"
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help=output)
    skip = "leave out and list at most N malformed records (default: 0)"
    parser.add_argument("--skip-bad", type=count, default=0, metavar="N", help=skip)
    return parser


def conversations_parser(name: str, title: str) -> argparse.ArgumentParser:
    """A parser with --output, --skip-bad and the flags of ``PromptOptions``."""
    parser = data_parser(name, f"{title} -> conversations, collection, qrels, parquet.")
    style = "wording of the prompt in the parquet files (default: paper)"
    parser.add_argument("--prompt-style", choices=STYLES, default="paper", help=style)
    turns = "keep only the newest N turns of the history in the prompt (default: all)"
    parser.add_argument("--max-history-turns", type=count, metavar="N", help=turns)
    return parser


def add_split_options(parser: argparse.ArgumentParser, validation_conversations: int | None = None) -> None:
    """Adds --seed and, with the default ``validation_conversations``, the flag of that name."""
    seed = f"seed of the split by conversation (default: {DEFAULT_SEED})"
    parser.add_argument("--seed", type=int, default=DEFAULT_SEED, help=seed)
    if (default := validation_conversations) is not None:
        held_out = f"conversations of TRAIN to hold out (default: {default}; 0: none)"
        parser.add_argument("--validation-conversations", type=count, default=default, metavar="N", help=held_out)


def count(text: str) -> int:
    """A whole number of at least 0, for argparse."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 0, got {text!r}")
    return int(text)
