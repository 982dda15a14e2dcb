"""GRPO with a retriever as the teacher: ``python -m convsearch.grpo experiment=...``."""

import sys

from convsearch.cli import run
from convsearch.config import load_grpo_config


def main() -> None:
    """Reads the configuration, then trains."""
    cfg = load_grpo_config(sys.argv[1:])
    from convsearch.trainers.grpo import train

    train(cfg)


if __name__ == "__main__":
    run(main)
