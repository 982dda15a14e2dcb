"""The retriever's feedback -> reward. Pure functions.

An output that does not parse gets the format penalty INSTEAD of a rank reward (arXiv 2505.15776, section 3.3). A dead
server is an exception in the client, never a reward.
"""

import math
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from convsearch.config.grpo import RewardConfig
from convsearch.types import Rewrite

DEPTH: Final = 100  # ranks beyond it earn nothing; the published shapes are defined for it
SIMILARITY_SCALE: Final = 10  # arXiv 2506.11603, section 3: cosines of similar texts differ by little
SIMILARITY = "similarity_gain"  # the shape that ignores ranks

RankReward = Callable[[int | None], float]


@dataclass(frozen=True, slots=True)
class Feedback:
    """What a retriever says of one text: the signals that a reward can pay for. ``Feedback(rank=3)``"""

    rank: int | None = None  # 1-based, of the best gold passage; None beyond the retriever's depth
    gain: float | None = None  # mean over the positives d of cos(output, d) - cos(question, d); None if not asked for


def rank_incentive(rank: int | None) -> float:
    """The paper's piecewise-linear shape: ranks 1..10 -> 2 to 1, ranks 11..100 -> just under 1 to 0, beyond: 0."""
    if rank is None or rank > DEPTH:
        return 0.0
    return 19 / 9 - rank / 9 if rank <= 10 else 10 / 9 - rank / 90


def reciprocal(rank: int | None) -> float:
    """1/r, the ablation's first alternative; 0 beyond the depth."""
    return 0.0 if rank is None or rank > DEPTH else 1 / rank


def exponential(rank: int | None) -> float:
    """e^(1-r), the ablation's second alternative; 0 beyond the depth."""
    return 0.0 if rank is None or rank > DEPTH else math.exp(1 - rank)


def mrr(rank: int | None) -> float:
    """The metric itself as the reward: the same number as ``reciprocal``, under the metric's name."""
    return reciprocal(rank)


def ndcg_at_3(rank: int | None) -> float:
    """NDCG@3 of a ranking whose single relevant passage is at r: 1/log2(1+r) for r <= 3, else 0."""
    return 0.0 if rank is None or rank > 3 else 1 / math.log2(1 + rank)


def curriculum(rank: int | None, progress: float) -> float:
    """The reference code's curriculum: linear to rank 100 in the first quarter of training, then to rank 10.

    Args:
        progress: share of the training steps done, 0 to 1.
    """
    if rank is None or rank > DEPTH:
        return -0.2
    if progress < 0.25 or rank <= 10:
        return 1 - (rank - 1) / 99
    return 0.0


SHAPES: Final[dict[str, RankReward]] = {
    "rank_incentive": rank_incentive,
    "reciprocal": reciprocal,
    "exponential": exponential,
    "mrr": mrr,
    "ndcg@3": ndcg_at_3,
}


def non_latin_share(text: str) -> float:
    """Share of the letters of ``text`` that are not Latin; 0 if it has no letters."""
    if text.isascii():  # fast path: nearly every text is, and every sample of a step is checked
        return 0.0
    letters = [char for char in text if char.isalpha()]
    foreign = sum(not unicodedata.name(char, "").startswith("LATIN") for char in letters)
    return foreign / len(letters) if letters else 0.0


def signals_of(cfg: RewardConfig) -> frozenset[str]:
    """The fields of ``Feedback`` that the reward needs; the rank is always watched."""
    return frozenset({"rank", "gain"} if cfg.weights[1] else {"rank"})


def reward(rewrite: Rewrite, feedback: Feedback, cfg: RewardConfig, question: str = "", progress: float = 0.0) -> float:
    """The reward of one sample: rank_weight x shape(rank) + similarity_weight x 10 x gain.

    An output that does not parse gets the format penalty instead of all else. With the language guard, so does a
    rewrite whose share of non-Latin letters is too far above that of ``question``: users of the published recipe report
    a drift into other scripts.

    Args:
        progress: share of the training steps done, 0 to 1; only the curriculum shape uses it.
    """
    if rewrite.text is None:
        return cfg.format_penalty
    if cfg.language_guard:
        drift = non_latin_share(rewrite.text) - non_latin_share(question)
        if drift > cfg.language_guard_share:
            return cfg.format_penalty
    rank_weight, similarity_weight = cfg.weights
    total = 0.0
    if cfg.name != SIMILARITY:
        rank = feedback.rank
        total += rank_weight * (curriculum(rank, progress) if cfg.name == "curriculum" else SHAPES[cfg.name](rank))
    if similarity_weight:
        assert feedback.gain is not None
        total += similarity_weight * SIMILARITY_SCALE * feedback.gain
    return total
