"""Curves of GRPO runs: ``python -m convsearch.plots RUN_FOLDER [RUN_FOLDER ...] --output curves.png``.

Says of each run, too, whether its reward rose: the prompts of its last third of steps against those of its first third.
"""

import argparse
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

PANELS = (
    ("reward", "reward a sample", ("reward", "val_reward")),
    ("KL to the reference", "nats a token", ("kl",)),
    ("response length", "tokens", ("response_tokens",)),
    ("format rate", "share of samples", ("format_rate", "val_format_rate")),
    ("reciprocal rank", "mean", ("mrr", "val_mrr")),
    ("groups that teach", "share with differing rewards", ("spread_rate",)),
)
COLOURS = ("#1f5f99", "#2e8b57", "#8a4fa3", "#a8761c")
WINDOW = 5  # steps of the running mean


def draw(runs: Sequence[list[dict[str, Any]]], output: Path) -> None:
    """Six panels over the steps, a colour a run: the raw values thin, a running mean of five steps thick, validation as dots."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(2, 3, figsize=(12, 6.2), constrained_layout=True)
    for axis, (title, unit, names) in zip(axes.flat, PANELS, strict=True):
        for number, records in enumerate(runs):
            colour, of_run = COLOURS[number % len(COLOURS)], f", run {number + 1}" if len(runs) > 1 else ""
            for name in names:
                points = [(record["step"] + 1, record[name]) for record in records if name in record]
                if not points:
                    continue
                steps, values = [p[0] for p in points], [p[1] for p in points]
                if name.startswith("val_"):
                    axis.plot(steps, values, "o--", color=colour if of_run else "#b3541e", label=f"held-out{of_run}")
                    continue
                axis.plot(steps, values, color=colour, alpha=0.3, linewidth=1)
                windows = [values[max(0, i - WINDOW + 1) : i + 1] for i in range(len(values))]
                smooth = [sum(window) / len(window) for window in windows]
                axis.plot(steps, smooth, color=colour, linewidth=2, label=f"training (mean of {WINDOW} steps){of_run}")
        axis.set(title=title, ylabel=unit, xlabel="step")
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    axes.flat[0].legend(frameon=False, fontsize=8 if len(runs) == 1 else 6)
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=130)
    plt.close(figure)


def rise(first: Sequence[float], last: Sequence[float]) -> tuple[float, float]:
    """Difference of the means, and twice its standard error (Welch); it rose if the first exceeds the second. At least two values each."""
    error = math.sqrt(statistics.variance(first) / len(first) + statistics.variance(last) / len(last))
    return statistics.fmean(last) - statistics.fmean(first), 2 * error


def prompt_rewards(run_dir: Path, steps: range) -> list[float]:
    """Mean reward of each prompt of these steps, from the rollouts on disk; a prompt that comes again counts again."""
    from convsearch.runs.rollouts import load

    means: list[float] = []
    for step in steps:
        groups: dict[str, list[float]] = {}
        for rollout in load(run_dir, step):
            groups.setdefault(rollout.qid, []).append(rollout.reward)
        means += map(statistics.fmean, groups.values())
    return means


def verdict(run_dir: Path, records: Sequence[dict[str, Any]]) -> str:
    """One line; a run of less than six steps is too short to be judged."""
    total = 1 + max(record["step"] for record in records)
    third = total // 3
    if third < 2:
        return f"{run_dir}: {total} steps are too few to say whether the reward rose"
    first, last = prompt_rewards(run_dir, range(third)), prompt_rewards(run_dir, range(total - third, total))
    difference, twice = rise(first, last)
    word = "rose" if difference > twice else "fell" if -difference > twice else "is not told apart"
    held_out = [record["val_reward"] for record in records if "val_reward" in record]
    return (
        f"{run_dir}: reward of the first and last {third} steps {statistics.fmean(first):.2f} and {statistics.fmean(last):.2f} "
        f"({len(first)} and {len(last)} prompts), difference {difference:+.2f} ± {twice:.2f} (two standard errors): {word}"
        + (f"; held-out {' -> '.join(f'{value:.2f}' for value in held_out)}" if held_out else "")
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m convsearch.plots", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "run", nargs="+", type=Path, help="run folder of convsearch.grpo; several are drawn into the same panels"
    )
    parser.add_argument("--output", required=True, type=Path, help="PNG or PDF to write")
    args = parser.parse_args()
    from convsearch.runs.tracking import read_metrics

    runs = [read_metrics(folder) for folder in args.run]
    for folder, records in zip(args.run, runs, strict=True):
        if not any(record["step"] >= 0 for record in records):
            raise ValueError(f"{folder}: no metrics.jsonl with a finished step")
    draw(runs, args.output)
    print(f"curves of {' + '.join(str(len(records)) for records in runs)} records: {args.output}")
    for folder, records in zip(args.run, runs, strict=True):
        print(verdict(folder, records))
