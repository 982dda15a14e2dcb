"""Building dense indexes: what a build writes, kills and resumes, and bad input."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from retriever_server.dense import build as dense_build
from retriever_server.dense import folder as folders
from retriever_server.dense.index import DenseIndex

ROOT = Path(__file__).resolve().parents[1]


def brute(vectors: np.ndarray, queries: np.ndarray) -> np.ndarray:
    """Scores [Q, N]: float64 products, summed, rounded to float32."""
    return (queries.astype(np.float64) @ vectors.astype(np.float64).T).astype(np.float32)


def brute_beating(scores: np.ndarray, golds: Sequence[Sequence[int]]) -> list[int]:
    found = []
    for row, some in zip(scores, golds, strict=True):
        best = min(some, key=lambda g: (-row[g], g))
        found.append(int((row > row[best]).sum() + (row[:best] == row[best]).sum()))
    return found


# ---- builds


def build_command(root: Path, *more: str) -> list[str]:
    flags = [
        "--collection",
        str(root / "collection.jsonl"),
        "--model_name_or_path",
        str(root / "model"),
        "--output",
        str(root / "index"),
    ]
    return [
        sys.executable,
        "-m",
        "retriever_server.index",
        "dense",
        *flags,
        "--block",
        "7",
        "--max_length",
        "16",
        "--device",
        "cpu",
        "--quiet",
        *more,
    ]


def make_inputs(root: Path, passages: int) -> None:
    import helpers_encoders

    helpers_encoders.build_ance(root / "model")
    lines = [
        json.dumps({"id": f"d{n}", "contents": "" if n == 5 else f"passage {n} of {'many ' * (n % 9)}words"})
        for n in range(passages)
    ]
    (root / "collection.jsonl").write_text("\n".join(lines) + "\n")


def test_a_build_is_what_its_encoder_says(tmp_path: Path) -> None:
    from retriever_server.encoder import Encoder

    make_inputs(tmp_path, 30)
    options = dense_build.Settings(block=7, max_length=16, batch_size=4, device="cpu", progress=False)
    assert dense_build.build([tmp_path / "collection.jsonl"], tmp_path / "index", str(tmp_path / "model"), options)
    assert not dense_build.build([tmp_path / "collection.jsonl"], tmp_path / "index", str(tmp_path / "model"), options)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["collection.jsonl", "index", "model"]
    index = DenseIndex.load(tmp_path / "index", device="cpu")
    assert (index.name, index.num_passages, index.manifest.max_length, index.manifest.dim) == ("ance", 30, 16, 768)
    encoder = Encoder.load(str(tmp_path / "model"), "cpu")
    texts = index.contents([f"d{n}" for n in range(30)])
    stored = np.load(tmp_path / "index" / "vectors.npy").reshape(30, 768)
    np.testing.assert_allclose(stored, encoder.encode(texts, 16), atol=1e-4)
    ranks = index.gold_ranks(["passage 3"] * 2, [["d3"], ["d9"]], 30)
    scores = brute(stored, encoder.encode(["passage 3"], 512))
    assert ranks == [count + 1 for count in brute_beating(np.repeat(scores, 2, 0), [[3], [9]])]
    with pytest.raises(ValueError, match="holds an index with the id"):
        dense_build.build(
            [tmp_path / "collection.jsonl"],
            tmp_path / "index",
            str(tmp_path / "model"),
            dense_build.Settings(max_length=8),
        )
    (tmp_path / "model" / "special.json").write_text("{}")
    with pytest.raises(ValueError, match="is not the encoder of the index"):
        DenseIndex.load(tmp_path / "index", device="cpu")


@pytest.mark.slow
def test_killed_at_any_moment_and_run_again_gives_the_same_folder(tmp_path: Path) -> None:
    make_inputs(tmp_path, 60)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    assert subprocess.run(build_command(tmp_path), cwd=ROOT, env=environment).returncode == 0
    (tmp_path / "index").rename(tmp_path / "whole")
    done = tmp_path / "index.building" / "done"
    for blocks in (1, 4):
        process = subprocess.Popen(build_command(tmp_path, "--batch_size", "1"), cwd=ROOT, env=environment)
        while process.poll() is None and (not done.is_dir() or len(list(done.glob("0*[0-9]"))) < blocks):
            time.sleep(0.005)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        assert not (tmp_path / "index").exists()
    marks = {path.name: path.stat().st_mtime_ns for path in done.iterdir()}
    assert len(marks) >= 4
    flags = ["--nproc_per_node", "2", "--master_port", "0", "-m", *build_command(tmp_path, "--batch_size", "1")[2:]]
    again = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", *flags], cwd=ROOT, env=environment
    )
    assert again.returncode == 0
    for path in sorted((tmp_path / "whole").iterdir()):
        if path.name == "vectors.npy":  # other batches: other last bits
            np.testing.assert_allclose(np.load(path), np.load(tmp_path / "index" / path.name), atol=1e-4)
        elif not path.name.startswith(("codes", "checksums")):
            assert path.read_bytes() == (tmp_path / "index" / path.name).read_bytes(), path.name


def test_a_build_that_goes_on_leaves_finished_blocks_alone(tmp_path: Path) -> None:
    make_inputs(tmp_path, 20)
    building = tmp_path / "index.building"
    options = dense_build.Settings(block=7, max_length=16, device="cpu", progress=False)

    class Stop(Exception):
        pass

    def failing(*_: Any) -> None:
        raise Stop

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(folders, "finish", failing)
        with pytest.raises(Stop):
            dense_build.build([tmp_path / "collection.jsonl"], tmp_path / "index", str(tmp_path / "model"), options)
    room = np.load(building / "vectors.npy", mmap_mode="r+")
    room[: 7 * 768] = 1  # a finished block must not be encoded again
    room.flush()
    (building / "done" / "0000000007").unlink()
    room[7 * 768 : 14 * 768] = 1  # an unfinished one must
    room.flush()
    with pytest.raises(ValueError, match="unfinished build of another"):
        dense_build.build(
            [tmp_path / "collection.jsonl"],
            tmp_path / "index",
            str(tmp_path / "model"),
            dense_build.Settings(max_length=8),
        )
    assert dense_build.build([tmp_path / "collection.jsonl"], tmp_path / "index", str(tmp_path / "model"), options)
    stored = np.load(tmp_path / "index" / "vectors.npy").reshape(20, 768)
    assert (stored[:7] == 1).all()
    assert not (stored[7:] == 1).any()


def test_bad_collections_and_settings_are_named(tmp_path: Path) -> None:
    make_inputs(tmp_path, 2)

    def attempt(text: str) -> None:
        (tmp_path / "bad.jsonl").write_text(text)
        dense_build.build(
            [tmp_path / "bad.jsonl"],
            tmp_path / "bad",
            str(tmp_path / "model"),
            dense_build.Settings(device="cpu", progress=False),
        )

    for text, sentence in (
        ('{"id": "a", "contents": "x"}\n{"id": "a", "contents": "y"}\n', "'a' is given twice"),
        ('{"id": "", "contents": "x"}\n', "bad.jsonl:1: field 'id'"),
        ('{"id": "a"}\n', "field 'contents' must be a string"),
        ("\n", "no passage"),
    ):
        with pytest.raises(ValueError, match=sentence):
            attempt(text)
        assert not (tmp_path / "bad").exists()
    for wrong in ({"dtype": "int4"}, {"block": 0}, {"batch_size": 0}):
        with pytest.raises(ValueError, match="must be"):
            dense_build.Settings(**wrong)
