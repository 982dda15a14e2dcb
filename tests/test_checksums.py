"""Damage that keeps the size: detected, or harmless; never another result."""

import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import helpers_trainers as helpers
import pytest
from safetensors.torch import load_file

from convsearch import checksums, grpo, sft
from convsearch.model.loading import load_model, load_tokenizer
from convsearch.runs import checkpoint, rollouts
from convsearch.trainers.data import read_examples
from data_preprocess.options import DEFAULT_PROMPT
from data_preprocess.sources import BadRecords
from data_preprocess.writers import Row, write_splits
from retriever_server import index
from retriever_server.bm25.build import build
from retriever_server.bm25.index import Bm25Index

FLIPS = 200
GOLDS = list(helpers.GOLDS)


def flipped(path: Path, draw: random.Random) -> Callable[[], None]:
    """Flips one bit of the file; returns what restores it."""
    whole = path.read_bytes()
    damaged = bytearray(whole)
    damaged[draw.randrange(len(damaged))] ^= 1 << draw.randrange(8)
    path.write_bytes(damaged)
    return lambda: path.write_bytes(whole) and None


def found_out_or_harmless(path: Path, read: Callable[[], Any], flips: int = FLIPS) -> int:
    """Flips bit after bit; ``read`` must raise ValueError or return what it returns from the whole file.

    Returns:
        how many were found out.
    """
    draw, expected, errors = random.Random(path.name), read(), list[str]()
    for _ in range(flips):
        restore = flipped(path, draw)
        try:
            assert read() == expected, path
        except ValueError as error:
            errors.append(str(error))
        restore()
    assert all(str(path.parent) in error for error in errors), errors
    return len(errors)


