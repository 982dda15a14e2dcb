"""Dense search and gold ranks: by hand, against brute force with ties, in every coarse form, through folders, shards,
imports and kills."""

import importlib.util
import json
import pickle
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import helpers_cluster
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retriever_server.dense import import_blocks
from retriever_server.dense.codes import Codes
from retriever_server.dense.device import Device
from retriever_server.dense.flat import Flat, Scanner, Shards, bytes_multiply_exactly, count_beating
from retriever_server.dense.index import DenseIndex
from retriever_server.dense.manifest import Manifest
from retriever_server.dense.ray_shards import spread

ROOT = Path(__file__).resolve().parents[1]
COARSE = ["int8", "float32", "half"]


def scanner(vectors: np.ndarray, coarse: str) -> Scanner:
    if coarse == "half":
        return Device(vectors, Codes.of(vectors), "cpu")
    if coarse == "int8" and not bytes_multiply_exactly():
        pytest.skip("torch's product of bytes is not exact on this processor")
    return Flat(vectors, coarse=coarse)


def brute(vectors: np.ndarray, queries: np.ndarray) -> np.ndarray:
    """Scores [Q, N]: float64 products, summed, rounded to float32."""
    return (queries.astype(np.float64) @ vectors.astype(np.float64).T).astype(np.float32)


def brute_beating(scores: np.ndarray, golds: Sequence[Sequence[int]]) -> list[int]:
    found = []
    for row, some in zip(scores, golds, strict=True):
        best = min(some, key=lambda g: (-row[g], g))
        found.append(int((row > row[best]).sum() + (row[:best] == row[best]).sum()))
    return found


def capped(counts: Any, depth: int) -> list[int]:
    return [min(int(count), depth) for count in counts]


@pytest.mark.parametrize("coarse", COARSE)
def test_by_hand(coarse: str) -> None:
    vectors = np.array([[1, 0], [0, 2], [1, 0], [-1, -1], [0, 0]], np.float32)
    queries = np.array([[1, 1], [1, 0], [-1, 0], [0, 0]], np.float32)
    # scores: 1 2 1 -2 0 | 1 0 1 -1 0 | -1 0 -1 1 0 | all 0
    flat = scanner(vectors, coarse)
    assert count_beating(flat, queries, [[0], [0], [0], [0]], 100).tolist() == [1, 0, 3, 0]
    assert count_beating(flat, queries, [[2], [2], [2], [2]], 100).tolist() == [2, 1, 4, 2]
    assert count_beating(flat, queries, [[3, 2], [4, 1], [4, 3], [4]], 100).tolist() == [2, 2, 0, 4]
    assert [(scores.tolist(), rows.tolist()) for scores, rows in flat.top(queries[:2], 3)] == [
        ([2, 1, 1], [1, 0, 2]),
        ([1, 1, 0], [0, 2, 1]),
    ]
    assert flat.top(queries[:1], 99)[0][1].tolist() == [1, 0, 2, 4, 3]


@settings(max_examples=40)
@given(
    st.integers(0, 2**32),
    st.sampled_from(COARSE),
    st.sampled_from([np.float32, np.float16]),
    st.integers(1, 120),
    st.integers(1, 30),
)
def test_small_whole_numbers_tie_and_rank_as_brute_force(
    seed: int, coarse: str, dtype: type, depth: int, k: int
) -> None:
    rng = np.random.default_rng(seed)
    vectors = rng.integers(-2, 3, (rng.integers(1, 120), rng.integers(1, 20))).astype(dtype)
    queries = rng.integers(-2, 3, (rng.integers(1, 9), vectors.shape[1])).astype(np.float32)
    golds = [rng.integers(len(vectors), size=rng.integers(1, 4)).tolist() for _ in queries]
    scores, flat = brute(vectors, queries), scanner(vectors, coarse)
    assert capped(count_beating(flat, queries, golds, depth), depth) == capped(brute_beating(scores, golds), depth)
    for row, (found, rows) in zip(scores, flat.top(queries, k), strict=True):
        assert rows.tolist() == np.lexsort((np.arange(len(row)), -row))[:k].tolist()
        assert found.tolist() == row[rows].tolist()


@pytest.mark.parametrize("coarse", COARSE)
def test_vectors_of_one_number(coarse: str) -> None:
    vectors, queries = np.array([[3], [-1], [2], [2], [0]], np.float32), np.array([[1], [-2], [0.5]], np.float32)
    flat = scanner(vectors, coarse)
    for _ in range(20):  # a product that reads strange memory is right now and then
        assert count_beating(flat, queries, [[3], [0], [0, 1]], 9).tolist() == [2, 4, 0]
        assert [rows.tolist() for _, rows in flat.top(queries, 3)] == [[0, 2, 3], [1, 4, 2], [0, 2, 3]]


