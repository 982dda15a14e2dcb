"""Rollouts on disk: what was dumped is what is read back and played back, and a step's file is whole or not there."""

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from convsearch.rewards.scoring import Group, Rollout, Score
from convsearch.rewards.shapes import Feedback
from convsearch.runs import rollouts
from convsearch.sampling.base import Tensors
from convsearch.types import Completion, Example, Rewrite

token_ids = st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=5).map(tuple)
float32 = st.floats(-100, 0, width=32)
completions = st.integers(0, 5).flatmap(
    lambda size: st.builds(
        Completion,
        st.lists(st.integers(0, 200_000), min_size=size, max_size=size).map(tuple),
        st.lists(float32, min_size=size, max_size=size).map(tuple),
        st.text(max_size=20),
        st.sampled_from(["stop", "length"]),
        st.integers(0, 9999),
    )
)
rewrites = st.text(min_size=1, max_size=20).map(lambda text: Rewrite(text, None)) | st.sampled_from(
    ["no_tag", "many_tags", "empty", "truncated", "format"]
).map(lambda error: Rewrite(None, error))  # type: ignore[arg-type]
finite = st.floats(-10, 10)
examples = st.builds(Example, st.text(max_size=10), st.just(()), st.just(""), st.just(()), prompt_ids=token_ids)
feedbacks = st.builds(Feedback, st.none() | st.integers(1, 1000), st.none() | finite)
scores = st.builds(Score, rewrites, feedbacks, finite)
groups = st.lists(st.builds(Rollout, examples, completions, scores, finite, st.booleans()), min_size=1, max_size=4)


def rollout(
    qid: str, ids: tuple[int, ...], completion: Completion, rewrite: Rewrite, rank: int | None, *rewards: float
) -> Rollout:
    reward, advantage = rewards
    example = Example(qid, (), "", (), prompt_ids=ids)
    return Rollout(example, completion, Score(rewrite, Feedback(rank), reward), advantage)


def group(number: int, size: int = 2) -> Group:
    """The samples of one prompt, which differ by rank and text."""
    texts = [f"{number}.{k}" for k in range(size)]
    samples = [(Completion((k,), (-0.5,), text, "stop"), Rewrite(text, None)) for k, text in enumerate(texts)]
    return Group(tuple(rollout(f"q{number}", (number, 7), *each, k + 1, 1.0, 0.0) for k, each in enumerate(samples)))


@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rollouts_G=groups)
def test_what_is_dumped_is_read_back(tmp_path: Path, rollouts_G: list[Rollout]) -> None:
    rollouts.dump(tmp_path, 12, [Group(tuple(rollouts_G))])
    assert rollouts.load(tmp_path, 12) == rollouts_G


def test_the_file_and_its_columns(tmp_path: Path) -> None:
    truncated = rollout("q2", (2,), Completion((), (), "", "length"), Rewrite(None, "truncated"), None, -0.1, 0.0)
    rollouts.dump(tmp_path, 12, [group(1), Group((truncated,))])
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.*")] == ["rollouts/000012.parquet"]
    table = pq.read_table(tmp_path / "rollouts" / "000012.parquet")
    assert table.schema.equals(rollouts.SCHEMA)
    assert table["step"].to_pylist() == [12] * 3
    assert table["qid"].to_pylist() == ["q1", "q1", "q2"]  # group-major, in the order of sampling
    assert table["rank"].to_pylist() == [1, 2, None]
    assert table["rewrite"].to_pylist() == ["1.0", "1.1", None]
    assert table["error"].to_pylist() == [None, None, "truncated"]


def test_log_probs_are_kept_in_float32_and_rewards_whole(tmp_path: Path) -> None:
    logprob, reward = -0.1234567890123, 19 / 9 - 3 / 9
    made = rollout("q", (1,), Completion((5,), (logprob,), "a", "stop"), Rewrite("a", None), 3, reward, -reward)
    rollouts.dump(tmp_path, 0, [Group((made,))])
    (read,) = rollouts.load(tmp_path, 0)
    assert read.completion.logprobs == (float(np.float32(logprob)),)
    assert (read.score.reward, read.advantage) == (reward, -reward)


