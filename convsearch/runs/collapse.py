"""The collapse guard: compares the metrics of a run, over a window of steps, with limits.

Users of the published recipe report a collapse into gibberish after 270 to 300 steps: the format breaks, the reward
falls, responses get much longer or shorter, or other scripts appear. The metrics show all of this long before a person
looks at them.
"""

import math
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from convsearch.config.guard import GuardConfig


@dataclass(slots=True)
class Watched:
    """One metric over the last ``window`` steps, and the best window so far."""

    window: int
    values: deque[tuple[int, float]] = field(default_factory=deque)
    best: float = -math.inf
    best_step: int = -1  # the last step of the best window

    def add(self, step: int, value: float) -> None:
        self.values.append((step, value))
        if len(self.values) > self.window:
            self.values.popleft()
        if self.full and self.mean > self.best:
            self.best, self.best_step = self.mean, step

    @property
    def full(self) -> bool:
        return len(self.values) == self.window

    @property
    def mean(self) -> float:
        return sum(value for _, value in self.values) / len(self.values)

    @property
    def span(self) -> str:
        return f"over steps {self.values[0][0]} - {self.values[-1][0]}"


# Metric, key of its lower limit, key of its upper limit (section ``guard`` of the configuration).
LIMITS = (
    ("reward", "min_reward", None),
    ("format_rate", "min_format_rate", None),
    ("response_tokens", "min_response_tokens", "max_response_tokens"),
    ("kl", None, "max_kl"),
    ("non_latin_share", None, "max_non_latin_share"),
)


FIRST_SKIPPED = 3  # steps without a finite gradient from the start: the model or the learning rate is broken


class CollapseGuard:
    """Reads the metrics of each step; ``check`` returns what is wrong, or None.

    Args:
        cfg: the limits; None for a trainer without these metrics (SFT): only skipped steps are counted then.
        max_skipped: steps in a row without a finite gradient that end the run.
        history: the metrics of earlier steps, so that a resumed run is judged as an uninterrupted one.
    """

    def __init__(self, cfg: GuardConfig | None, max_skipped: int, history: Iterable[Mapping[str, Any]] = ()):
        self.cfg, self.max_skipped, self.skipped, self.learned = cfg, max_skipped, 0, False
        self.watched = {name: Watched(cfg.window) for name, _, _ in LIMITS} if cfg else {}
        for record in history:
            self._add(record["step"], record)

    def check(self, step: int, metrics: Mapping[str, float], last: bool = False) -> str | None:
        """Adds the metrics of a step. Returns a sentence with the value and the key of each limit that is crossed.

        A run that has never had a finite gradient ends after ``FIRST_SKIPPED`` steps, and one that has none in its last
        step does not end well.
        """
        self._add(step, metrics)
        most = 1 if last else self.max_skipped if self.learned else min(FIRST_SKIPPED, self.max_skipped)
        if self.skipped >= most:
            fault = f"the gradient was not finite in {self.skipped} steps in a row, up to step {step}"
            remedy = "no weight has changed since; lower the learning rate, or look at the data and the rollouts"
            return f"{fault} (trainer.max_skipped_steps={self.max_skipped}): {remedy}"
        if self.cfg is None:
            return None
        found = [self._fallen("reward", "max_reward_fall"), self._fallen("format_rate", "max_format_fall")]
        for name, low, high in LIMITS:
            found += [self._beyond(name, low, -1), self._beyond(name, high, 1)]
        return "; ".join(sentence for sentence in found if sentence) or None

    def _add(self, step: int, metrics: Mapping[str, Any]) -> None:
        if step < 0:  # the validation before the first step
            return
        self.skipped = self.skipped + 1 if metrics.get("skipped", 0.0) >= 1 else 0
        self.learned |= self.skipped == 0
        for name, watched in self.watched.items():
            value = metrics.get(name)
            if value is not None and math.isfinite(value):
                watched.add(step, value)

    def _limit(self, key: str | None) -> float | None:
        return getattr(self.cfg, key) if key else None

    def _beyond(self, name: str, key: str | None, sign: int) -> str | None:
        limit, watched = self._limit(key), self.watched[name]
        if limit is None or not watched.full or sign * (watched.mean - limit) <= 0:
            return None
        side = "above" if sign > 0 else "below"
        return f"{name} is {watched.mean:.4g} {watched.span}, {side} guard.{key}={limit:g}"

    def _fallen(self, name: str, key: str) -> str | None:
        limit, watched = self._limit(key), self.watched[name]
        if limit is None or not watched.full or watched.best - watched.mean <= limit:
            return None
        best = f"{watched.best:.4g} in the best window (up to step {watched.best_step})"
        return f"{name} fell to {watched.mean:.4g} {watched.span}, from {best}: more than guard.{key}={limit:g}"
