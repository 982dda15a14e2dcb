"""BRIGHT's tasks, the published rows, and the table that shows results below them."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval.tables import aligned

PUBLISHED: dict[str, Any] = json.loads(Path(__file__).with_name("bright_published.json").read_text(encoding="utf-8"))
TASKS: dict[str, str] = PUBLISHED["tasks"]  # as the data set calls them -> short name of the published tables


@dataclass(frozen=True, slots=True)
class Outcome:
    """One task: means of the measures (0..1) and what a reader has to know behind them."""

    means: Mapping[str, float]
    notes: str


def table(outcomes: Mapping[str, Outcome], label: str) -> str:
    """nDCG@10 by task and their mean in percent, below the published rows (their mean is over the same tasks).

    The other measures follow, one line each.
    """

    def row(name: str, values: Sequence[float]) -> list[str]:
        mean = [sum(values) / len(values)] if len(values) > 1 else []
        return [name, *(f"{value:.1f}" for value in [*values, *mean])]

    measures = list(next(iter(outcomes.values())).means)
    lead = "nDCG@10" if "nDCG@10" in measures else measures[0]
    rows = [[lead, *(TASKS[task] for task in outcomes), *(["mean"] if len(outcomes) > 1 else [])]]
    if lead == "nDCG@10":
        for name, values in PUBLISHED["rows"].items():
            figures = dict(zip(TASKS, values, strict=True))
            rows.append(row(f"{name} (published)", [figures[task] for task in outcomes]))
    for measure in [lead, *(other for other in measures if other != lead)]:
        values = [100 * outcome.means[measure] for outcome in outcomes.values()]
        rows.append(row(label if measure == lead else measure, values))
    width = max(26, 2 + max(len(name) for name, *_ in rows))
    return aligned(rows, least=(width, *[7] * len(rows[0])), gap="")