@pytest.fixture(scope="module")
def trained(form_llama: Path, toy_parquet: Path, toy_server: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("trained") / "run"
    arguments = helpers.grpo_overrides(form_llama, toy_parquet, run_dir, toy_server, total_training_steps=2)
    status, output = helpers.call(grpo.main, arguments)
    assert status == 0, output
    return run_dir


def test_every_flip_in_a_checkpoint_is_found_out(trained: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(trained / "global_step_2", tmp_path / "global_step_2")
    for path in sorted(folder.iterdir()):
        found = found_out_or_harmless(path, lambda: checkpoint.check(folder), flips=40)
        assert found == 40 or path.name == checksums.NAME, (path.name, found)  # its white space does not matter


def test_a_run_with_a_damaged_checkpoint_ends_in_a_sentence(
    form_llama: Path, toy_parquet: Path, toy_server: str, trained: Path, tmp_path: Path
) -> None:
    run_dir = shutil.copytree(trained, tmp_path / "run")
    shutil.rmtree(run_dir / "model")
    weights = run_dir / "global_step_2" / "model.safetensors"
    damaged = bytearray(weights.read_bytes())
    damaged[-2000:] = bytes(byte ^ 0xFF for byte in damaged[-2000:])
    weights.write_bytes(damaged)
    arguments = helpers.grpo_overrides(form_llama, toy_parquet, run_dir, toy_server, total_training_steps=2)
    error = helpers.one_sentence(*helpers.call(grpo.main, arguments))
    assert f"{weights.parent} is damaged: model.safetensors has the checksum" in error
    assert "delete the folder to go on from the one before it" in error


def test_every_flip_in_an_exported_model_is_found_out(trained: Path, tmp_path: Path) -> None:
    model = shutil.copytree(trained / "model", tmp_path / "model")
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert found_out_or_harmless(model / name, lambda: load_model(str(model)) and None, flips=20) == 20
    assert found_out_or_harmless(model / "tokenizer.json", lambda: load_tokenizer(str(model)) and None, flips=20) == 20


def test_flips_in_rollouts_never_change_a_row(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained / "rollouts", tmp_path / "rollouts")
    path = rollouts.path_of(tmp_path, 1)
    assert found_out_or_harmless(path, lambda: rollouts.load(tmp_path, 1)) > FLIPS / 3


def test_flips_in_training_rows_never_change_a_row(tmp_path: Path) -> None:
    turns = [
        {"conv_id": f"c{n}", "answer": "far away", **row} for n, row in enumerate(helpers.conversation_rows(GOLDS))
    ]
    rows = [Row("train", turn, "here") for turn in turns]
    write_splits(tmp_path, ["train"], rows, "toy", DEFAULT_PROMPT, BadRecords(0))
    path = tmp_path / "train.parquet"
    assert found_out_or_harmless(path, lambda: read_examples([str(path)])) > FLIPS / 3


def test_flips_in_an_index_never_change_a_rank(toy_index: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(toy_index, tmp_path / "index")
    questions = ["food of rome", "rivers", "tokyo history", "oslo"]
    golds = [["rome-food"], ["lima-rivers"], ["tokyo-history"], ["oslo-food"]]

    def ranks() -> Any:
        index = Bm25Index.load(folder)
        return index.gold_ranks(questions, golds, 100), index.contents(["cairo-food"])

    for path in sorted(folder.iterdir()):
        found = found_out_or_harmless(path, ranks, flips=10)
        assert found == 10 or path.name == checksums.NAME, (path.name, found)


def test_a_damaged_index_is_built_again_with_overwrite(toy_index: Path, tmp_path: Path) -> None:
    folder, collection = shutil.copytree(toy_index, tmp_path / "index"), toy_index.parent / "collection.jsonl"
    whole = (folder / "postings_docs.npy").read_bytes()
    (folder / "postings_docs.npy").write_bytes(whole[:-8] + bytes(8))
    with pytest.raises(ValueError, match=r"index is damaged: postings_docs\.npy has the checksum"):
        build(collection, folder, progress=False)
    assert build(collection, folder, overwrite=True, progress=False)
    assert (folder / "postings_docs.npy").read_bytes() == whole
    assert not build(collection, folder, overwrite=True, progress=False)


def test_verify_reads_every_byte(toy_index: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(toy_index, tmp_path / "index")
    status, output = helpers.call(index.main, ["verify", "--output", folder])
    assert status == 0
    assert "every byte is as it was written" in output
    contents = (folder / "contents.npy").read_bytes()
    (folder / "contents.npy").write_bytes(contents[:-1] + b"?")
    error = helpers.one_sentence(*helpers.call(index.main, ["verify", "--output", folder]))
    assert f"{folder} is damaged: contents.npy has the checksum" in error
    error = helpers.one_sentence(*helpers.call(index.main, ["verify", "--output", tmp_path]))
    assert f"{tmp_path} has no manifest.json" in error


def test_large_files_are_compared_by_size_unless_all_are_asked_for(tmp_path: Path) -> None:
    (tmp_path / "large").write_bytes(bytes(1000))
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "small").write_bytes(b"abc")
    checksums.seal(tmp_path)
    (tmp_path / "large").write_bytes(bytes(999) + b"x")
    checksums.check(tmp_path, "make it again", largest=999)
    with pytest.raises(ValueError, match=rf"{tmp_path} is damaged: large has the checksum .*; make it again"):
        checksums.check(tmp_path, "make it again")
    (tmp_path / "sub" / "small").unlink()
    with pytest.raises(ValueError, match="sub/small has 0 bytes where 3 were written"):
        checksums.check(tmp_path, "make it again", largest=1)


def test_an_sft_checkpoint_is_sealed_too(tiny_llama: Path, tmp_path: Path) -> None:
    pairs = [(f"q{n}", helpers.question(*pair), helpers.answer(*pair)) for n, pair in enumerate(helpers.GOLDS)]
    rows = helpers.write_parquet(tmp_path / "rows.parquet", helpers.sft_rows(pairs))
    assert helpers.call(sft.main, helpers.sft_overrides(tiny_llama, rows, tmp_path / "run"))[0] == 0
    sealed = [path.parent.name for path in (tmp_path / "run").rglob(checksums.NAME)]
    assert "model" in sealed
    assert len(sealed) == 1 + len(checkpoint.checkpoints(tmp_path / "run"))
    assert load_file(tmp_path / "run" / "model" / "model.safetensors")
