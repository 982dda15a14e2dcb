"""Every step's rollouts on disk, and a sampler and retriever that replay them.

``<run>/rollouts/000012.parquet`` has one row per sample in group-major order. A replay trains without a sampler or a
retriever, which separates a fault of the trainer from one of the sampling.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from convsearch.files import atomic_write
from convsearch.parquet import open_parquet
from convsearch.rewards.scoring import Group, Rollout, Score
from convsearch.rewards.shapes import Feedback
from convsearch.sampling.base import Finished, Prompt, WeightSource
from convsearch.types import Completion, Example, Rewrite

_TYPES: dict[Any, pa.DataType] = {int | None: pa.int32(), float | None: pa.float64()}  # of the retriever's signals
REMEDY = "the steps before it can be replayed"
SCHEMA = pa.schema(
    [
        ("step", pa.int32()),
        ("qid", pa.string()),
        ("prompt_ids", pa.list_(pa.int32())),
        ("token_ids", pa.list_(pa.int32())),
        ("logprobs", pa.list_(pa.float32())),
        ("text", pa.string()),
        ("finish_reason", pa.string()),
        ("weights_version", pa.int32()),
        ("rewrite", pa.string()),
        ("error", pa.string()),
        *((signal.name, _TYPES[signal.type]) for signal in fields(Feedback)),
        ("reward", pa.float64()),
        ("advantage", pa.float64()),
        ("trained", pa.bool_()),
    ]
)


def path_of(run_dir: Path, step: int) -> Path:
    return run_dir / "rollouts" / f"{step:06d}.parquet"


def dump(run_dir: Path, step: int, groups_P: Sequence[Group]) -> None:
    """Writes the rollouts of a step, whole or not at all."""
    rows = [_row(step, rollout) for group in groups_P for rollout in group.rollouts]
    with atomic_write(path_of(run_dir, step), "wb") as file:
        pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), file, compression="zstd", write_page_checksum=True)


def load(run_dir: Path, step: int) -> list[Rollout]:
    """The rollouts of a step as dumped (log-probs in float32); of the examples only ``qid``, ``prompt_ids``.

    Raises:
        ValueError: there is no dump of that step.
    """
    path = path_of(run_dir, step)
    if not path.is_file():
        raise ValueError(f"{path}: no rollouts of step {step} to replay")
    with open_parquet(path, REMEDY) as file:
        if not file.schema_arrow.equals(SCHEMA):
            raise ValueError(f"{path}: not the columns of rollouts, or damaged; {REMEDY}")
        return [_rollout(row) for row in file.read().to_pylist()]


def table(groups_P: Sequence[Group], most: int = 4) -> list[dict[str, Any]]:
    """The best and the worst sample of the first ``most`` groups, for people to read."""
    rows = []
    for group in groups_P[:most]:
        best, worst = max(group.rollouts, key=_reward), min(group.rollouts, key=_reward)
        for which, chosen in (("best", best), ("worst", worst)):
            rank, rewrite = chosen.score.feedback.rank, chosen.score.rewrite
            rows.append(
                {
                    "query": chosen.example.qid,
                    "sample": which,
                    "reward": round(chosen.score.reward, 4),
                    "rank": "-" if rank is None else str(rank),
                    "rewrite": rewrite.text or f"({rewrite.error})",
                    "output": chosen.completion.text[:2000],
                }
            )
    return rows


def _reward(rollout: Rollout) -> float:
    return rollout.score.reward


def _row(step: int, rollout: Rollout) -> dict[str, Any]:
    completion, score = rollout.completion, rollout.score
    return {
        "step": step,
        "qid": rollout.example.qid,
        "prompt_ids": rollout.example.prompt_ids,
        "token_ids": completion.token_ids,
        "logprobs": completion.logprobs,
        "text": completion.text,
        "finish_reason": completion.finish_reason,
        "weights_version": completion.weights_version,
        "rewrite": score.rewrite.text,
        "error": score.rewrite.error,
        **asdict(score.feedback),
        "reward": score.reward,
        "advantage": rollout.advantage,
        "trained": rollout.trained,
    }


def _rollout(row: dict[str, Any]) -> Rollout:
    example = Example(row["qid"], (), "", (), prompt_ids=tuple(row["prompt_ids"]))
    ids, logprobs = tuple(row["token_ids"]), tuple(row["logprobs"])
    completion = Completion(ids, logprobs, row["text"], row["finish_reason"], row["weights_version"])
    feedback = Feedback(**{signal.name: row[signal.name] for signal in fields(Feedback)})
    score = Score(Rewrite(row["rewrite"], row["error"]), feedback, row["reward"])
    return Rollout(example, completion, score, row["advantage"], row["trained"])


class Replay:
    """A sampler and a retriever in one that return what a run has dumped, step by step and request by request."""

    def __init__(self, run_dir: Path, first_step: int):
        self.run_dir, self.step = run_dir, first_step
        self.rollouts_N: list[Rollout] = []  # of the last request
        self.rest_N: list[Rollout] | None = None  # of the step's further requests; None: no request yet

    def generate(self, prompts: Sequence[Prompt], n: int, seed: int) -> list[list[Completion]]:
        rest_N = load(self.run_dir, self.step) if self.rest_N is None else self.rest_N
        size = len(prompts) * n
        self.rollouts_N, self.rest_N = rest_N[:size], rest_N[size:]
        dumped = [rollout.example.prompt_ids for rollout in self.rollouts_N]
        self._check(dumped == [tuple(prompt) for prompt in prompts for _ in range(n)])
        completions = [rollout.completion for rollout in self.rollouts_N]
        return [completions[start : start + n] for start in range(0, len(completions), n)]

    def _check(self, same: bool) -> None:
        if not same:
            path = path_of(self.run_dir, self.step)
            raise ValueError(
                f"{path} holds other prompts than this run draws: same data, seed and batch sizes are needed"
            )

    def stream(self, prompts: Sequence[Prompt], n: int, seed: int) -> Iterator[Finished]:
        """All groups in one batch: the ranks are those of the whole request."""
        yield dict(enumerate(self.generate(prompts, n, seed)))

    def load_weights(self, source: WeightSource, version: int) -> None:
        """The samples are fixed; new weights begin a step."""
        self._check(not self.rest_N)
        self.step, self.rest_N = version, None

    def feedback(
        self, examples_N: Sequence[Example], texts_N: Sequence[str | None], signals: Collection[str]
    ) -> list[Feedback]:
        assert len(texts_N) == len(self.rollouts_N)
        found = [rollout.score.feedback for rollout in self.rollouts_N]
        parsed = [one for text, one in zip(texts_N, found, strict=True) if text is not None]
        for signal in set(signals) - {"rank"}:  # a rank may be None: beyond the depth
            if any(getattr(one, signal) is None for one in parsed):
                path = path_of(self.run_dir, self.step)
                raise ValueError(f"{path} has no {signal} to replay: that run did not pay for it")
        return found
