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


def test_queries_are_cut_at_max_concat_length(folder: Path) -> None:
    short = ance.open_index(ance.build_parser().parse_args(flags(folder, "--max_concat_length", "4")[1:]))
    assert short(["who wrote hamlet"], 3) == short(["who wrote"], 3)
    whole = ance.open_index(ance.build_parser().parse_args(flags(folder, "--use_gpu", "False")[1:]))
    assert whole(["who wrote hamlet"], 3) != whole(["who wrote"], 3)


def test_other_folders_are_refused_with_what_to_do(folder: Path, tmp_path: Path) -> None:
    for more, sentence in (
        (["--passage_embeddings_dir_path", str(tmp_path)], "import-blocks --embeddings"),
        (["--pretrained_encoder_path", str(tmp_path / "none")], "there is no folder"),
    ):
        with pytest.raises(ValueError, match=sentence):
            ance.open_index(ance.build_parser().parse_args(flags(folder, *more)[1:]))
    args = ance.build_parser().parse_args(flags(folder)[1:])
    args.passage_embeddings_dir_path = None
    with pytest.raises(ValueError, match="needs --passage_embeddings_dir_path"):
        ance.open_index(args)
