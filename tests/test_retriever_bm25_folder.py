"""Index folders of BM25: damaged ones, the command that builds them, and leftovers of killed builds."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers_retriever import build_bm25

from convsearch import checksums
from retriever_server import index as index_command
from retriever_server.bm25.index import Bm25Index

PASSAGES = {"d1": "The cat and a dog", "d2": "cat, Cat: bird!", "d3": "", "d4": "dog's cat"}


def write(path: Path, passages: dict[str, str]) -> Path:
    path.write_text("".join(json.dumps({"id": docid, "contents": text}) + "\n" for docid, text in passages.items()))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("bm25")
    build_bm25(write(root / "collection.jsonl", PASSAGES), root / "index")
    return root / "index"


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (['{"id": "a", "contents": "x"}', '{"id": "b"}'], r"c\.jsonl:2: field 'contents' must be a string, got None"),
        (['{"id": "a", "contents": "x"}', "", '{"id": "a", "contents": "y"}'], r"c\.jsonl:3: docid 'a' is given twice"),
        (['{"id": 7, "contents": "x"}'], r"c\.jsonl:1: field 'id' must be a non-empty string, got 7"),
        (['{"id": "\\ud800", "contents": "x"}'], r"c\.jsonl:1: field 'id' is not valid Unicode"),
        (['{"id": "a", "contents": "x"}', '{"id": "b", "cont'], r"c\.jsonl:2: not a line of JSON"),
        (["[1]"], r"c\.jsonl:1: expected a JSON object"),
        ([], "no passage"),
    ],
)
def test_bad_collections_leave_nothing_behind(tmp_path: Path, lines: list[str], message: str) -> None:
    (tmp_path / "c.jsonl").write_text("\n".join(lines))
    with pytest.raises(ValueError, match=message):
        build_bm25(tmp_path / "c.jsonl", tmp_path / "index")
    assert [path.name for path in tmp_path.iterdir()] == ["c.jsonl"]


@pytest.mark.parametrize(
    ("k1", "b"), [(-1, 0.4), (0.9, 1.1), (float("nan"), 0.4), (0.9, float("nan")), (float("inf"), 0)]
)
def test_bad_parameters(tmp_path: Path, k1: float, b: float) -> None:
    with pytest.raises(ValueError, match="k1 >= 0 and 0 <= b <= 1"):
        build_bm25(tmp_path / "c.jsonl", tmp_path / "index", k1, b)


def damage_manifest(**changes: object):  # type: ignore[no-untyped-def]
    def change(folder: Path) -> None:
        path = folder / "manifest.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def cut(name: str):  # type: ignore[no-untyped-def]
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-1])


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (shutil.rmtree, "there is no index folder"),
        (lambda folder: (folder / "manifest.json").unlink(), "has no manifest.json"),
        (lambda folder: (folder / "manifest.json").write_text('{"format"'), "manifest.json is damaged"),
        (lambda folder: (folder / "manifest.json").write_text("[]"), "manifest.json is damaged"),
        (damage_manifest(format="faiss"), "has format 'faiss', this program reads 'convsearch-bm25'"),
        (damage_manifest(version=99), "has version 99, this program reads 2"),
        (damage_manifest(analyzer="german"), "has analyzer 'german'"),
        (damage_manifest(k1="0.9"), "field 'k1' must be float"),
        (damage_manifest(num_passages=5), r"docids_offsets.npy holds int64\[5\], the manifest counts int64\[6\]"),
        (
            lambda folder: np.save(folder / "docids_offsets.npy", np.zeros(4, np.int64)),
            r"docids_offsets.npy holds int64\[4\]",
        ),
        (
            lambda folder: np.save(folder / "postings_codes.npy", np.zeros(6, np.float64)),
            r"postings_codes.npy holds float64",
        ),
        (
            lambda folder: np.save(folder / "code_gain.npy", np.array([{}], object), allow_pickle=True),
            "code_gain.npy is cut short or damaged",
        ),
        (
            lambda folder: np.save(folder / "term_frequencies.npy", np.zeros(3, np.int32)),
            "term_frequencies.npy is damaged",
        ),
        (lambda folder: (folder / "postings_docs.npy").unlink(), "postings_docs.npy is missing"),
        (lambda folder: (folder / "postings_docs.npy").write_bytes(b""), "postings_docs.npy is cut short or damaged"),
        (
            lambda folder: (folder / "postings_docs.npy").write_bytes(b"nonsense" * 40),
            "postings_docs.npy is cut short or damaged",
        ),
        *(
            (cut(f"{name}.npy"), f"{name}.npy is cut short")
            for name in (
                "postings_codes",
                "contents",
                "docids",
                "docids_hashes",
                "terms",
                "terms_order",
                "contents_offsets",
                "term_starts",
            )
        ),
    ],
)
def test_damaged_folders(folder: Path, tmp_path: Path, harm, message: str) -> None:  # type: ignore[no-untyped-def]
    shutil.copytree(folder, tmp_path / "index")
    harm(tmp_path / "index")
    if (tmp_path / "index").is_dir():
        checksums.seal(tmp_path / "index")  # what these checks find out is also found in files without a checksum
    with pytest.raises(ValueError, match=message) as raised:
        Bm25Index.load(tmp_path / "index")
    assert "\n" not in str(raised.value)


def run_index(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["index", "bm25", "--quiet", *map(str, arguments)])
    index_command.main()


def test_index_command_reuses_and_refuses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    collection, output = write(tmp_path / "c.jsonl", PASSAGES), tmp_path / "deep" / "index"
    run_index(monkeypatch, "--collection", collection, "--output", output)
    assert "built in" in capsys.readouterr().out
    first = {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in output.iterdir()}
    assert not any(path.suffix == ".pkl" or "tmp" in path.name or "tokens" in path.name for path in output.iterdir())
    run_index(monkeypatch, "--collection", collection, "--output", output)
    assert "reused" in capsys.readouterr().out
    assert {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in output.iterdir()} == first
    with pytest.raises(ValueError, match=r"k1 0.9 \(asked: 1.2\)"):
        run_index(monkeypatch, "--collection", collection, "--output", output, "--k1", "1.2")
    before = Bm25Index.load(output)
    run_index(monkeypatch, "--collection", collection, "--output", output, "--k1", "1.2", "--overwrite")
    after = Bm25Index.load(output)
    assert (before.k1, after.k1) == (0.9, 1.2)
    assert before.index_id != after.index_id
    assert before.search(["cat"], 1) != after.search(["cat"], 1)  # the old one's files stay readable while it is open
    write(collection, {"d1": "other"})
    with pytest.raises(ValueError, match="collection"):
        run_index(monkeypatch, "--collection", collection, "--output", output, "--k1", "1.2")
    assert [path.name for path in output.parent.iterdir()] == ["index"]


def test_a_damaged_index_is_never_reused(tmp_path: Path, folder: Path) -> None:
    collection = write(tmp_path / "c.jsonl", PASSAGES)
    shutil.copytree(folder, tmp_path / "index")
    cut("postings_docs.npy")(tmp_path / "index")
    with pytest.raises(ValueError, match=r"index is damaged: postings_docs\.npy has \d+ bytes where"):
        build_bm25(collection, tmp_path / "index")
    index = build_bm25(collection, tmp_path / "index", overwrite=True)
    assert index.gold_ranks(["cat"], [["d2"]], 1) == [1]


def test_index_command_leaves_other_folders_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    collection = write(tmp_path / "c.jsonl", PASSAGES)
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1").write_text("years of work")
    with pytest.raises(ValueError, match="is not an index folder"):
        run_index(monkeypatch, "--collection", collection, "--output", tmp_path / "thesis", "--overwrite")
    assert (tmp_path / "thesis" / "chapter1").read_text() == "years of work"
    with pytest.raises(ValueError, match="there is no collection file"):
        run_index(monkeypatch, "--collection", tmp_path / "none.jsonl", "--output", tmp_path / "x")


def test_leftovers_of_a_killed_build_are_removed(tmp_path: Path) -> None:
    dead, alive = tmp_path / "index.tmp-4194399", tmp_path / "index.tmp-1"
    dead.mkdir()
    alive.mkdir()
    build_bm25(write(tmp_path / "c.jsonl", PASSAGES), tmp_path / "index")
    assert not dead.exists()
    assert alive.exists()
