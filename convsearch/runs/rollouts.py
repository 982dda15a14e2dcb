"""Every step's rollouts on disk, and a sampler and retriever that play them back.

``<run>/rollouts/000012.parquet`` holds one row a sample in group-major order. Replaying them trains without a sampler or a retriever, which
separates a fault of the trainer from one of the sampling.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from convsearch.files import atomic_write
from convsearch.types import Completion, Rewrite, Rollout

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
        ("rank", pa.int32()),
        ("reward", pa.float64()),
        ("advantage", pa.float64()),
        ("gain", pa.float64()),
    ]
)


def path_of(run_dir: Path, step: int) -> Path:
    return run_dir / "rollouts" / f"{step:06d}.parquet"


def dump(run_dir: Path, step: int, rollouts_N: Sequence[Rollout]) -> None:
    """Writes the rollouts of a step, whole or not at all."""
    rows = [
        {
            "step": step,
            "qid": rollout.qid,
            "prompt_ids": rollout.prompt_ids,
            "token_ids": rollout.completion.token_ids,
            "logprobs": rollout.completion.logprobs,
            "text": rollout.completion.text,
            "finish_reason": rollout.completion.finish_reason,
            "weights_version": rollout.completion.weights_version,
            "rewrite": rollout.rewrite.text,
            "error": rollout.rewrite.error,
            "rank": rollout.rank,
            "reward": rollout.reward,
            "advantage": rollout.advantage,
            "gain": rollout.gain,
        }
        for rollout in rollouts_N
    ]
    with atomic_write(path_of(run_dir, step), "wb") as file:
        pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), file, compression="zstd")


def load(run_dir: Path, step: int) -> list[Rollout]:
    """Reads the rollouts of a step back, equal to what was dumped (log-probs in float32).

    Raises:
        ValueError: there is no dump of that step.
    """
    path = path_of(run_dir, step)
    if not path.is_file():
        raise ValueError(f"{path}: no rollouts of step {step} to replay")
    return [_rollout(row) for row in pq.read_table(path).to_pylist()]


def lengths(run_dir: Path, step: int) -> list[tuple[int, int]]:
    """(prompt, response) tokens of every sample of a step, without reading more of the dump than that."""
    columns = pq.read_table(path_of(run_dir, step), columns=["prompt_ids", "token_ids"])
    sizes = [pc.list_value_length(columns[name]).to_pylist() for name in ("prompt_ids", "token_ids")]
    return list(zip(*sizes, strict=True))


def table(run_dir: Path, step: int, n: int, groups: int = 4) -> list[dict[str, Any]]:
    """The best and the worst sample of the first ``groups`` groups of ``n``, for a person to read."""
    loaded, rows = load(run_dir, step)[: groups * n], []
    for start in range(0, len(loaded), n):
        group = loaded[start : start + n]
        for which, chosen in (("best", max(group, key=_reward)), ("worst", min(group, key=_reward))):
            rows.append(
                {
                    "query": chosen.qid,
                    "sample": which,
                    "reward": round(chosen.reward, 4),
                    "rank": "-" if chosen.rank is None else str(chosen.rank),
                    "rewrite": chosen.rewrite.text or f"({chosen.rewrite.error})",
                    "output": chosen.completion.text[:2000],
                }
            )
    return rows


def _reward(rollout: Rollout) -> float:
    return rollout.reward


def _rollout(row: dict[str, Any]) -> Rollout:
    completion = Completion(
        tuple(row["token_ids"]), tuple(row["logprobs"]), row["text"], row["finish_reason"], row["weights_version"]
    )
    rewrite = Rewrite(row["rewrite"], row["error"])  # below, dumps of older runs have no gain
    return Rollout(
        row["qid"],
        tuple(row["prompt_ids"]),
        completion,
        rewrite,
        row["rank"],
        row["reward"],
        row["advantage"],
        row.get("gain"),
    )


class Replay:
    """A sampler and a retriever in one that give back what a run has dumped, step by step."""

    def __init__(self, run_dir: Path, first_step: int):
        self.run_dir, self.step = run_dir, first_step
        self.rollouts_N: list[Rollout] = []

    def generate(self, prompts: Sequence[tuple[int, ...]], n: int, seed: int) -> list[Completion]:
        self.rollouts_N = load(self.run_dir, self.step)
        if [rollout.prompt_ids for rollout in self.rollouts_N] != [
            tuple(prompt) for prompt in prompts for _ in range(n)
        ]:
            raise ValueError(
                f"{path_of(self.run_dir, self.step)} holds other prompts than this run draws: same data, seed and batch sizes are needed"
            )
        self.step += 1
        return [rollout.completion for rollout in self.rollouts_N]

    def stream(
        self, prompts: Sequence[tuple[int, ...]], n: int, seed: int
    ) -> Iterator[tuple[list[int], list[Completion]]]:
        """All at once: the ranks are those of the whole step."""
        yield list(range(len(prompts))), self.generate(prompts, n, seed)

    def load_weights(self, source: Any, version: int) -> None:
        """Nothing to load: the samples are fixed."""

    def gold_ranks(self, golds: Sequence[Sequence[str]], queries: Sequence[str | None]) -> list[int | None]:
        assert len(queries) == len(self.rollouts_N)
        return [rollout.rank for rollout in self.rollouts_N]

    def similarity_gains(
        self,
        outputs: Sequence[str | None],
        questions: Sequence[str],
        positives: Sequence[Sequence[str]],
        golds: Sequence[Sequence[str]],
    ) -> list[float | None]:
        assert len(outputs) == len(self.rollouts_N)
        if any(
            text is not None and rollout.gain is None for text, rollout in zip(outputs, self.rollouts_N, strict=True)
        ):
            raise ValueError(
                f"{path_of(self.run_dir, self.step - 1)} holds no similarities to replay: that run paid for ranks alone"
            )
        return [rollout.gain for rollout in self.rollouts_N]
