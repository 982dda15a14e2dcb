"""The table of several systems: names, the best constant rule by validation, and the words that rewrites keep."""

import json
from pathlib import Path
from typing import Any

import helpers_trainers as helpers
import pytest

from eval import summary
from eval.systems import best_rule, kept_words

QRELS = "q1 0 gold 1\nq2 0 gold 1\n"


def run_of(*ranks: int) -> str:
    """Query i has its gold passage at ``ranks[i]``."""
    return "".join(
        f"q{i} Q0 {'gold' if place == rank else f'd{place}'} {place} {10 - place} t\n"
        for i, rank in enumerate(ranks, start=1)
        for place in range(1, rank + 1)
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """On the test raw is better (1 and 1/2), on validation previous; the better one there has 1 and 1, or 1/4 and 1."""
    (tmp_path / "validation").mkdir()
    texts = {"test.trec": QRELS, "raw.trec": run_of(1, 2), "previous.trec": run_of(4, 1), "sft.trec": run_of(1, 1)}
    texts |= {"validation.trec": QRELS, "validation/raw.trec": run_of(2, 2), "validation/previous.trec": run_of(1, 2)}
    texts["sft.jsonl"] = "".join(
        json.dumps({"qid": qid, "question": question, "rewrite": rewrite}) + "\n"
        for qid, question, rewrite in (
            ("q1", "the wife of him?", "his wives, no wife"),
            ("q2", "why?", "Why Rome"),
            ("q9", "a?", "b"),
        )
    )
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    return tmp_path


def summarised(folder: Path, *runs: str, status: int = 0) -> tuple[dict[str, Any], str]:
    flags = ["--qrels", folder / "test.trec", "--output", folder / "results.json"]
    rules = ["--rules", folder / "validation.trec", *sorted((folder / "validation").iterdir())]
    found, printed = helpers.call(summary.main, [*(f"{folder}/{run}" for run in runs), *flags, *rules])
    assert found == status, printed
    return json.loads((folder / "results.json").read_text()) if status == 0 else {}, printed


def test_rows_by_hand(folder: Path) -> None:
    results, printed = summarised(folder, "raw.trec", "previous.trec", f"sft.trec@{folder}/sft.jsonl")
    assert {name: row["MRR"] for name, row in results.items()} == {
        "raw question": 0.75,
        "previous turn + question": 0.625,
        "best constant rule (previous turn + question, by validation)": 0.625,  # not the best of the test
        "after SFT": 1.0,
    }
    assert results["after SFT"]["kept_words"] == pytest.approx((1 / 2 + 1) / 2)  # wife of {wife, him}; why
    assert [line.split()[-1] for line in printed.splitlines()[1:5]] == ["-", "-", "-", "75.0"]
    assert printed.splitlines()[0].endswith("kept words")


def test_the_best_rule_needs_a_run_of_the_test(folder: Path) -> None:
    _, printed = summarised(folder, "raw.trec", status=2)
    assert "--rules: previous is the best rule, but no RUN has this file name" in printed
    assert best_rule(folder / "test.trec", [folder / "previous.trec", folder / "raw.trec"]) == "raw"
    (folder / "z.trec").write_text(run_of(1, 2))
    assert best_rule(folder / "test.trec", [folder / "z.trec", folder / "raw.trec"]) == "raw"


def test_names_of_rows() -> None:
    assert summary.named("raw.trec") == ("", "raw.trec", "")
    assert summary.named("my run=a/b=c.trec@r.jsonl") == ("my run", "a/b=c.trec", "r.jsonl")


def test_kept_words_of_several_rewrites(tmp_path: Path) -> None:
    file = tmp_path / "r.jsonl"
    line = {"qid": "1", "question": "Running dogs, is it?", "rewrite": "x", "rewrites": ["the dog runs", "x", "dogs x"]}
    file.write_text(json.dumps(line) + "\n")
    assert kept_words(file, ["1"]) == pytest.approx((1 + 0 + 1 / 2) / 3)
    with pytest.raises(ValueError, match="has none of the questions"):
        kept_words(file, ["2"])
    file.write_text('{"qid": "1", "question": "a b"}\n')
    with pytest.raises(ValueError, match=r"r\.jsonl:1: needs 'question' and 'rewrite'"):
        kept_words(file, ["1"])
