"""Comparisons: worked by hand and against scipy, coverage of the intervals, the four forms of the command."""

import csv
import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from convsearch.cli import run
from eval.breakdowns import labels_of, means_by
from eval.compare import main
from eval.compare_output import as_latex, as_text
from eval.comparison import compare, over_seeds
from eval.significance import bootstrap_intervals, holm, paired_tests

ROOT = Path(__file__).resolve().parents[1]
QRELS = "".join(f"q{i} 0 gold 1\n" for i in range(1, 7))


def run_file(ranks: list[int]) -> str:
    """Query i has its gold passage at ``ranks[i]``; 0 leaves the query out."""
    return "".join(
        f"q{i} Q0 {'gold' if place == rank else f'd{place}'} {place} {10 - place} t\n"
        for i, rank in enumerate(ranks, start=1)
        for place in range(1, rank + 1)
    )


def command(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "eval.compare", *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    texts = {"qrels": QRELS, "raw": run_file([4, 4, 2, 2, 1, 0]), "new & _better": run_file([1, 2, 1, 1, 1, 2])}
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    return [tmp_path / name for name in texts]


def test_permutation_test_by_hand() -> None:
    """Of the 8 flips of (1, 2, 3), 2 have a sum of 6 or -6; of (1, -1, 2), 6 have one of at least 2 or at most -2."""
    tests = paired_tests(np.array([[1.0, 1.0, 0.0], [2.0, -1.0, 0.0], [3.0, 2.0, 0.0]]), draws=1000, seed=1)
    assert tests.permutation_p.tolist() == [2 / 8, 6 / 8, 1.0]
    assert tests.difference == pytest.approx([2, 2 / 3, 0])
    assert tests.effect_size == pytest.approx([2.0, (2 / 3) / np.std([1, -1, 2], ddof=1), 0.0])
    assert tests.t_p[2] == 1.0


def test_sampled_permutations_approximate_the_exact_ones() -> None:
    differences = np.random.default_rng(3).normal(0.3, 1, size=(14, 4))
    exact = paired_tests(differences, draws=1 << 14, seed=1).permutation_p
    sampled = paired_tests(differences, draws=(1 << 14) - 1, seed=1).permutation_p
    assert sampled == pytest.approx(exact, abs=0.012)
    assert (exact != sampled).any()


def test_p_values_are_uniform_if_nothing_differs() -> None:
    differences = np.random.default_rng(5).choice([-1.0, -0.5, 0.0, 0.5, 1.0], size=(200, 400))
    tests = paired_tests(differences, draws=1000, seed=1)
    assert 0.02 < (tests.permutation_p < 0.05).mean() < 0.09
    assert 0.02 < (tests.t_p < 0.05).mean() < 0.09


@settings(max_examples=60)
@given(pairs=st.lists(st.tuples(st.integers(0, 60), st.integers(0, 60)), min_size=2, max_size=40))
def test_t_test_equals_scipy(pairs: list[tuple[int, int]]) -> None:
    new, old = np.array(pairs, np.float64).T / 60
    ours = paired_tests((new - old)[:, None], draws=100, seed=1).t_p[0]
    if np.ptp(new - old) < 1e-9:
        assert ours == (1.0 if (new == old).all() else pytest.approx(0, abs=1e-4))
    else:
        assert ours == pytest.approx(scipy.stats.ttest_rel(new, old).pvalue, abs=1e-9)


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03]).tolist() == pytest.approx([0.03, 0.06, 0.06])
    assert holm([[0.5, 0.001], [0.9, 0.02]]).tolist() == pytest.approx(np.array([[1.0, 0.004], [1.0, 0.06]]))
    assert holm([0.2]).tolist() == [0.2]


def test_bootstrap_equals_scipy_and_covers() -> None:
    values = np.random.default_rng(7).random((80, 3))
    low, high = bootstrap_intervals(values, draws=4000, seed=1, confidence=0.9)
    theirs = scipy.stats.bootstrap(
        (values[:, 1],), np.mean, n_resamples=4000, confidence_level=0.9, method="percentile", rng=2
    )
    assert (low[1], high[1]) == pytest.approx(tuple(theirs.confidence_interval), abs=0.004)
    samples = np.random.default_rng(9).random((60, 300))  # 300 samples of 60 draws from a distribution of mean 1/2
    low, high = bootstrap_intervals(samples, draws=1000, seed=1, confidence=0.9)
    assert 0.84 < ((low < 0.5) & (high > 0.5)).mean() < 0.95