def test_a_dump_of_other_columns_is_refused(tmp_path: Path) -> None:
    rollouts.dump(tmp_path, 3, [group(1)])
    path = rollouts.path_of(tmp_path, 3)
    pq.write_table(pq.read_table(path).drop_columns(["trained"]), path)
    with pytest.raises(ValueError, match=f"^{path}: not the columns of rollouts, or damaged"):
        rollouts.load(tmp_path, 3)


def test_a_dump_that_fails_keeps_the_last_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rollouts.dump(tmp_path, 3, [group(1)])

    def half(table: object, file: object, **options: object) -> None:
        file.write(b"PAR1 half")  # type: ignore[attr-defined]
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(rollouts.pq, "write_table", half)
    for step in (3, 4):
        with pytest.raises(OSError, match="No space left on device"):
            rollouts.dump(tmp_path, step, [group(2)])
    assert [path.name for path in (tmp_path / "rollouts").iterdir()] == ["000003.parquet"]
    assert rollouts.load(tmp_path, 3) == list(group(1).rollouts)
    with pytest.raises(ValueError, match=r"000004\.parquet: no rollouts of step 4 to replay$"):
        rollouts.load(tmp_path, 4)


def test_a_replay_gives_back_samples_and_ranks_step_by_step(tmp_path: Path) -> None:
    for step in (5, 6):
        rollouts.dump(tmp_path, step, [group(step), group(step + 10)])
    replay = rollouts.Replay(tmp_path, 5)
    for step in (5, 6):
        sampled = replay.generate([(step, 7), (step + 10, 7)], 2, seed=99)
        expected = [[f"{step}.0", f"{step}.1"], [f"{step + 10}.0", f"{step + 10}.1"]]
        assert [[completion.text for completion in group] for group in sampled] == expected
        examples = [Example("q", (), "", ("d",))] * 4
        assert replay.feedback(examples, ["any"] * 4, {"rank"}) == [Feedback(rank) for rank in (1, 2, 1, 2)]
        with pytest.raises(ValueError, match=rf"00000{step}\.parquet has no gain to replay"):
            replay.feedback(examples, ["any"] * 4, {"rank", "gain"})
        replay.load_weights(Tensors({}), version=step + 1)
    with pytest.raises(ValueError, match=rf"^{tmp_path}/rollouts/000007\.parquet: no rollouts of step 7 to replay$"):
        replay.generate([(7, 7)], 2, seed=99)


def test_a_replay_follows_the_requests_of_a_step(tmp_path: Path) -> None:
    rollouts.dump(tmp_path, 0, [group(1), group(2), group(3)])
    replay = rollouts.Replay(tmp_path, 0)
    for numbers in ([1, 2], [3]):
        sampled = replay.generate([(number, 7) for number in numbers], 2, seed=99)
        assert [[completion.text for completion in group] for group in sampled] == [
            [f"{number}.0", f"{number}.1"] for number in numbers
        ]
        examples = [Example("q", (), "", ("d",))] * 2 * len(numbers)
        assert replay.feedback(examples, ["any"] * len(examples), {"rank"}) == [Feedback(1), Feedback(2)] * len(numbers)
    with pytest.raises(ValueError, match="holds other prompts"):
        replay.generate([(4, 7)], 2, seed=99)


@pytest.mark.parametrize(
    ("prompts", "n"),
    [
        ([(1, 7), (3, 7)], 2),  # another prompt
        ([(2, 7), (1, 7)], 2),  # another order
        ([(1, 7)], 2),  # fewer
        ([(1, 7), (2, 7)], 1),  # another group size
        ([(1, 7), (2, 7)], 4),
        ([(1, 7)], 4),  # all of its samples under the first prompt
    ],
)
def test_a_replay_of_other_prompts_is_refused(tmp_path: Path, prompts: list[tuple[int, ...]], n: int) -> None:
    rollouts.dump(tmp_path, 0, [group(1), group(2)])

    def step() -> None:
        replay = rollouts.Replay(tmp_path, 0)
        replay.generate(prompts, n, seed=0)
        replay.load_weights(Tensors({}), version=1)  # fewer: samples of the step are left over

    with pytest.raises(
        ValueError, match=r"000000\.parquet holds other prompts than this run draws: same data, seed and batch sizes"
    ):
        step()
