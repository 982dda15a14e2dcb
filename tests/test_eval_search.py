"""eval.bm25 and eval.ance as people call them: real index, real server, real files."""

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from helpers_retriever import build_bm25

from convsearch.retriever.embedded import open_retriever
from eval import ance, bm25
from eval.queries import read_queries

ROOT = Path(__file__).resolve().parents[1]
PASSAGES = {
    "d1": "Hamlet is a tragedy by William Shakespeare",
    "d2": "Anne Hathaway was the wife of William Shakespeare",
    "d3": "Paris is the capital of France",
}
QUESTIONS = [
    {"qid": "q1", "question": "who wrote Hamlet", "context": [], "rewrite": "who wrote Hamlet", "fallback": False},
    {
        "qid": "q2",
        "question": "and his wife?",
        "context": ["who wrote Hamlet", "William Shakespeare"],
        "rewrite": "William Shakespeare wife",
        "fallback": False,
    },
    {
        "qid": "q3",
        "question": "capital?",
        "context": ["tell me of France", "a country"],
        "rewrite": "capital?",
        "fallback": True,
    },
]
ANCE_COMMAND = """
    --pretrained_encoder_path path/to/your/dense/retriever \
    --test_file_path path/to/rewrite/file/gennerated/by/rewriter \
    --passage_embeddings_dir_path "embedding/ance_topiocqa" \
    --qrel_output_dir data/topiocqa/qrel/dense \
    --output_trec_file filename/to/save/trec/file \
    --trec_gold_qrel_file_path data/topiocqa/dev.trec \
    --n_gpu 2 \
    --test_type rewrite
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("search")
    (folder / "collection.jsonl").write_text(
        "".join(json.dumps({"id": i, "contents": text}) + "\n" for i, text in PASSAGES.items())
    )
    (folder / "rewrites.jsonl").write_text("".join(json.dumps(record) + "\n" for record in QUESTIONS))
    (folder / "dev.trec").write_text("q1 0 d1 1\nq2 0 d2 1\nq3 0 d3 1\nq4 0 d1 1\n")
    build_bm25(folder / "collection.jsonl", folder / "index")
    return folder


def call(module: str, folder: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", module, *flags], cwd=ROOT, capture_output=True, text=True)


def bm25_flags(folder: Path, name: str, *more: str) -> list[str]:
    index = [] if "--server" in more else ["--index_dir_path", str(folder / "index")]
    files = ["--query_file", str(folder / "rewrites.jsonl"), "--gold_qrel_file_path", str(folder / "dev.trec")]
    return [*index, *files, "--retrieval_output_path", str(folder), "--output_file_name", name, *more]


def test_rewrites_are_searched_scored_and_counted(folder: Path) -> None:
    done = call("eval.bm25", folder, *bm25_flags(folder, "run.trec"))
    assert done.returncode == 0, done.stderr
    assert "1 rewrites fell back to the raw question" in done.stdout
    assert "1 of the qrels' queries missing from the run" in done.stdout
    lines = [line.split() for line in (folder / "run.trec").read_text().splitlines()]
    assert [line[2] for line in lines if line[0] == "q2"] == ["d2", "d1"]  # "wife" is in d2 alone
    assert {line[1] for line in lines} == {"Q0"}
    metrics = json.loads((folder / "run.metrics.json").read_text())
    assert metrics["MRR"] == 0.75  # 1, 1, 1 and the missing q4's 0
    assert metrics["fallbacks"] == 1


@pytest.mark.slow
def test_the_raw_question_and_all_history_are_other_texts(folder: Path) -> None:
    for query_type, mrr in (("question", 3 / 4), ("all_history", (1 + 1 / 2 + 1) / 4)):
        done = call("eval.bm25", folder, *bm25_flags(folder, f"{query_type}.trec", "--query_type", query_type))
        assert done.returncode == 0, done.stderr
        assert json.loads((folder / f"{query_type}.metrics.json").read_text())["MRR"] == pytest.approx(mrr)


@pytest.mark.slow
def test_a_server_gives_the_run_of_its_index(folder: Path) -> None:
    assert call("eval.bm25", folder, *bm25_flags(folder, "local.trec")).returncode == 0
    with open_retriever(f"embedded:{folder / 'index'}") as client:
        client.health()
        done = call("eval.bm25", folder, *bm25_flags(folder, "remote.trec", "--server", client.url))
        assert done.returncode == 0, done.stderr
        flags = [
            "--server",
            client.url,
            "--test_file_path",
            str(folder / "rewrites.jsonl"),
            "--output_trec_file",
            "ance.trec",
        ]
        flags += ["--trec_gold_qrel_file_path", str(folder / "dev.trec"), "--qrel_output_dir", str(folder)]
        assert call("eval.ance", folder, *flags).returncode == 0
    assert (folder / "remote.trec").read_text() == (folder / "local.trec").read_text()
    assert (folder / "ance.trec").read_text() == (folder / "local.trec").read_text().replace("bm25", "ance")


def test_rewrites_of_a_line_are_fused_by_reciprocal_rank(folder: Path, tmp_path: Path) -> None:
    """The first list is d1, d2; twice the second, d2: d2 has 1/62 + 2/61, d1 has 1/61."""
    file = tmp_path / "many.jsonl"
    rewrites = ["who wrote Hamlet, William Shakespeare", "Anne Hathaway", "Anne Hathaway"]
    file.write_text(json.dumps({"qid": "q2", "question": "?", "rewrite": rewrites[0], "rewrites": rewrites}) + "\n")
    runs = {}
    for name, flags in (
        ("one", ["--fuse", "none"]),
        ("fused", ["--fuse", "rrf"]),
        ("top", ["--fuse", "rrf", "--top_n", "1"]),
    ):
        done = call("eval.bm25", folder, *bm25_flags(folder, f"{name}.trec", *flags), "--query_file", str(file))
        assert done.returncode == 0, done.stderr
        runs[name] = [line.split()[2::2] for line in (folder / f"{name}.trec").read_text().splitlines()]
    assert [docid for docid, _ in runs["one"]] == ["d1", "d2"]
    assert [docid for docid, _ in runs["fused"]] == ["d2", "d1"]
    assert [float(score) for _, score in runs["fused"]] == pytest.approx([1 / 62 + 2 / 61, 1 / 61])
    assert runs["top"] == runs["fused"][:1]


def test_queries_of_the_constant_rules(tmp_path: Path) -> None:
    file = tmp_path / "c.json"
    lines = [
        {"qid": "1", "question": "e?", "context": ["a?", "b.", "c?", "d."]},
        {"qid": "2", "question": "a?", "context": []},
    ]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    expected = {
        "question": "e?", "previous": "c? d. e?", "previous_question": "c? e?", "previous_answer": "d. e?",
        "all_history": "a? b. c? d. e?",
    }  # fmt: skip
    for query_type, text in expected.items():
        assert read_queries(file, query_type) == ({"1": [text], "2": ["a?"]}, 0)


def test_the_original_ance_command_is_accepted_and_says_what_is_missing(folder: Path) -> None:
    args = ance.build_parser().parse_args(shlex.split(ANCE_COMMAND))
    assert args.test_file_path == ["path/to/rewrite/file/gennerated/by/rewriter"]
    assert (args.qrel_output_dir, args.output_trec_file, args.n_gpu) == (
        "data/topiocqa/qrel/dense",
        ["filename/to/save/trec/file"],
        2,
    )
    done = call("eval.ance", folder, *shlex.split(ANCE_COMMAND))
    assert done.returncode == 2
    assert done.stderr.startswith("error: dense search")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--bm25_k1", "0.82"], "was built with k1=0.9"),
        (["--top_n", "0"], "must be at least 1"),
        (["--output_file_name", "a.trec", "b.trec"], "give one name per file"),
        (["--fuse", "rrf"], "query 'q1' has no field 'rewrites': run convsearch.infer with --n 2 or more"),
        (["--fuse", "rrf", "--query_type", "question"], "--fuse rrf fuses rewrites, not the query type question"),
    ],
)
def test_mistakes_are_one_sentence(folder: Path, more: list[str], sentence: str) -> None:
    done = call("eval.bm25", folder, *bm25_flags(folder, "x.trec"), *more)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert sentence in done.stderr


def test_lines_without_the_text_are_named(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text(
        '{"qid": "q1", "question": "a", "rewrite": "b"}\n{"qid": "q2", "question": "a"}\n'
    )
    done = call("eval.bm25", folder, *bm25_flags(folder, "x.trec"), "--query_file", str(tmp_path / "bad.jsonl"))
    assert done.returncode == 2
    assert f"{tmp_path / 'bad.jsonl'}:2: query 'q2' has no field 'rewrite'" in done.stderr


def test_one_of_index_and_server(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bm25.build_parser().parse_args(["--query_file", "a", "--output_file_name", "b", "--not_perform_evaluation"])
    assert "one of the arguments --index_dir_path --server is required" in capsys.readouterr().err