def test_seeds_and_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    values = {"a": {"MRR": np.linspace(0, 1, 40)}, "b": {"MRR": np.linspace(0, 1, 40) ** 2}}
    first = compare(values, draws=500, seed=4)
    assert first == compare(values, draws=500, seed=4)
    assert first != compare(values, draws=500, seed=5)
    monkeypatch.setattr("eval.significance._CELLS", 40 * 7)  # blocks of seven draws, and one of three
    blocked = compare(values, draws=500, seed=4)
    assert [row["mean"] for row in blocked["means"]] == [row["mean"] for row in first["means"]]
    assert [row["low"] for row in blocked["means"]] == pytest.approx([row["low"] for row in first["means"]], abs=0.02)
    assert blocked["comparisons"][0]["permutation_p"] == pytest.approx(
        first["comparisons"][0]["permutation_p"], abs=0.02
    )


def test_compare_by_hand() -> None:
    """Reciprocal ranks 1/4 1/4 1/2 1/2 1 0 against 1 1/2 1 1 1 1/2: five differences, all upwards, one tie."""
    old, new = np.array([0.25, 0.25, 0.5, 0.5, 1, 0]), np.array([1, 0.5, 1, 1, 1, 0.5])
    result = compare({"old": {"MRR": old}, "new": {"MRR": new}, "same": {"MRR": old}}, draws=1000)
    row, same = result["comparisons"]
    assert {key: row[key] for key in ("run", "baseline", "measure", "wins", "ties", "losses")} == {
        "run": "new", "baseline": "old", "measure": "MRR", "wins": 5, "ties": 1, "losses": 0,
    }  # fmt: skip
    assert row["difference"] == pytest.approx(2.5 / 6)
    assert row["permutation_p"] == 2 / 2**5  # of 64 flips 4 are as far out: the tie flips freely
    assert row["permutation_p_holm"] == 4 / 2**5
    assert row["t_p"] == pytest.approx(scipy.stats.ttest_rel(new, old).pvalue, abs=1e-12)
    assert row["effect_size"] == pytest.approx((2.5 / 6) / np.std(new - old, ddof=1))
    assert row["low"] < row["difference"] < row["high"]
    assert (same["difference"], same["t_p"], same["permutation_p"], same["effect_size"], same["ties"]) == (
        0,
        1,
        1,
        0,
        6,
    )
    assert [row["mean"] for row in result["means"]] == pytest.approx([2.5 / 6, 5 / 6, 2.5 / 6])


def test_a_difference_that_never_varies_is_valid_json() -> None:
    result = compare({"a": {"MRR": np.zeros(12)}, "b": {"MRR": np.full(12, 0.1)}}, draws=1000)
    assert result["comparisons"][0]["effect_size"] is None
    assert result["comparisons"][0]["t_p"] == 0
    json.dumps(result, allow_nan=False)
    assert " - " in as_text({"queries": 12, **result})


def test_command_json_and_text(files: list[Path]) -> None:
    done = command(*files, "--measures", "MRR R@1", "--json", "--draws", "1000")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["queries"] == 6
    assert [(row["run"], row["measure"]) for row in result["comparisons"]] == [
        ("new & _better", "MRR"),
        ("new & _better", "R@1"),
    ]
    assert result["comparisons"][0]["permutation_p"] == 2 / 2**5
    assert "1 of the 6 queries are missing, each counts 0" in done.stderr
    text = command(*files, "--measures", "MRR", "--draws", "1000").stdout
    assert text == as_text({"queries": 6, **compare_of(files)}) + "\n"
    assert text.splitlines()[-1].split()[:5] == ["new", "&", "_better", "MRR", "+41.67"]
    assert text.splitlines()[-1].split()[-1] == "5/1/0"


def compare_of(files: list[Path]) -> dict[str, list[dict[str, object]]]:
    from eval.measures import evaluate_files

    return compare({path.name: evaluate_files(path, files[0], "MRR").values for path in files[1:]}, draws=1000)


def test_command_csv(files: list[Path]) -> None:
    rows = list(csv.DictReader(io.StringIO(command(*files, "--csv", "--names", "a", "b,c").stdout)))
    assert [(row["run"], row["measure"]) for row in rows] == [
        (r, m) for r in ("a", "b,c") for m in ("MRR", "NDCG@3", "R@10", "R@100")
    ]
    assert float(rows[0]["mean"]) == pytest.approx(2.5 / 6)
    assert rows[0]["difference"] == ""
    assert float(rows[4]["difference"]) == pytest.approx(2.5 / 6)
    assert rows[4]["wins"] == "5"


