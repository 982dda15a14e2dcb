"""Completions -> parsed, ranked, compared, rewarded: what a GRPO step and its validation ask of a retriever and of ``rewards``."""

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

from convsearch.config.grpo import RewardConfig
from convsearch.parsing import PARSERS
from convsearch.rewards.shapes import reward
from convsearch.types import Completion, Example, Rewrite

SCORERS = 8  # requests to the judge that are under way at once


class Judge(Protocol):
    """Who knows how good a text is; ``convsearch.retriever.client.RetrieverClient`` asks a server, ``convsearch.runs.rollouts.Replay`` a dump."""

    def gold_ranks(self, golds: Sequence[Sequence[str]], queries: Sequence[str | None]) -> list[int | None]:
        """1-based rank of each query's best gold passage, None beyond the depth and where there is no query."""

    def similarity_gains(
        self,
        outputs: Sequence[str | None],
        questions: Sequence[str],
        positives: Sequence[Sequence[str]],
        golds: Sequence[Sequence[str]],
    ) -> list[float | None]:
        """Mean over the positives d of cos(output, d) - cos(question, d), None where there is no output; the gold passages stand in for
        positives where there are none."""


@dataclass(frozen=True, slots=True)
class Score:
    """All that is known of one sample. ``Score(Rewrite("who wrote Hamlet?", None), rank=1, gain=None, reward=2.0)``"""

    rewrite: Rewrite
    rank: int | None
    gain: float | None  # None where similarities have no weight
    reward: float


def score(
    cfg: RewardConfig,
    judge: Judge,
    examples_N: Sequence[Example],
    completions_N: Sequence[Completion],
    progress: float = 0.0,
) -> list[Score]:
    """One score a completion, in batches as large as the rollout; ``progress`` is the share of the training steps done."""
    rewrites_N = [PARSERS[cfg.form](completion.text, completion.finish_reason) for completion in completions_N]
    texts_N = [rewrite.text for rewrite in rewrites_N]
    golds_N = [example.gold_docids for example in examples_N]
    ranks_N = judge.gold_ranks(golds_N, texts_N)
    gains_N: list[float | None] = [None] * len(texts_N)
    if cfg.weights[1]:
        questions_N = [example.question for example in examples_N]
        gains_N = judge.similarity_gains(texts_N, questions_N, [example.positives for example in examples_N], golds_N)
    return [
        Score(rewrite, rank, gain, rewarded(cfg, example, rewrite, rank, gain, progress))
        for example, rewrite, rank, gain in zip(examples_N, rewrites_N, ranks_N, gains_N, strict=True)
    ]


def score_stream(
    cfg: RewardConfig,
    judge: Judge,
    examples_P: Sequence[Example],
    parts: Iterable[tuple[list[int], list[Completion]]],
    progress: float = 0.0,
    sampled: Callable[[], None] = lambda: None,
) -> list[tuple[Completion, Score]]:
    """Every completion with its score, group-major; each part is scored as soon as it comes, while the others are still being generated.

    Args:
        parts: (places among the examples, their completions), each place once; see ``convsearch.sampling.hf.Sampler.stream``.
        sampled: called when the last part has come.
    """
    under_way: list[tuple[list[int], list[Completion], Future[list[Score]]]] = []
    pool = ThreadPoolExecutor(SCORERS)
    try:
        for places, completions in parts:
            n = len(completions) // len(places)
            examples = [examples_P[p] for p in places for _ in range(n)]
            under_way.append((places, completions, pool.submit(score, cfg, judge, examples, completions, progress)))
        sampled()
        groups: dict[int, list[tuple[Completion, Score]]] = {}
        for places, completions, future in under_way:
            pairs = list(zip(completions, future.result(), strict=True))
            n = len(pairs) // len(places)
            groups |= {p: pairs[i * n : (i + 1) * n] for i, p in enumerate(places)}
    finally:
        pool.shutdown(wait=False, cancel_futures=True)  # after an error nobody waits for the other answers
    assert sorted(groups) == list(range(len(examples_P))), "a stream must bring every prompt once"
    return [pair for p in range(len(examples_P)) for pair in groups[p]]


def rewarded(
    cfg: RewardConfig, example: Example, rewrite: Rewrite, rank: int | None, gain: float | None, progress: float
) -> float:
    """One number, as configured."""
    rank_weight, similarity_weight = cfg.weights
    return reward(
        rewrite,
        rank,
        gain,
        shape=cfg.name,
        rank_weight=rank_weight,
        similarity_weight=similarity_weight,
        format_penalty=cfg.format_penalty,
        language_guard=cfg.language_guard_share if cfg.language_guard else None,
        question=example.question,
        progress=progress,
    )
