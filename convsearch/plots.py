"""Curves of GRPO runs: ``python -m convsearch.plots RUN_FOLDER [RUN_FOLDER ...] --output curves.png``.

Also reports for each run whether its reward rose: the prompts of the last third of its steps against those of the first
third.
"""

import argparse
from pathlib import Path

from convsearch.cli import command_parser, run


def build_parser() -> argparse.ArgumentParser:
    parser = command_parser("convsearch.plots", __doc__)
    help_run = "run folder of convsearch.grpo; several runs are drawn into the same panels"
    parser.add_argument("run", nargs="+", type=Path, help=help_run)
    parser.add_argument("--output", required=True, type=Path, help="PNG or PDF to write")
    return parser


def main() -> None:
    """Parses the arguments, then draws (matplotlib is imported here)."""
    args = build_parser().parse_args()
    from convsearch.runs.plots import draw, verdict
    from convsearch.runs.tracking import read_metrics

    runs = [read_metrics(folder) for folder in args.run]
    for folder, records in zip(args.run, runs, strict=True):
        if not any(record["step"] >= 0 for record in records):
            raise ValueError(f"{folder} has no metrics.jsonl with a finished step")
    draw(runs, args.output)
    print(f"curves of {' + '.join(str(len(records)) for records in runs)} records: {args.output}")
    for folder, records in zip(args.run, runs, strict=True):
        print(verdict(folder, records))


if __name__ == "__main__":
    run(main)