def test_command_latex(files: list[Path]) -> None:
    latex = command(*files, "--latex", "--measures", "MRR R@10").stdout
    assert latex == (
        "\\begin{tabular}{lrr}\n\\toprule\nRun & MRR & R@10 \\\\\n\\midrule\nraw & 41.67 & 83.33 \\\\\n"
        "new \\& \\_better & \\textbf{83.33} & \\textbf{100.00} \\\\\n\\bottomrule\n\\end{tabular}\n"
    )
    values = {"a": {"MRR": np.zeros(40)}, "b": {"MRR": np.linspace(0.1, 1, 40)}}
    assert "b & \\textbf{55.00}$^{***}$ \\\\" in as_latex({"queries": 40, **compare(values)})


def test_breakdown_by_turn(files: list[Path], tmp_path: Path) -> None:
    conversations = tmp_path / "c.json"
    turns = {"q1": 1, "q2": 2, "q3": 1, "q4": 2, "q5": 10, "other": 1}
    conversations.write_text("".join(json.dumps({"qid": qid, "turn_id": turn}) + "\n" for qid, turn in turns.items()))
    result = json.loads(command(*files, "--measures", "MRR", "--json", "--conversations", conversations).stdout)[
        "breakdowns"
    ]["turn"]
    raw = {row["group"]: (row["queries"], row["mean"]) for row in result if row["run"] == "raw"}
    assert raw == {1: (2, 0.375), 2: (2, 0.375), 10: (1, 1.0), None: (1, 0.0)}
    text = command(*files, "--measures", "MRR", "--conversations", conversations).stdout
    last = text.split("\n\nby turn\n\n")[1].splitlines()
    assert [line.split()[:2] for line in last[1:]] == [["1", "2"], ["2", "2"], ["10", "1"], ["unknown", "1"]]
    assert last[1].split() == ["1", "2", "37.50", "100.00"]
    with pytest.raises(ValueError, match="has none of the 1 queries"):
        labels_of(["x"], conversations)


def test_breakdowns_by_hand(tmp_path: Path) -> None:
    """Two conversations; the second changes its topic at turn 3, and its turn 2 is in the file but not in the qrels."""
    file = tmp_path / "c.json"
    turns = [
        ("a1", "a", 1, "x", 0),
        ("a2", "a", 2, "x", 30),
        ("b1", "b", 1, "x", 0),
        ("b2", "b", 2, "y", 60),
        ("b3", "b", 3, "x", 900),
    ]
    records = [
        {
            "qid": qid,
            "conv_id": conv,
            "turn_id": turn,
            "topic": topic,
            "context": ["w " * words],
            "rewrite": "w " * turn * 4,
            "domain": conv,
        }
        for qid, conv, turn, topic, words in turns
    ]
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    qids = ["b3", "b1", "a2", "a1", "z"]
    labels = labels_of(qids, file, file, ["domain"])
    values = {"run": {"MRR": np.array([1.0, 0.5, 0.25, 0.5, 0.0])}}
    means = {
        name: [(row["group"], row["queries"], row["mean"]) for row in means_by(qids, labels[name], values)]
        for name in labels
    }
    assert means == {
        "turn": [(1, 2, 0.5), (2, 1, 0.25), (3, 1, 1.0), (None, 1, 0.0)],
        "topic switch": [("first turn", 2, 0.5), ("same topic", 1, 0.25), ("topic switch", 1, 1.0), (None, 1, 0.0)],
        "history length (words)": [("0", 2, 0.5), ("1 - 49", 1, 0.25), ("800 or more", 1, 1.0), (None, 1, 0.0)],
        "domain": [("a", 2, 0.375), ("b", 2, 0.75), (None, 1, 0.0)],
        "rewrite length (words)": [("1 - 4", 2, 0.5), ("5 - 8", 1, 0.25), ("9 - 12", 1, 1.0), (None, 1, 0.0)],
    }


def test_seeds_by_hand() -> None:
    """Means 0.5 and 0.25: their standard deviation is 0.25 / sqrt(2); the best of each query 1 and 0.5."""
    rows = over_seeds("GRPO", [{"MRR": np.array([1.0, 0.0])}, {"MRR": np.array([0.0, 0.5])}])
    assert rows == [
        {
            "run": "GRPO",
            "seeds": 2,
            "measure": "MRR",
            "mean": 0.375,
            "sd": pytest.approx(0.25 / 2**0.5),
            "best_of": 0.75,
        }
    ]


