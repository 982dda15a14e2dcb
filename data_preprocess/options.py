"""The flags that all data sets share."""

import argparse
from pathlib import Path

from convsearch.prompts import STYLES
from data_preprocess.writers import PromptOptions

DEFAULT_SEED = 13


def add_common_options(
    parser: argparse.ArgumentParser, *, validation_conversations: int | None = None, seeded: bool = True
) -> None:
    """Adds the shared flags. ``validation_conversations``: the default of that flag, None leaves it out; ``seeded``: with --seed."""
    parser.add_argument(
        "--output",
        type=Path,
        required=True,
        metavar="DIR",
        help="folder to write to; what is up to date in it is reused",
    )
    parser.add_argument(
        "--prompt-style",
        choices=STYLES,
        default="paper",
        help="wording of the prompt in the parquet files (default: paper)",
    )
    parser.add_argument(
        "--max-history-turns",
        type=count,
        metavar="N",
        help="keep only the newest N turns of the history in the prompt (default: all)",
    )
    parser.add_argument(
        "--skip-bad",
        type=count,
        default=0,
        metavar="N",
        help="leave out and list at most N malformed records (default: 0)",
    )
    if seeded:
        parser.add_argument(
            "--seed",
            type=int,
            default=DEFAULT_SEED,
            help=f"seed of the split by conversation (default: {DEFAULT_SEED})",
        )
    if validation_conversations is not None:
        parser.add_argument(
            "--validation-conversations",
            type=count,
            default=validation_conversations,
            metavar="N",
            help=f"conversations of TRAIN to hold out for validation (default: {validation_conversations}; 0: none)",
        )


def count(text: str) -> int:
    """A whole number of at least 0, for argparse."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 0, got {text!r}")
    return int(text)


def prompt_options(arguments: argparse.Namespace) -> PromptOptions:
    return PromptOptions(arguments.prompt_style, arguments.max_history_turns)
