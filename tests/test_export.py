"""Exported folders: transformers loads them with equal logits, whatever the form of the checkpoint, the type and the number of files."""

import json
from pathlib import Path

import helpers_trainers as helpers
import pytest
import torch

from convsearch.model.loading import load_model, load_tokenizer
from convsearch.policy.policy import Policy
from convsearch.runs import checkpoint, export

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=["tiny_llama", "tiny_qwen2"])
def run_dir(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a checkpoint of each form, whose optimizer has taken a step."""
    from convsearch.model.batch import Branch, Tree
    from convsearch.trainers.sft import sft_step

    source = request.getfixturevalue(request.param)
    folder = tmp_path_factory.mktemp("run")
    tokenizer, policy = load_tokenizer(str(source)), Policy(load_model(str(source)), torch.device("cpu"))
    sft_step(policy, [Tree((1, 2, 3), (Branch((4, 5)),))], 0, 1, 1, 1e-2)
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
def test_the_logits_are_the_checkpoints(run_dir: Path, step: int, limit: str, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    files = export.export(run_dir / f"global_step_{step}", tmp_path / "model", limit=export.size_of(limit))
    assert len(files) == 1 if limit == "5GB" else len(files) > 2
    assert all(file.stat().st_size < 210_000 for file in files) or limit == "5GB"
    assert torch.equal(logits(tmp_path / "model"), logits(run_dir / "global_step_1"))
    assert AutoTokenizer.from_pretrained(tmp_path / "model").chat_template == helpers.TEMPLATE
    assert not [path.name for path in (tmp_path / "model").iterdir() if path.name.startswith(("optimizer", "trainer"))]
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_bf16_is_the_rounded_model(run_dir: Path, tmp_path: Path) -> None:
    status, said = helpers.call(export.main, [run_dir, "--output", tmp_path / "model", "--dtype", "bf16"])
    assert status == 0
    assert "1 weight file, 0.00 GB" in said
    assert json.loads((tmp_path / "model" / "config.json").read_text())["dtype"] == "bfloat16"
    loaded = logits(tmp_path / "model")
    assert loaded.dtype == torch.bfloat16
    assert torch.equal(loaded, logits(run_dir / "global_step_1", "bfloat16"))
    again = export.export(tmp_path / "model", tmp_path / "wide", "fp32")  # a folder that is no checkpoint of ours
    assert again[0].stat().st_size > 1.9 * (tmp_path / "model" / "model.safetensors").stat().st_size


def write_dcp(folder: Path, model: Path) -> None:
    """As other trainers do: torch's default storage, the model under a prefix, beside an optimizer."""
    from torch.distributed.checkpoint import FileSystemWriter, save
    from transformers import AutoModelForCausalLM

    weights = {
        name: parameter.detach() for name, parameter in AutoModelForCausalLM.from_pretrained(model).named_parameters()
    }
    moments = {name: {"exp_avg": torch.zeros_like(tensor)} for name, tensor in weights.items()}
    save(
        {"app": {"model": weights, "optimizer": {"state": moments}}, "step": 3}, storage_writer=FileSystemWriter(folder)
    )


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("limit", ["5GB", "0.1MB"])
def test_another_trainers_dcp_folder(run_dir: Path, limit: str, tmp_path: Path) -> None:
    write_dcp(tmp_path / "dcp", run_dir / "global_step_1")
    error = helpers.one_sentence(*helpers.call(export.main, [tmp_path / "dcp", "--output", tmp_path / "out"]))
    assert "name the model that was trained by --base" in error
    base = ["--base", run_dir / "global_step_1", "--max_shard_size", limit]
    status, _ = helpers.call(export.main, [tmp_path / "dcp", "--output", tmp_path / "out", *base])
    assert status == 0
    assert torch.equal(logits(tmp_path / "out"), logits(run_dir / "global_step_1"))


class Evil:
    """What a pickle can do to its reader."""

    def __init__(self, trace: Path):
        self.trace = trace

    def __reduce__(self) -> tuple[object, tuple[str]]:
        import os

        return os.mkdir, (str(self.trace),)


def test_an_index_that_carries_code_is_refused_before_it_runs(run_dir: Path, tmp_path: Path) -> None:
    import pickle

    (tmp_path / "dcp").mkdir()
    for content, said in (
        (pickle.dumps(Evil(tmp_path / "trace")), "mkdir, which torch.distributed.checkpoint does not write"),
        (pickle.dumps({"a": 1}), "it holds a dict"),
        (b"nonsense", "is damaged or no index"),
    ):
        (tmp_path / "dcp" / ".metadata").write_bytes(content)
        command = [tmp_path / "dcp", "--output", tmp_path / "out", "--base", run_dir / "global_step_1"]
        assert said in helpers.one_sentence(*helpers.call(export.main, command))
    assert not (tmp_path / "trace").exists()


def test_mistakes_are_one_sentence(run_dir: Path, tmp_path: Path) -> None:
    def error(*arguments: object) -> str:
        return helpers.one_sentence(*helpers.call(export.main, arguments))

    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes").touch()
    assert "is not empty" in error(run_dir, "--output", tmp_path / "full")
    assert "holds no checkpoint" in error(tmp_path, "--output", tmp_path / "out")
    assert "--max_shard_size 5 is no size" in error(run_dir, "--output", tmp_path / "out", "--max_shard_size", "5")
    (tmp_path / "adapters").mkdir()
    (tmp_path / "adapters" / "config.json").write_text("{}")
    checkpoint.save_tensors(
        {"model.q_proj.lora_A.default.weight": torch.zeros(1)}, tmp_path / "adapters" / "model.safetensors"
    )
    assert "holds adapters beside their base" in error(tmp_path / "adapters", "--output", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_damaged_shards_are_named(run_dir: Path, tmp_path: Path) -> None:
    import shutil

    copy = shutil.copytree(run_dir, tmp_path / "run")
    (shard,) = (copy / "global_step_2" / "shards").iterdir()
    shard.write_bytes(shard.read_bytes()[:-100])
    error = helpers.one_sentence(*helpers.call(export.main, [copy, "--output", tmp_path / "out"]))
    assert f"global_step_2 is damaged: shards/{shard.name} has" in error
    assert "delete the folder to go on from the one before it" in error
