"""Our rewards for other trainers: TRL's ``reward_funcs`` and verl's ``custom_reward_function`` (docs/extend.md).

    GRPOTrainer(..., reward_funcs=RetrievalReward("http://127.0.0.1:8000"))                           # TRL
    custom_reward_function.path=convsearch/interop.py custom_reward_function.name=compute_score      # verl

Both read the rows that data_preprocess writes (``reward_model.ground_truth``, ``extra_info.question``), ask the same
server and compute the same rewards as ``convsearch.grpo``. A server that does not answer is an error, never a reward of
zero. Free of torch, so that any environment can import it.
"""

import os
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from convsearch.config.grpo import RewardConfig
from convsearch.retriever.client import RetrieverClient
from convsearch.rewards.scoring import Score, score
from convsearch.types import Completion, Example


class RetrievalReward:
    """A reward function for ``trl.GRPOTrainer``: completions -> rewards, a whole batch in one request.

    Args:
        url: the retrieval server; empty: $RETRIEVER_URL.
        depth: a gold passage below this rank earns nothing.
        index: which of the server's indexes; None is its first.
        options: fields of ``RewardConfig`` (``name="mrr"``, ``form="text"``, ...); default: the paper's reward.

    Raises:
        ValueError: there is no url, or an option is wrong.
    """

    def __init__(self, url: str = "", depth: int = 100, index: str | None = None, **options: Any):
        url = url or os.environ.get("RETRIEVER_URL", "")
        if not url:
            raise ValueError("no retrieval server is named: give url=http://HOST:PORT or set RETRIEVER_URL")
        self.config = RewardConfig(**options)
        self.client = RetrieverClient(url, depth, index=index)
        self.__name__ = f"retrieval_{self.config.name}"  # its name in TRL's logs

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float]:
        """One reward per completion.

        Args:
            completions: texts, or chats whose last message is the output.
            columns: of the data set: ``reward_model`` with ``ground_truth``, or ``gold_docids``; ``extra_info`` with
                ``question``, or ``question``.
        """
        texts = [
            completion if isinstance(completion, str) else str(completion[-1]["content"]) for completion in completions
        ]
        truths = columns.get("gold_docids") or [row["ground_truth"] for row in _column(columns, "reward_model")]
        infos: Sequence[Mapping[str, Any]] = columns.get("extra_info") or [{} for _ in texts]
        questions = columns.get("question") or [str(info.get("question") or "") for info in infos]
        return [found.reward for found in self.scores(texts, truths, questions, infos)]

    def scores(
        self, texts: Sequence[str], truths: Sequence[Any], questions: Sequence[str], infos: Sequence[Mapping[str, Any]]
    ) -> list[Score]:
        """Parsed, judged and rewarded as in ``convsearch.grpo``."""
        examples = [
            Example("", (), question, _golds(truth), tuple(map(str, info.get("positives") or ())))
            for truth, question, info in zip(truths, questions, infos, strict=True)
        ]
        # Other trainers do not say why a text ended. A text that was cut lacks its last tag, so it does not parse.
        return score(self.config, self.client, examples, [Completion((), (), text, "stop") for text in texts])


def compute_score(
    data_source: str, solution_str: str, ground_truth: Any, extra_info: Mapping[str, Any] | None = None, **options: Any
) -> dict[str, Any]:
    """verl's custom reward function for one output (reward managers ``naive`` and ``dapo``).

    ``custom_reward_function.reward_kwargs`` are the arguments of ``RetrievalReward``; without ``url``, $RETRIEVER_URL
    is the server's address.

    Returns:
        ``score``, which verl optimises, and what it also logs: ``rank`` (0: not found), ``reciprocal_rank``,
        ``well_formed``.
    """
    return compute_scores([data_source], [solution_str], [ground_truth], [extra_info or {}], **options)[0]


def compute_scores(
    data_sources: Sequence[str],
    solution_strs: Sequence[str],
    ground_truths: Sequence[Any],
    extra_infos: Sequence[Mapping[str, Any]],
    **options: Any,
) -> list[dict[str, Any]]:
    """The same for a batch in one request (reward manager ``batch``)."""
    names = {"url", "depth", "index", *RewardConfig.model_fields}
    known = {name: value for name, value in options.items() if name in names}
    questions = [str(info.get("question") or "") for info in extra_infos]
    found = _shared(tuple(sorted(known.items()))).scores(solution_strs, ground_truths, questions, extra_infos)
    return [
        {
            "score": one.reward,
            "rank": one.feedback.rank or 0,
            "reciprocal_rank": 1 / one.feedback.rank if one.feedback.rank else 0.0,
            "well_formed": float(one.rewrite.error is None),
        }
        for one in found
    ]


@lru_cache(maxsize=8)
def _shared(options: tuple[tuple[str, Any], ...]) -> RetrievalReward:
    """One client per process and set of options: verl calls the function once per output."""
    return RetrievalReward(**dict(options))


def _golds(truth: Any) -> tuple[str, ...]:
    return (truth,) if isinstance(truth, str) else tuple(map(str, truth))


def _column(columns: Mapping[str, Any], name: str) -> Any:
    if name not in columns:
        found = ", ".join(sorted(columns)) or "none"
        raise ValueError(f"the data set has neither a column 'gold_docids' nor '{name}'; it has {found}")
    return columns[name]
