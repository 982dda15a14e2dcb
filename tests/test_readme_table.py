"""The README's table: means and deviations by hand, and where it is put."""

import shutil
from pathlib import Path

import pytest
from helpers_pages import write_run

from eval.readme_table import BEGIN, END, drawn, markdown, replaced


def test_table_by_hand(tmp_path: Path) -> None:
    """Reciprocal ranks of the rewrites: 1 1 1/2 0 in one folder; in the other those of the raw question, 1 0 1/4 1."""
    first = write_run(tmp_path / "one", steps=0)
    second = tmp_path / "two"
    shutil.copytree(first, second)
    shutil.copy(first / "raw.trec", second / "grpo.trec")
    rows = markdown([first, second]).splitlines()
    assert rows[0] == "| | MRR | NDCG@3 | R@10 | kept words |"
    assert rows[2].startswith("| raw question | 56.2 | ")
    assert rows[3].startswith("| after GRPO | 59.4 ± 4.4 | ")
    assert "±" not in markdown([first])
    assert rows[2].endswith(" | - |")
    assert rows[3].endswith(" | 100.0 ± 0.0 |")  # "rewrite of QUESTION"


def test_rewrites_are_drawn_by_the_seed_with_their_ranks(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "one", steps=0)
    rows = drawn(folder).splitlines()
    assert len(rows) == 2 + 4  # all four questions
    assert sorted(row.split(" | ")[-1] for row in rows[2:]) == ["- |", "1 |", "1 |", "2 |"]
    assert drawn(folder, count=2) == drawn(folder, count=2)
    assert len(drawn(folder, count=2).splitlines()) == 2 + 2


def test_the_best_constant_rule_repeats_its_row(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "one", steps=0)
    shutil.copy(folder / "grpo.trec", folder / "previous.trec")
    shutil.copy(folder / "test.trec", folder / "validation.trec")
    (folder / "validation").mkdir()
    for name, run in (("raw", "grpo"), ("previous", "raw")):  # on validation the other one is better
        shutil.copy(folder / f"{run}.trec", folder / "validation" / f"{name}.trec")
    rows = markdown([folder]).splitlines()
    assert [row.split(" | ")[0] for row in rows[2:]] == [
        "| raw question", "| best constant rule (raw question, by validation)", "| previous turn + question",
        "| after GRPO",
    ]  # fmt: skip
    assert rows[3].endswith(rows[2].removeprefix("| raw question"))


def test_the_table_is_put_between_the_marks() -> None:
    assert replaced(f"a\n{BEGIN}old\n{END}\nb\n", "new\n", "X") == f"a\n{BEGIN}new\n{END}\nb\n"
    with pytest.raises(ValueError, match="X needs one line"):
        replaced("no marks", "new\n", "X")


def test_other_questions_are_refused(tmp_path: Path) -> None:
    first, second = write_run(tmp_path / "one", steps=0), write_run(tmp_path / "two", steps=0)
    (second / "test.trec").write_text("t_1_1 0 d1 1\n")
    with pytest.raises(ValueError, match="two has other questions or systems"):
        markdown([first, second])
    with pytest.raises(ValueError, match=r"has no test\.trec"):
        markdown([tmp_path])
