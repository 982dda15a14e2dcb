"""transformers loads exported folders with equal logits, for every checkpoint form, type and number of files."""

import json
from pathlib import Path

import helpers_trainers as helpers
import pytest
import torch

from convsearch import export
from convsearch.model.loading import load_model, load_tokenizer
from convsearch.policy.policy import LocalPolicy
from convsearch.runs import checkpoint
from convsearch.runs.export import export as export_folder
from convsearch.runs.export import size_of

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:torch.distributed is disabled")]


@pytest.fixture(scope="module", params=["tiny_llama", "tiny_qwen2"])
def run_dir(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a checkpoint of each form, whose optimizer has taken a step."""
    from convsearch.model.batch import Branch, Tree
    from convsearch.trainers.sft import sft_step

    source = request.getfixturevalue(request.param)
    folder = tmp_path_factory.mktemp("run")
    tokenizer, policy = load_tokenizer(str(source)), LocalPolicy(load_model(str(source)), torch.device("cpu"))
    sft_step(policy, [Tree((1, 2, 3), (Branch((4, 5)),))], 1, 1e-2)
    checkpoint.save(folder, 1, policy, tokenizer, form="safetensors")
    checkpoint.save(folder, 2, policy, tokenizer, form="dcp")
    return folder


@torch.no_grad()
def logits(folder: Path, dtype: str = "auto") -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    assert not any(info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return model(torch.arange(1, 20)[None]).logits


@pytest.mark.parametrize("step", [1, 2])
@pytest.mark.parametrize("limit", ["5GB", "0.1MB"])
def test_logits_equal_the_checkpoint(run_dir: Path, step: int, limit: str, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    files = export_folder(run_dir / f"global_step_{step}", tmp_path / "model", limit=size_of(limit))
    assert len(files) == 1 if limit == "5GB" else len(files) > 2
    assert all(file.stat().st_size < 210_000 for file in files) or limit == "5GB"
    assert torch.equal(logits(tmp_path / "model"), logits(run_dir / "global_step_1"))
    assert AutoTokenizer.from_pretrained(tmp_path / "model").chat_template == helpers.TEMPLATE
    assert not [path.name for path in (tmp_path / "model").iterdir() if path.name.startswith(("optimizer", "trainer"))]
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_bf16_equals_the_rounded_model(run_dir: Path, tmp_path: Path) -> None:
    status, said = helpers.call(export.main, [run_dir, "--output", tmp_path / "model", "--dtype", "bf16"])
    assert status == 0
    assert "1 weight file, 0.00 GB" in said
    assert json.loads((tmp_path / "model" / "config.json").read_text())["dtype"] == "bfloat16"
    loaded = logits(tmp_path / "model")
    assert loaded.dtype == torch.bfloat16
    assert torch.equal(loaded, logits(run_dir / "global_step_1", "bfloat16"))
    again = export_folder(tmp_path / "model", tmp_path / "wide", "fp32")  # a folder that is no checkpoint of ours
    assert again[0].stat().st_size > 1.9 * (tmp_path / "model" / "model.safetensors").stat().st_size


def test_a_dcp_folder_of_another_trainer_is_refused_with_the_converter(tmp_path: Path) -> None:
    (tmp_path / "dcp").mkdir()
    (tmp_path / "dcp" / ".metadata").touch()
    error = helpers.one_sentence(*helpers.call(export.main, [tmp_path / "dcp", "--output", tmp_path / "out"]))
    assert f"python -m torch.distributed.checkpoint.format_utils dcp_to_torch {tmp_path / 'dcp'}" in error


def test_base_gives_the_configuration_and_the_tokenizer(run_dir: Path, tmp_path: Path) -> None:
    bare, source = tmp_path / "bare", run_dir / "global_step_1"
    bare.mkdir()
    (bare / "model.safetensors").symlink_to(source / "model.safetensors")
    command = [bare, "--output", tmp_path / "out"]
    assert "has no config.json" in helpers.one_sentence(*helpers.call(export.main, command))
    assert helpers.call(export.main, [*command, "--base", source])[0] == 0
    assert torch.equal(logits(tmp_path / "out"), logits(source))


def test_each_mistake_is_one_sentence(run_dir: Path, tmp_path: Path) -> None:
    def error(*arguments: object) -> str:
        return helpers.one_sentence(*helpers.call(export.main, arguments))

    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes").touch()
    assert "is not empty" in error(run_dir, "--output", tmp_path / "full")
    assert "holds no checkpoint" in error(tmp_path, "--output", tmp_path / "out")
    assert "--max_shard_size 5 is not a size" in error(run_dir, "--output", tmp_path / "out", "--max_shard_size", "5")
    (tmp_path / "adapters").mkdir()
    (tmp_path / "adapters" / "config.json").write_text("{}")
    checkpoint.save_tensors(
        {"model.q_proj.lora_A.default.weight": torch.zeros(1)}, tmp_path / "adapters" / "model.safetensors"
    )
    assert "holds adapters that are not merged" in error(tmp_path / "adapters", "--output", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_damaged_shards_are_named(run_dir: Path, tmp_path: Path) -> None:
    import shutil

    copy = shutil.copytree(run_dir, tmp_path / "run")
    (shard,) = (copy / "global_step_2" / "shards").iterdir()
    shard.write_bytes(shard.read_bytes()[:-100])
    error = helpers.one_sentence(*helpers.call(export.main, [copy, "--output", tmp_path / "out"]))
    assert f"global_step_2 is damaged: shards/{shard.name} has" in error
    assert "delete the folder to go on from the one before it" in error
