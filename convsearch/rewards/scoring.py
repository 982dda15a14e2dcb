"""Completions -> parsed, judged by the retriever, rewarded: what a GRPO step and its validation need."""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Protocol

from convsearch.config.grpo import RewardConfig
from convsearch.parsing import PARSERS
from convsearch.rewards.shapes import Feedback, reward, signals_of
from convsearch.types import Completion, Example, Rewrite

REQUESTS_AT_ONCE = 8  # to the retriever


class Retriever(Protocol):
    """Judges texts. ``RetrieverClient`` asks a server, ``convsearch.runs.rollouts.Replay`` reads a dump."""

    def feedback(
        self, examples_N: Sequence[Example], texts_N: Sequence[str | None], signals: Collection[str]
    ) -> list[Feedback]:
        """What each text is worth for its example; nothing is found for a text that is None (nothing parsed).

        Args:
            signals: the fields of ``Feedback`` to compute.
        """


@dataclass(frozen=True, slots=True)
class Score:
    """What one sample earned, and why. ``Score(Rewrite("who wrote Hamlet?", None), Feedback(rank=1), 2.0)``"""

    rewrite: Rewrite
    feedback: Feedback
    reward: float


@dataclass(frozen=True, slots=True)
class Rollout:
    """One sample with its score. ``advantage`` and ``trained`` (on) are set when the whole group is known."""

    example: Example
    completion: Completion
    score: Score
    advantage: float = 0.0
    trained: bool = True


@dataclass(frozen=True, slots=True)
class Group:
    """The n samples of one example, in the order of their numbers."""

    rollouts: tuple[Rollout, ...]

    @property
    def has_spread(self) -> bool:
        """Whether the rewards differ: only then does the group teach."""
        return len({rollout.score.reward for rollout in self.rollouts}) > 1

    @property
    def trained(self) -> tuple[Rollout, ...]:
        """The samples that the update learns from."""
        return tuple(rollout for rollout in self.rollouts if rollout.trained)


def score(
    cfg: RewardConfig,
    retriever: Retriever,
    examples_N: Sequence[Example],
    completions_N: Sequence[Completion],
    progress: float = 0.0,
) -> list[Score]:
    """One score per completion, in one batch. ``progress``: share of the training steps done, 0 to 1."""
    rewrites_N = [PARSERS[cfg.form](completion.text, completion.finish_reason) for completion in completions_N]
    feedback_N = retriever.feedback(examples_N, [rewrite.text for rewrite in rewrites_N], signals_of(cfg))
    return [
        Score(rewrite, feedback, reward(rewrite, feedback, cfg, example.question, progress))
        for example, rewrite, feedback in zip(examples_N, rewrites_N, feedback_N, strict=True)
    ]


def score_stream(
    cfg: RewardConfig,
    retriever: Retriever,
    examples_P: Sequence[Example],
    finished: Iterable[Mapping[int, Sequence[Completion]]],
    progress: float = 0.0,
    on_sampled: Callable[[], None] = lambda: None,
) -> list[Group]:
    """The scored group of every example. A batch is scored while the sampler generates the next one.

    Args:
        finished: batches of {position of the example: its completions}, each position once; see ``Sampler.stream``.
        on_sampled: called when the last batch has arrived.
    """
    batches: list[tuple[Mapping[int, Sequence[Completion]], Future[list[Rollout]]]] = []

    def judge(batch: Mapping[int, Sequence[Completion]]) -> list[Rollout]:
        examples = [examples_P[p] for p, completions in batch.items() for _ in completions]
        flat = [completion for completions in batch.values() for completion in completions]
        return list(map(Rollout, examples, flat, score(cfg, retriever, examples, flat, progress)))

    pool = ThreadPoolExecutor(REQUESTS_AT_ONCE)
    try:
        for batch in finished:
            batches.append((batch, pool.submit(judge, batch)))
        on_sampled()
        groups: dict[int, Group] = {}
        for batch, future in batches:
            rollouts = iter(future.result())
            groups |= {p: Group(tuple(islice(rollouts, len(completions)))) for p, completions in batch.items()}
    finally:
        pool.shutdown(wait=False, cancel_futures=True)  # after an error nobody waits for the other requests
    assert sorted(groups) == list(range(len(examples_P))), "a stream must contain every prompt once"
    return [groups[p] for p in range(len(examples_P))]