@pytest.mark.parametrize("coarse", COARSE)
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_vectors_that_all_point_one_way_and_differ_in_the_last_bits(coarse: str, dtype: type) -> None:
    rng = np.random.default_rng(3)
    base = rng.standard_normal(48) * 5
    vectors = (base + rng.standard_normal((20_000, 48)) * 0.05).astype(dtype)  # several blocks
    vectors[10_000:10_050] = vectors[7]  # equal vectors
    vectors[12_000:12_050] = np.nextafter(vectors[7], dtype(100))  # and all but equal ones
    queries = (base + rng.standard_normal((30, 48)) * 0.3).astype(np.float32)
    golds = [[int(g)] for g in rng.integers(20_000, size=28)] + [[10_020], [12_020, 10_049]]
    scores, flat = brute(vectors, queries), scanner(vectors, coarse)
    assert capped(count_beating(flat, queries, golds, 5_000), 5_000) == capped(brute_beating(scores, golds), 5_000)
    for row, (_, rows) in zip(scores[:5], flat.top(queries[:5], 40), strict=True):
        assert rows.tolist() == np.lexsort((np.arange(len(row)), -row))[:40].tolist()


def test_codes_keep_their_bounds() -> None:
    rng = np.random.default_rng(0)
    vectors = np.concatenate(
        [rng.standard_normal((50, 9)) * 10.0 ** rng.integers(-6, 6, (50, 1)), np.zeros((2, 9)), np.full((1, 9), 1e-30)]
    )
    codes = Codes.of(vectors.astype(np.float32))
    centred = vectors.astype(np.float32).astype(np.float64) - codes.mean
    away = np.linalg.norm(centred - codes.codes * codes.scale[:, None].astype(np.float64), axis=1)
    assert (away <= codes.error).all()
    assert (np.linalg.norm(centred, axis=1) <= codes.norm).all()
    assert (codes.error <= codes.norm * 0.02 + 1e-30).all()  # 1/254 of the largest number for each of nine, at most


def test_ranks_are_those_of_faiss() -> None:
    faiss = pytest.importorskip("faiss", reason="faiss-cpu is not installed")
    rng = np.random.default_rng(5)
    vectors, queries = rng.standard_normal((5_000, 64), np.float32), rng.standard_normal((40, 64), np.float32)
    index = faiss.IndexFlatIP(64)
    index.add(vectors)
    _, rows = index.search(queries, 100)
    golds = [[int(row[place])] for place, row in enumerate(rows)]
    assert count_beating(Flat(vectors), queries, golds, 100).tolist() == list(range(40))


# ---- folders


def import_folder(root: Path, vectors: np.ndarray, docids: Sequence[str], name: str, dtype: str = "float32") -> Path:
    (root / name).mkdir()
    half = len(docids) // 2
    for number, part in enumerate((slice(0, half), slice(half, None))):
        (root / name / f"passage__emb_p__data_obj_{number}.pb").write_bytes(pickle.dumps(vectors[part], protocol=4))
        ids = np.array(docids[part]) if number else np.array(docids[part], object)
        (root / name / f"passage__embid_p__data_obj_{number}.pb").write_bytes(pickle.dumps(ids, protocol=2))
    import_blocks.convert(root / name, None, [], root / f"{name}.index", dtype, overwrite=False)
    return root / f"{name}.index"


