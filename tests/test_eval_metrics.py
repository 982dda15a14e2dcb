"""Measures: worked by hand, against pytrec_eval and ir_measures on random runs, and against published figures.

What is tested here: (1) the mean is over the qrels' queries, a missing one counts 0; (2) ties go by docid descending,
in float32; (3) nDCG weighs grades, the others count grades from a threshold; (4) names are printed as they were asked
for.
"""

import gzip
import json
import math
import subprocess
import sys
from pathlib import Path

import ir_measures
import numpy as np
import pytest
import pytrec_eval
from hypothesis import given, settings
from hypothesis import strategies as st

from eval import DEFAULT_MEASURES
from eval.columns import QRELS, RUN
from eval.measures import evaluate, evaluate_files, parse_measures
from eval.runs import from_mapping

ROOT = Path(__file__).resolve().parents[1]
ORACLES = ROOT.parent / "shared" / "data" / "eval_oracles"
needs_oracles = pytest.mark.skipif(not ORACLES.is_dir(), reason="shared/data/eval_oracles is not there")

QRELS_TEXT = "q1 0 d1 1\nq1 0 d2 2\nq1 0 d3 0\nq2 0 d1 1\nq3 0 d9 1\n"
RUN_TEXT = """\
q1 Q0 d3 1 3.5 x
q1 Q0 d1 2 2.5 x
q1 Q0 d4 3 1.5 x
q1 Q0 d2 4 0.5 x
q2 Q0 d5 1 9 x
q2 Q0 d1 2 8 x
q4 Q0 d1 1 1 x
"""
# q1: gains 0 1 0 2, ideal 2 1; q2: second place; q3 is missing from the run, q4 from the qrels
EXPECTED = {
    "MRR": (1 / 2 + 1 / 2) / 3,
    "MRR@1": 0.0,
    "NDCG@3": ((1 / math.log2(3)) / (2 + 1 / math.log2(3)) + 1 / math.log2(3)) / 3,
    "nDCG": ((1 / math.log2(3) + 2 / math.log2(5)) / (2 + 1 / math.log2(3)) + 1 / math.log2(3)) / 3,
    "R@2": (1 / 2 + 1) / 3,
    "R@100": (1 + 1) / 3,
    "MAP": ((1 / 2 + 2 / 4) / 2 + 1 / 2) / 3,
    "AP@3": ((1 / 2) / 2 + 1 / 2) / 3,
    "P@4": (2 / 4 + 1 / 4) / 3,
    "Success@1": 0.0,
    "Success@2": 2 / 3,
    "RR(rel=2)": (1 / 4) / 3,
    "R(rel=2)@3": 0.0,
}


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    (tmp_path / "run.trec").write_text(RUN_TEXT)
    (tmp_path / "qrels.trec").write_text(QRELS_TEXT)
    return tmp_path / "run.trec", tmp_path / "qrels.trec"


