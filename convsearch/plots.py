"""Curves of GRPO runs: ``python -m convsearch.plots RUN_FOLDER [RUN_FOLDER ...] --output curves.png``.

Says of each run, too, whether its reward rose: the prompts of its last third of steps against those of its first third.
"""

from convsearch.cli import run
from convsearch.runs.plots import main

__all__ = ["main"]

if __name__ == "__main__":
    run(main)