def test_shards_and_one_index_agree(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    vectors = rng.integers(-1, 2, (60, 6)).astype(np.float32)  # many ties
    docids = [f"p{number}" for number in range(60)]
    queries = {f"q{number}": rng.integers(-2, 3, 6).astype(np.float32) for number in range(25)}

    def encode(texts: Sequence[str]) -> np.ndarray:
        return np.stack([queries[text] for text in texts])

    whole = DenseIndex(import_folder(tmp_path, vectors, docids, "whole"), encode)
    shards = Shards([(a, Flat(vectors[a:b])) for a, b in ((0, 11), (11, 40), (40, 60))])
    split = DenseIndex(whole.folder, encode, shards)
    golds = [[docids[g] for g in rng.integers(60, size=rng.integers(1, 4))] for _ in queries]
    expected = [
        count + 1
        for count in brute_beating(
            brute(vectors, encode(list(queries))), [[int(d[1:]) for d in some] for some in golds]
        )
    ]
    for index in (whole, split):
        assert index.gold_ranks(list(queries), golds, 100) == expected
        assert index.gold_ranks(list(queries), golds, 10) == [rank if rank <= 10 else None for rank in expected]
        assert index.search(list(queries), 7) == whole.search(list(queries), 7)
        assert (index.num_passages, index.missing(["p3", "nobody", "p59"])) == (60, ["nobody"])
        assert index.gold_ranks([], [], 5) == index.search([], 5) == []
        for call, sentence in (
            (lambda i=index: i.gold_ranks(["q1"], [["nobody"]], 5), "'nobody' is not in the index"),
            (lambda i=index: i.gold_ranks(["q1"], [[]], 5), "at least one gold"),
            (lambda i=index: i.gold_ranks(["q1"], [["p1"]], 0), "depth must be at least 1"),
            (lambda i=index: i.gold_ranks(["q1"], [], 5), "1 queries but 0 lists"),
            (lambda i=index: i.search(["q1"], 0), "k must be at least 1"),
            (lambda i=index: i.contents(["p1"]), "no texts"),
        ):
            with pytest.raises(ValueError, match=sentence):
                call()


def test_half_precision_on_disk_ranks_what_is_on_disk(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    vectors, queries = rng.standard_normal((300, 16), np.float32), rng.standard_normal((20, 16), np.float32)
    folder = import_folder(tmp_path, vectors, [str(i) for i in range(300)], "halves", "float16")
    index = DenseIndex(folder, lambda texts: queries[[int(text) for text in texts]])
    golds = rng.integers(300, size=20)
    expected = brute_beating(brute(vectors.astype(np.float16), queries), golds[:, None].tolist())
    assert index.gold_ranks([str(i) for i in range(20)], [[str(g)] for g in golds], 300) == [
        count + 1 for count in expected
    ]


def test_a_damaged_folder_is_refused(tmp_path: Path) -> None:
    folder = import_folder(tmp_path, np.eye(4, dtype=np.float32), list("abcd"), "small")
    with pytest.raises(ValueError, match="name the encoder"):
        DenseIndex.load(folder)
    (folder / "vectors.npy").write_bytes((folder / "vectors.npy").read_bytes()[:-4])
    with pytest.raises(ValueError, match=r"is damaged: vectors\.npy has"):
        DenseIndex(folder, lambda texts: np.zeros((1, 4), np.float32))
    (folder / "manifest.json").write_text(
        json.dumps(json.loads((folder / "manifest.json").read_text()) | {"version": 99})
    )
    with pytest.raises(ValueError, match="has version 99, this program reads 1"):
        DenseIndex(folder, lambda texts: np.zeros((1, 4), np.float32))


@pytest.mark.gpu
def test_ranks_on_a_gpu_are_those_of_float32() -> None:
    import torch

    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    rng = np.random.default_rng(0)
    vectors, queries = (
        rng.standard_normal((300_000, 256), np.float32) + 1,
        rng.standard_normal((50, 256), np.float32) + 1,
    )
    vectors[200_000:200_100] = vectors[5]
    golds = [[int(g)] for g in rng.integers(300_000, size=49)] + [[200_050]]
    device = Device(vectors, Codes.of(vectors), "cuda")
    expected = capped(brute_beating(brute(vectors, queries), golds), 1000)
    assert capped(count_beating(device, queries, golds, 1000), 1000) == expected
    flat = Flat(vectors)
    for ours, theirs in zip(device.top(queries, 100), flat.top(queries, 100), strict=True):
        assert ours[1].tolist() == theirs[1].tolist()


@pytest.mark.slow
def test_ray_shards_agree_and_survive_a_kill(tmp_path: Path) -> None:
    if importlib.util.find_spec("ray") is None:  # again, in a process that finds the Ray of the cluster's tests
        if absent := helpers_cluster.why_absent():
            pytest.skip(absent)
        this = f"{__file__}::test_ray_shards_agree_and_survive_a_kill"
        command = [sys.executable, "-m", "pytest", "-m", "slow", "-p", "no:cacheprovider", this]
        done = subprocess.run(
            command, cwd=ROOT, env=helpers_cluster.environment(), capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stdout[-4000:]
        assert "1 passed" in done.stdout
        return
    import ray

    rng = np.random.default_rng(3)
    vectors, queries = rng.integers(-1, 2, (60, 6)).astype(np.float32), rng.integers(-2, 3, (25, 6)).astype(np.float32)
    folder = import_folder(tmp_path, vectors, [f"p{number}" for number in range(60)], "whole")
    ray.init(num_cpus=2, include_dashboard=False, object_store_memory=100 << 20, log_to_driver=False)
    try:
        with pytest.raises(ValueError, match="--ray_parts 3 needs as many CPUs, the Ray cluster has 2"):
            spread(folder, Manifest.read(folder), 3, "cpu")
        shards = spread(folder, Manifest.read(folder), 2, "cpu")
        index = DenseIndex(folder, lambda texts: queries[[int(text) for text in texts]], shards)
        texts, golds = [str(number) for number in range(25)], [[int(gold)] for gold in rng.integers(60, size=25)]
        expected = [count + 1 for count in brute_beating(brute(vectors, queries), golds)]
        named = [[f"p{gold}" for gold in some] for some in golds]
        assert index.gold_ranks(texts, named, 100) == expected
        whole = DenseIndex(folder, lambda texts: queries[[int(text) for text in texts]])
        assert index.search(texts, 7) == whole.search(texts, 7)
        ray.kill(shards.scanners[1]._actor, no_restart=False)  # type: ignore[attr-defined]
        assert index.gold_ranks(texts, named, 100) == expected
        (folder / "manifest.json").unlink()
        ray.kill(shards.scanners[0]._actor, no_restart=True)  # type: ignore[attr-defined]
        with pytest.raises(ValueError, match="has no manifest"):
            spread(folder, whole.manifest, 1, "cpu")
    finally:
        ray.shutdown()
