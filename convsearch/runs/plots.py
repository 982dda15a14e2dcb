"""Curves of GRPO runs, and the rule by which a reward is said to have risen."""

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib import pyplot as plt

from convsearch.runs.rollouts import load

matplotlib.use("Agg")

PANELS = (
    ("reward", "reward per sample", ("reward", "val_reward")),
    ("KL to the reference", "nats per token", ("kl",)),
    ("response length", "tokens", ("response_tokens",)),
    ("format rate", "share of samples", ("format_rate", "val_format_rate")),
    ("reciprocal rank", "mean", ("mrr", "val_mrr")),
    ("groups with spread", "share with differing rewards", ("spread_rate",)),
)
COLOURS = ("#1f5f99", "#2e8b57", "#8a4fa3", "#a8761c")
WINDOW = 5  # steps of the running mean


def draw(runs: Sequence[list[dict[str, Any]]], output: Path) -> None:
    """Six panels over the steps, a colour per run: thin raw values, thick means of five steps, dots for validation."""
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
    """(difference of the means, twice its standard error (Welch)): it rose if the first exceeds the second."""
    error = math.sqrt(statistics.variance(first) / len(first) + statistics.variance(last) / len(last))
    return statistics.fmean(last) - statistics.fmean(first), 2 * error


def prompt_rewards(run_dir: Path, steps: range) -> list[float]:
    """Mean reward of each prompt of these steps, from the rollouts on disk; a repeated prompt counts again."""
    means: list[float] = []
    for step in steps:
        groups: dict[str, list[float]] = {}
        for rollout in load(run_dir, step):
            groups.setdefault(rollout.example.qid, []).append(rollout.score.reward)
        means += map(statistics.fmean, groups.values())
    return means


def verdict(run_dir: Path, records: Sequence[dict[str, Any]]) -> str:
    """One line about a run; less than six steps are too few to judge."""
    total = 1 + max(record["step"] for record in records)
    third = total // 3
    if third < 2:
        return f"{run_dir}: {total} steps are too few to say whether the reward rose"
    first, last = prompt_rewards(run_dir, range(third)), prompt_rewards(run_dir, range(total - third, total))
    difference, twice = rise(first, last)
    word = "rose" if difference > twice else "fell" if -difference > twice else "no significant change"
    held_out = [record["val_reward"] for record in records if "val_reward" in record]
    means = f"{statistics.fmean(first):.2f} and {statistics.fmean(last):.2f}"
    prompts = f"{len(first)} and {len(last)} prompts"
    curve = f"; held-out {' -> '.join(f'{value:.2f}' for value in held_out)}" if held_out else ""
    return (
        f"{run_dir}: reward of the first and last {third} steps {means} ({prompts}), "
        f"difference {difference:+.2f} ± {twice:.2f} (two standard errors): {word}{curve}"
    )
