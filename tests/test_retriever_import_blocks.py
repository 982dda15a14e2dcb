"""The reference's pickled vectors: read where they are arrays alone, refused and not run where they are anything
else."""

import json
import os
import pickle
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from retriever_server import index as index_command
from retriever_server.dense import import_blocks
from retriever_server.dense.index import DenseIndex


class Malicious:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("protocol", range(2, 6))
def test_arrays_of_every_protocol_are_read(tmp_path: Path, protocol: int) -> None:
    arrays = [
        np.arange(200_000, dtype=np.float32).reshape(1000, 200),  # large enough to be memory-mapped
        np.asfortranarray(np.arange(6, dtype=np.float64).reshape(2, 3)),
        np.array([1, 5, 3]),
        np.array(["a", "läng", ""]),
        np.array(["x", "y"], object),
    ]
    for number, array in enumerate(arrays):
        (tmp_path / str(number)).write_bytes(pickle.dumps(array, protocol=protocol))
        found = import_blocks.read_arrays(tmp_path / str(number))
        assert np.array_equal(np.asarray(found, array.dtype), array)
    (tmp_path / "list").write_bytes(pickle.dumps(["7", 8], protocol=protocol))
    assert import_blocks.read_arrays(tmp_path / "list") == ["7", 8]


def test_anything_else_in_a_pickle_is_refused_and_not_run(tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    whole = pickle.dumps(np.arange(50_000), protocol=4)
    bad = {
        "call": pickle.dumps(Malicious(marker)),
        "inside an object array": pickle.dumps(np.array([Malicious(marker)], object)),
        "a class": pickle.dumps(Path("x")),
        "eval": b"cbuiltins\neval\n(S'1'\ntR.",
        "numpy's loader": b"cnumpy\nload\n(S'x'\ntR.",
        "an attribute of a dtype": b"cnumpy\ndtype\n}S'x'\nI1\nsb.",
        "cut": whole[: len(whole) // 2],
        "no pickle": b"hello",
        "empty": b"",
    }
    for name, data in bad.items():
        (tmp_path / "bad.pb").write_bytes(data)
        with pytest.raises(ValueError, match="is refused"):
            import_blocks.read_arrays(tmp_path / "bad.pb")
        assert not marker.exists(), name
    pickle.loads(bad["call"])  # the trap itself works
    assert marker.exists()


def test_imports_by_command_with_texts_in_another_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    vectors = np.eye(3, dtype=np.float32)
    (tmp_path / "emb.pkl").write_bytes(pickle.dumps(vectors, protocol=4))
    (tmp_path / "ids.pkl").write_bytes(pickle.dumps(np.array([30, 10, 20])))
    (tmp_path / "texts.jsonl").write_text(
        "".join(json.dumps({"id": str(n), "contents": f"text {n}"}) + "\n" for n in (10, 20, 30, 40))
    )
    command = [
        "index",
        "import-blocks",
        "--embeddings",
        str(tmp_path / "emb.pkl"),
        "--corpus_docid_path",
        str(tmp_path / "ids.pkl"),
    ]
    command += ["--collection", str(tmp_path / "texts.jsonl"), "--output", str(tmp_path / "index")]
    monkeypatch.setattr(sys, "argv", command)
    index_command.main()
    assert "3 passages x 3 float32" in capsys.readouterr().out
    index = DenseIndex(tmp_path / "index", lambda texts: vectors[[1]])
    assert index.search(["anything"], 1) == [[("10", 1.0)]]
    assert index.contents(["30", "10"]) == ["text 30", "text 10"]
    with pytest.raises(ValueError, match="exists already"):
        index_command.main()
    (tmp_path / "ids.pkl").write_bytes(pickle.dumps(["1", "1", "2"]))
    command[-1] = str(tmp_path / "other")
    with pytest.raises(ValueError, match="given twice"):
        index_command.main()
    assert not (tmp_path / "other").exists()
