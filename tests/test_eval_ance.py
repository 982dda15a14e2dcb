"""eval.ance over an index folder: the reference's command, several files, and what is refused."""

import json
import sys
from pathlib import Path

import helpers_encoders
import numpy as np
import pytest

from eval import ance
from retriever_server.dense import build as dense_build
from retriever_server.dense.index import DenseIndex


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("ance")
    helpers_encoders.build_ance(root / "model")
    passages = {"d1": "who wrote hamlet", "d2": "capital of france", "d3": "many words"}
    (root / "collection.jsonl").write_text(
        "".join(json.dumps({"id": docid, "contents": text}) + "\n" for docid, text in passages.items())
    )
    options = dense_build.Settings(device="cpu", progress=False)
    dense_build.build([root / "collection.jsonl"], root / "index", str(root / "model"), options)
    for name, texts in (
        ("a", {"q1": "who wrote hamlet", "q2": "capital of france"}),
        ("b", {"q1": "many words", "q2": "capital of france"}),
    ):
        lines = [json.dumps({"qid": qid, "question": text, "rewrite": text}) for qid, text in texts.items()]
        (root / f"{name}.jsonl").write_text("\n".join(lines))
    (root / "dev.trec").write_text("q1 0 d1 1\nq2 0 d2 1\n")
    return root


def flags(folder: Path, *more: str) -> list[str]:
    """The flags of the original project's README, over two test files."""
    return [
        *(
            "ance",
            "--pretrained_encoder_path",
            str(folder / "model"),
            "--test_file_path",
            str(folder / "a.jsonl"),
            str(folder / "b.jsonl"),
        ),
        *("--passage_embeddings_dir_path", str(folder / "index"), "--qrel_output_dir", str(folder / "runs")),
        *(
            "--output_trec_file",
            "a.trec",
            "b.trec",
            "--trec_gold_qrel_file_path",
            str(folder / "dev.trec"),
            "--n_gpu",
            "0",
        ),
        *("--test_type", "rewrite", "--top_k", "2", *more),
    ]


def test_two_files_are_searched_and_measured(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", flags(folder))
    ance.main()
    index = DenseIndex.load(folder / "index", device="cpu")
    for name, queries in (("a", ["who wrote hamlet", "capital of france"]), ("b", ["many words", "capital of france"])):
        lines = [line.split() for line in (folder / "runs" / f"{name}.trec").read_text().splitlines()]
        hits = index.search(queries, 2)
        assert [(line[0], line[2]) for line in lines] == [
            (f"q{q + 1}", docid) for q in range(2) for docid, _ in hits[q]
        ]
        assert {line[5] for line in lines} == {"ance"}
        metrics = json.loads((folder / "runs" / f"{name}.metrics.json").read_text())
        golds = index.gold_ranks(queries, [["d1"], ["d2"]], 2)
        assert metrics["MRR"] == pytest.approx(np.mean([0 if rank is None else 1 / rank for rank in golds]))


def test_queries_are_cut_at_max_concat_length(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", flags(folder, "--max_concat_length", "4"))
    ance.main()
    lines = [line.split() for line in (folder / "runs" / "a.trec").read_text().splitlines()][:2]
    index = DenseIndex.load(folder / "index", device="cpu")
    cut, whole = index.search(["who wrote", "who wrote hamlet"], 2)
    found = [(line[2], float(line[4])) for line in lines]
    assert found == [(docid, pytest.approx(score, rel=1e-5)) for docid, score in cut]
    assert found != [(docid, pytest.approx(score, rel=1e-5)) for docid, score in whole]


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (("--passage_embeddings_dir_path", "{}"), "import-blocks --embeddings"),
        (("--pretrained_encoder_path", "{}/none"), "there is no folder"),
    ],
)
def test_other_folders_are_refused_with_what_to_do(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: tuple[str, ...], sentence: str
) -> None:
    monkeypatch.setattr(sys, "argv", flags(folder, *(word.format(tmp_path) for word in more)))
    with pytest.raises(ValueError, match=sentence):
        ance.main()


def test_an_index_folder_is_needed() -> None:
    with pytest.raises(ValueError, match="needs --passage_embeddings_dir_path"):
        ance.index_folder(None)