def test_questions_are_the_unit_of_a_test_with_seeds(files: list[Path]) -> None:
    """Seeds are averaged per question first: three equal ones give the p of one, where pooling would give 2 / 2**15."""
    baseline, run = files[1:]
    measures = ["--measures", "MRR", "--draws", "1000"]
    result = json.loads(command(*files[:2], *measures, "--json", "--seeds", "GRPO", run, run, run).stdout)
    [row] = result["comparisons"]
    assert (row["baseline"], row["run"], row["permutation_p"]) == ("raw", "GRPO", 2 / 2**5)
    result = json.loads(command(*files[:2], *measures, "--json", "--seeds", "GRPO", run, baseline, run).stdout)
    [row] = result["comparisons"]
    assert row["difference"] == pytest.approx(2 / 3 * 2.5 / 6)
    text = command(*files[:2], *measures, "--seeds", "GRPO", run, baseline, run).stdout
    assert " 0.0625 " in text.split("win/tie/loss")[1]  # p, to four digits


def test_command_with_seeds_in_html_and_by_query(
    files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "c.json").write_text(
        "".join(json.dumps({"qid": f"q{i}", "turn_id": i, "rewrite": "a b"}) + "\n" for i in range(1, 7))
    )
    conversations = tmp_path / "c.json"
    arguments: list[str | Path] = [
        *files[:2],
        "--measures",
        "MRR",
        "--conversations",
        conversations,
        "--seeds",
        "<b>",
        *files[1:],
    ]
    arguments += ["--rewrites", conversations, "--per-query", tmp_path / "q.tsv", "--draws", "200"]
    monkeypatch.setattr(sys, "argv", ["eval.compare", *map(str, arguments), "--html"])
    main()
    html = capsys.readouterr().out
    assert "<h2 id=" in html
    assert "<b>" not in html
    assert "<script" not in html
    for words in ("&lt;b&gt;, MRR", "62.50 ± 29.46", "83.33", "By rewrite length (words)", "By turn"):
        assert words in html
    lines = (tmp_path / "q.tsv").read_text().splitlines()
    assert lines[:2] == ["qid\traw MRR\t<b> MRR", "q1\t0.25\t0.625"]
    assert len(lines) == 7
    monkeypatch.setattr(sys, "argv", ["eval.compare", *map(str, arguments)])
    main()
    text = capsys.readouterr().out
    assert "over seeds (best of n: each query's best run)" in text
    assert text.rstrip().splitlines()[-1].split() == ["1", "-", "4", "6", "41.67", "62.50"]


def test_command_refuses_in_one_sentence(
    files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bad").write_text("q1 Q0 d 1 nan t\n")
    (tmp_path / "bad.json").write_text('{"qid": "q1", "turn_id": 1}\n{"qid": "q2"}\n')
    (tmp_path / "good.json").write_text('{"qid": "q1", "turn_id": 1}\n')
    cases: list[tuple[list[str | Path], str]] = [
        ([*files[:2]], "at least 2 runs, got 1"),
        ([*files, "--names", "a"], "2 runs need as many different names"),
        ([*files[:2], files[1]], "different names"),
        ([*files, "--draws", "5"], "--draws must be at least 100"),
        ([*files, "--confidence", "95"], "--confidence between 0 and 1"),
        ([*files, tmp_path / "bad"], f"{tmp_path / 'bad'}:1: the score must be a finite number"),
        ([*files, "--conversations", tmp_path / "bad.json"], "bad.json:2: needs 'qid' (a string) and 'turn_id'"),
        ([*files, "--by", "domain"], "add --conversations FILE"),
        (
            [*files, "--conversations", tmp_path / "good.json", "--by", "domain"],
            "good.json:1: the record has no word or whole number under 'domain'",
        ),
        ([*files, "--rewrites", tmp_path / "good.json"], "good.json:1: the record has no 'rewrite'"),
        ([*files, "--seeds", "A", files[1]], "--seeds A needs at least 2 runs"),
    ]
    for arguments, words in cases:
        monkeypatch.setattr(sys, "argv", ["eval.compare", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            run(main)
        output = capsys.readouterr()
        errors = [line for line in output.err.splitlines() if line.startswith("error: ")]
        assert (caught.value.code, output.out, len(errors)) == (2, "", 1)
        assert words in errors[0]
    done = command(*files, tmp_path / "nowhere")
    assert (done.returncode, done.stdout) == (2, "")
    assert "Traceback" not in done.stderr
