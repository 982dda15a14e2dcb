"""Curves of a GRPO run: ``python -m convsearch.plots RUN_FOLDER --output curves.png``."""

import argparse
from pathlib import Path
from typing import Any

from convsearch.cli import run

PANELS = (
    ("reward", "reward a sample", ("reward", "val_reward")),
    ("KL to the reference", "nats a token", ("kl",)),
    ("response length", "tokens", ("response_tokens",)),
    ("format rate", "share of samples", ("format_rate", "val_format_rate")),
    ("reciprocal rank", "mean", ("mrr", "val_mrr")),
    ("groups that teach", "share with differing rewards", ("spread_rate",)),
)


def draw(records: list[dict[str, Any]], output: Path) -> None:
    """Six panels over the steps: the raw values thin, a running mean of five steps thick, validation as dots."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(2, 3, figsize=(12, 6.2), constrained_layout=True)
    for axis, (title, unit, names) in zip(axes.flat, PANELS, strict=True):
        for name in names:
            points = [(record["step"] + 1, record[name]) for record in records if name in record]
            if not points:
                continue
            steps, values = [p[0] for p in points], [p[1] for p in points]
            if name.startswith("val_"):
                axis.plot(steps, values, "o--", color="#b3541e", label="held-out")
                continue
            axis.plot(steps, values, color="#1f5f99", alpha=0.3, linewidth=1)
            smooth = [sum(values[max(0, i - 4) : i + 1]) / len(values[max(0, i - 4) : i + 1]) for i in range(len(values))]
            axis.plot(steps, smooth, color="#1f5f99", linewidth=2, label="training (mean of 5 steps)")
        axis.set(title=title, ylabel=unit, xlabel="step")
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    axes.flat[0].legend(frameon=False, fontsize=8)
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m convsearch.plots", description=__doc__)
    parser.add_argument("run", help="run folder of convsearch.grpo")
    parser.add_argument("--output", required=True, help="PNG or PDF to write")
    args = parser.parse_args()
    from convsearch.tracking import read_metrics

    records = read_metrics(Path(args.run))
    if not records:
        raise ValueError(f"{args.run}: no metrics.jsonl with a finished step")
    draw(records, Path(args.output))
    print(f"curves of {len(records)} steps: {args.output}")


if __name__ == "__main__":
    run(main)
