"""The GRPO step benchmark runs whole, on a tiny model, against the real TRL; no figure is asserted."""

import os
import re
import sys
from pathlib import Path

import pytest

from benchmarks.grpo_step import build_parser, compare, conversations

ORACLES = Path(os.environ.get("CONVSEARCH_ORACLES", Path(sys.prefix) / "oracles"))


def test_prompts_have_three_turns_of_history() -> None:
    found = conversations(4)
    assert len({conversation.qid.rpartition("_")[0] for conversation in found}) == 4
    assert all(len(conversation.history) >= 3 for conversation in found)


@pytest.mark.slow
@pytest.mark.skipif(not (ORACLES / "trl").is_dir(), reason="TRL is not installed: bash scripts/test.sh fast")
def test_it_runs_against_trl(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("benchmarks.grpo_step.ORACLES", ORACLES)
    arguments = [
        "--size",
        "tiny",
        "--rounds",
        "1",
        "--threads",
        "1",
        "--prompts",
        "2",
        "--samples",
        "2",
        "--trl_micro_batch",
        "2",
    ]
    args = build_parser().parse_args(
        [*arguments, "--contestants", "ours", "trl", "--work", str(tmp_path), "--model", str(tmp_path / "none")]
    )
    figures = r"ratio_bf16=\d+\.\d\d memory_ratio_bf16=\d+\.\d\d\nratio=\d+\.\d\d memory_ratio=\d+\.\d\d"
    assert re.fullmatch(figures, compare(args))
    table = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in table[-2:]] == ["ours", "trl"]
    for line in table[-2:]:
        assert all(float(number) > 0 for number in line.split()[1:])
