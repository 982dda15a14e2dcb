"""Curves, and the rule by which a run is said to have risen."""

import json
import math
import sys
from pathlib import Path

import pytest

from convsearch import plots as command
from convsearch.rewards.scoring import Group, Rollout, Score
from convsearch.rewards.shapes import Feedback
from convsearch.runs import plots, rollouts
from convsearch.types import Completion, Example, Rewrite


def sample(qid: str, reward: float) -> Rollout:
    example, completion = Example(qid, (), "", (), prompt_ids=(1,)), Completion((2,), (-0.5,), "x", "stop")
    return Rollout(example, completion, Score(Rewrite("x", None), Feedback(), reward))


def write_run(folder: Path, rewards: list[list[list[float]]]) -> Path:
    """``rewards``: of each step, of each prompt, of each sample."""
    for step, prompts in enumerate(rewards):
        groups = [Group(tuple(sample(f"q{p}", reward) for reward in group)) for p, group in enumerate(prompts)]
        rollouts.dump(folder, step, groups)
    lines = [{"step": -1, "val_reward": -1.0}] + [{"step": step, "reward": 0.0} for step in range(len(rewards))]
    lines[-1]["val_reward"] = 0.5
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_a_rise_by_hand(tmp_path: Path) -> None:
    low, high = [[0.0, 0.0], [1.0, 3.0]], [[5.0, 5.0], [6.0, 8.0]]  # prompts of 0 and 2, then of 5 and 7
    folder = write_run(tmp_path, [low, low, low, high, high, high, high])
    assert plots.prompt_rewards(folder, range(2)) == [0, 2, 0, 2]
    difference, twice = plots.rise([0, 2, 0, 2], [5, 7, 5, 7])
    assert (difference, twice) == (5, pytest.approx(2 * math.sqrt(2 * (4 / 3) / 4)))
    line = plots.verdict(folder, [{"step": -1, "val_reward": -1.0}, {"step": 6, "val_reward": 0.5}])
    assert "first and last 2 steps 1.00 and 6.00 (4 and 4 prompts), difference +5.00 ± 1.63" in line
    assert line.endswith(": rose; held-out -1.00 -> 0.50")


def test_noise_is_not_a_rise_and_five_steps_are_too_few(tmp_path: Path) -> None:
    folder = write_run(tmp_path, [[[0.0], [4.0]], [[1.0], [4.0]]] * 3)
    assert "no significant change" in plots.verdict(folder, [{"step": 5}])
    assert "5 steps are too few" in plots.verdict(folder, [{"step": 4}])


@pytest.mark.slow
def test_runs_share_a_figure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [write_run(tmp_path / name, [[[0.0], [1.0]]] * 3 + [[[5.0], [6.0]]] * 3) for name in ("a", "b")]
    monkeypatch.setattr(sys, "argv", ["plots", *map(str, runs), "--output", str(tmp_path / "curves.png")])
    command.main()
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert capsys.readouterr().out.count(": rose; held-out -1.00 -> 0.50") == 2
    (tmp_path / "empty").mkdir()
    monkeypatch.setattr(sys, "argv", ["plots", str(tmp_path / "empty"), "--output", str(tmp_path / "none.png")])
    with pytest.raises(ValueError, match="with a finished step"):
        command.main()