def command(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "eval.metrics", *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


def test_hand_worked_values(files: tuple[Path, Path]) -> None:
    evaluation = evaluate_files(*files, " ".join(EXPECTED))
    assert evaluation.means() == pytest.approx(EXPECTED, abs=1e-15)
    assert list(evaluation.means()) == list(EXPECTED)
    assert (evaluation.qids, evaluation.missing, evaluation.unjudged, evaluation.unanswerable) == (
        ("q1", "q2", "q3"),
        1,
        1,
        0,
    )
    assert evaluation.values["R@2"].tolist() == [0.5, 1.0, 0.0]


def test_threshold_moves_all_but_ndcg(files: tuple[Path, Path]) -> None:
    """From grade 2 on, q1 alone has a relevant passage: at rank 4."""
    means = evaluate_files(*files, "MRR R@3 R@4 nDCG@3 RR(rel=1)", rel_threshold=2).means()
    assert means == pytest.approx(
        {"MRR": 1 / 12, "R@3": 0, "R@4": 1 / 3, "nDCG@3": EXPECTED["NDCG@3"], "RR(rel=1)": EXPECTED["MRR"]}, abs=1e-15
    )
    skipped = evaluate_files(*files, "MRR R@4", rel_threshold=2, skip_unanswerable=True)
    assert skipped.means() == {"MRR": 1 / 4, "R@4": 1.0}
    assert (skipped.qids, skipped.unanswerable) == (("q1",), 2)


@pytest.mark.parametrize(
    ("scores", "rank"),
    [
        ({"a": 1.0, "b": 1.0, "c": 1.0}, 2),  # c b a
        ({"a": 1.0 + 1e-9, "b": 1.0, "c": 1.0 - 1e-9}, 2),  # equal in float32
        ({"a": 1.0, "b": 1.0 + 1e-6, "c": 0.0}, 1),
        ({"a": 0.0, "b": -0.0, "é": 0.0}, 2),  # by bytes: é is last, so it comes first
        ({"a": 1.0, "b": 1.0, "ba": 1.0}, 2),
    ],
)
def test_ties_are_ordered_by_docid_descending_in_float32(scores: dict[str, float], rank: int) -> None:
    run, qrels = from_mapping({"q": scores}), from_mapping({"q": {"b": 1}}, QRELS)
    assert evaluate(run, qrels, parse_measures("RR")).means() == {"RR": 1 / rank}


GRADES = st.dictionaries(st.sampled_from("abcdefghij"), st.integers(0, 4), min_size=1)
SCORES = st.dictionaries(
    st.sampled_from("abcdefghijklm"),
    st.sampled_from([0.0, -0.0, 1.0, 1.0 + 1e-9, 2.5, -3.0, 1e30]) | st.floats(-100, 100, width=32),
    min_size=1,
)
QUERIES = st.sampled_from(["q1", "q2", "q3", "q4", "q5"])


@settings(max_examples=150)
@given(
    qrels=st.dictionaries(QUERIES, GRADES, min_size=1),
    run=st.dictionaries(QUERIES, SCORES, min_size=1),
    threshold=st.integers(1, 3),
)
def test_equal_to_pytrec_eval(
    qrels: dict[str, dict[str, int]], run: dict[str, dict[str, float]], threshold: int
) -> None:
    if not set(qrels) & set(run) or max(grade for grades in qrels.values() for grade in grades.values()) < threshold:
        return
    names = {
        "RR": "recip_rank", "nDCG": "ndcg", "nDCG@3": "ndcg_cut_3", "nDCG@100": "ndcg_cut_100", "R@1": "recall_1",
        "R@5": "recall_5", "AP": "map", "AP@3": "map_cut_3", "P@1": "P_1", "P@5": "P_5", "Success@1": "success_1",
        "Success@5": "success_5",
    }  # fmt: skip
    asked = {"recip_rank", "ndcg", "ndcg_cut.3,100", "recall.1,5", "map", "map_cut.3", "P.1,5", "success.1,5"}
    expected = pytrec_eval.RelevanceEvaluator(qrels, asked, relevance_level=threshold).evaluate(run)
    evaluation = evaluate(
        from_mapping(run, RUN), from_mapping(qrels, QRELS), parse_measures(" ".join([*names, "RR@2"])), threshold
    )
    assert set(evaluation.qids) == set(qrels)
    for name, theirs in names.items():
        ours = dict(zip(evaluation.qids, evaluation.values[name].tolist(), strict=True))
        for qid in qrels:
            assert ours[qid] == pytest.approx(expected[qid][theirs] if qid in run else 0.0, abs=1e-12), (name, qid)
    assert evaluation.values["RR@2"].tolist() == [
        value if value >= 0.5 else 0.0 for value in evaluation.values["RR"].tolist()
    ]


@settings(max_examples=12)
@given(qrels=st.dictionaries(QUERIES, GRADES, min_size=1), run=st.dictionaries(QUERIES, SCORES, min_size=1))
def test_means_equal_ir_measures(qrels: dict[str, dict[str, int]], run: dict[str, dict[str, float]]) -> None:
    if not set(qrels) & set(run) or not any(grade for grades in qrels.values() for grade in grades.values()):
        return
    names = ["RR", "nDCG@3", "R@5", "R(rel=2)@5", "AP", "P@5", "Success@2"]
    expected = ir_measures.pytrec_eval.calc_aggregate([ir_measures.parse_measure(name) for name in names], qrels, run)
    ours = evaluate(from_mapping(run), from_mapping(qrels, QRELS), parse_measures(" ".join(names))).means()
    theirs = {str(measure): value for measure, value in expected.items()}
    assert ours == pytest.approx(theirs, abs=1e-12)


def test_a_large_unsorted_tied_run_equals_pytrec_eval() -> None:
    rng = np.random.default_rng(5)
    run = {f"q{q}": {f"d{d}": float(rng.integers(6)) for d in rng.permutation(300)[:200]} for q in range(40)}
    qrels = {f"q{q}": {f"d{d}": int(rng.integers(4)) for d in rng.permutation(300)[:80]} for q in range(45)}
    expected = pytrec_eval.RelevanceEvaluator(qrels, {"map", "ndcg_cut.10"}).evaluate(run)
    rows = [f"{qid} Q0 {docid} 1 {score} t" for qid, scores in run.items() for docid, score in scores.items()]
    rng.shuffle(rows)
    shuffled: dict[str, dict[str, float]] = {}
    for row in rows:
        qid, _, docid, _, score, _ = row.split()
        shuffled.setdefault(qid, {})[docid] = float(score)
    means = evaluate(from_mapping(shuffled), from_mapping(qrels, QRELS), parse_measures("map ndcg_cut_10")).means()
    for name in means:
        assert means[name] == pytest.approx(sum(values[name] for values in expected.values()) / 45, abs=1e-12)


@pytest.mark.parametrize(
    ("name", "words"),
    [("FOO@3", "unknown measure 'FOO@3'"), ("R", "needs a cutoff"), ("P@0", "at least 1"), ("", "no measure"),
     ("nDCG(rel=2)@3", "threshold"),
     ("RR@x", "unknown measure 'RR@x'")],
)  # fmt: skip
def test_wrong_measures(name: str, words: str) -> None:
    with pytest.raises(ValueError, match=r"^[^\n]+$") as caught:
        parse_measures(name)
    assert words in str(caught.value)


def test_measure_names_of_trec_eval_ir_measures_and_the_paper() -> None:
    asked = "mrr RR@10 recip_rank NDCG@3 ndcg_cut_3 ndcg_cut.3 Recall@5 recall_5 MAP map_cut_5 P_5 success_5 R(rel=2)@5"
    assert [(m.name, m.kind, m.cutoff, m.rel) for m in parse_measures(asked)] == [
        ("mrr", "RR", None, None), ("RR@10", "RR", 10, None), ("recip_rank", "RR", None, None),
        ("NDCG@3", "nDCG", 3, None),
        ("ndcg_cut_3", "nDCG", 3, None), ("ndcg_cut.3", "nDCG", 3, None), ("Recall@5", "R", 5, None),
        ("recall_5", "R", 5, None),
        ("MAP", "AP", None, None), ("map_cut_5", "AP", 5, None), ("P_5", "P", 5, None),
        ("success_5", "Success", 5, None),
        ("R(rel=2)@5", "R", 5, 2),
    ]  # fmt: skip


def test_command_prints_json_of_full_precision(files: tuple[Path, Path]) -> None:
    done = command("--run", files[0], "--qrels", files[1], "--json")
    assert done.returncode == 0, done.stderr
    values = json.loads(done.stdout)
    assert list(values) == DEFAULT_MEASURES.split() == ["MRR", "NDCG@3", "R@5", "R@10", "R@20", "R@100"]
    assert values == evaluate_files(*files).means()
    assert done.stderr.startswith("3 queries, 1 of the qrels' queries missing from the run (each counts 0)")


def test_command_prints_percentages_and_writes_queries(files: tuple[Path, Path], tmp_path: Path) -> None:
    done = command(
        "--run",
        files[0],
        "--qrels",
        files[1],
        "--measures",
        "MRR R@2",
        "MAP",
        "--per-query",
        tmp_path / "out" / "q.tsv",
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "MRR   33.33\nR@2   50.00\nMAP   33.33\n"
    assert (
        tmp_path / "out" / "q.tsv"
    ).read_text() == "qid\tMRR\tR@2\tMAP\nq1\t0.5\t0.5\t0.5\nq2\t0.5\t1.0\t0.5\nq3\t0.0\t0.0\t0.0\n"


def test_command_refuses_in_one_sentence(files: tuple[Path, Path], tmp_path: Path) -> None:
    other = tmp_path / "other.trec"
    other.write_text("x1 Q0 d1 1 1.0 t\n")
    for run, options, words in [
        (other, (), "the run has none of the 3 queries of the qrels (run: 'x1'; qrels: 'q1', 'q2', ...)"),
        (files[0], ("--rel-threshold", "9"), "grade 9 or more"),
        (files[0], ("--rel-threshold", "0"), "at least 1, got 0"),
        (tmp_path / "nowhere", (), "there is no "),
    ]:
        done = command("--run", run, "--qrels", files[1], *options)
        assert done.returncode == 2
        assert done.stdout == ""
        assert done.stderr.startswith("error: ")
        assert done.stderr.count("\n") == 1
        assert words in done.stderr


@needs_oracles
def test_ikat_2023_published_figures() -> None:
    """MRR and recall on the binary qrels, nDCG on the graded ones; grades from 2 on are relevant in the binary form."""
    folder = ORACLES / "ikat2023"
    published = json.loads((folder / "perf.json").read_text())
    names = {key: key.replace("mrr_", "RR@") for key in published}
    binary = [name for key, name in names.items() if "ndcg" not in key]
    graded = [name for key, name in names.items() if "ndcg" in key]
    means = evaluate_files(folder / "run.json.gz", folder / "qrels_binary.json.gz", " ".join(binary)).means()
    means |= evaluate_files(folder / "run.json.gz", folder / "qrels.trec", " ".join(graded)).means()
    thresholded = evaluate_files(
        folder / "run.json.gz", folder / "qrels.trec", " ".join(names.values()), rel_threshold=2
    ).means()
    assert len(published) == 20
    for key, name in names.items():
        assert means[name] == pytest.approx(published[key], abs=5e-7), key
        assert thresholded[name] == pytest.approx(published[key], abs=5e-7), key


@needs_oracles
def test_trec_eval_suite() -> None:
    folder = ORACLES / "trec_eval_suite"
    checked = 0
    for output in ("out.test", "out.test.aq"):
        expected: dict[str, dict[str, float]] = {}
        for line in (folder / output).read_text().splitlines():
            name, qid, value = line.split("\t")
            if (
                name.strip().split("_")[0] in ("map", "recip", "P", "recall", "ndcg", "success")
                and name.strip() != "ndcg_rel"
            ):
                expected.setdefault(name.strip(), {})[qid] = float(value)
        evaluation = evaluate_files(folder / "results.test", folder / "qrels.test", " ".join(expected))
        ours = {
            name: dict(zip(evaluation.qids, values.tolist(), strict=True)) for name, values in evaluation.values.items()
        }
        for name, value in evaluation.means().items():
            ours[name]["all"] = value
        for name, values in expected.items():
            for qid, value in values.items():
                assert ours[name][qid] == pytest.approx(value, abs=5.1e-5), (output, name, qid)
                checked += 1
    assert checked > 150


@needs_oracles
def test_cacm_run() -> None:
    folder = ORACLES / "cacm"
    means = evaluate_files(folder / "run.cacm-bm25.txt", folder / "qrels.cacm.txt", "map P@30 MRR NDCG@3 R@10").means()
    assert {name: round(value, 4) for name, value in means.items()} == {
        "map": 0.2744, "P@30": 0.1942, "MRR": 0.7048, "NDCG@3": 0.4949, "R@10": 0.3345,
    }  # fmt: skip


def test_gzipped_json_inputs(files: tuple[Path, Path], tmp_path: Path) -> None:
    run: dict[str, dict[str, float]] = {}
    for line in RUN_TEXT.splitlines():
        qid, _, docid, _, score, _ = line.split()
        run.setdefault(qid, {})[docid] = float(score)
    (tmp_path / "run.json.gz").write_bytes(gzip.compress(json.dumps(run).encode()))
    assert evaluate_files(tmp_path / "run.json.gz", files[1]).means() == evaluate_files(*files).means()
