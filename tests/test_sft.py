"""What fine-tuning promises.

1. The loss is transformers' own with prompt labels of -100: a mean over the answer tokens of the whole batch, end of
   sequence included.
2. Ranks and micro-batches do not change it.
3. A run that is broken off and started again has the losses of an unbroken one.
4. What it exports is a Hugging Face folder with the trained weights.
5. A user's mistake ends in one sentence.
"""

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import helpers_trainers as helpers
import pytest
import torch

from convsearch import sft as command
from convsearch.config import load_sft_config
from convsearch.runs.tracking import read_metrics
from convsearch.trainers import sft
from convsearch.trainers.data import batch_of

PAIRS = [
    (f"q{number}", helpers.question(town, aspect), helpers.answer(town, aspect) + " yes" * (number % 4))
    for number, (town, aspect) in enumerate(helpers.GOLDS)
]
TRAIN, HELD_OUT = PAIRS[:13], PAIRS[13:]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("sft")
    train = helpers.write_parquet(folder / "train.parquet", helpers.sft_rows(TRAIN))
    return train, helpers.write_parquet(folder / "val.parquet", helpers.sft_rows(HELD_OUT))


def trained(model: Path, files: tuple[Path, Path], run_dir: Path, **changed: Any) -> list[dict[str, Any]]:
    sft.train(load_sft_config(helpers.sft_overrides(model, files[0], run_dir, **changed)))
    return read_metrics(run_dir)


def losses(metrics: list[dict[str, Any]]) -> list[tuple[int, float, float]]:
    return [(record["step"], record["loss"], record["grad_norm"]) for record in metrics]


@torch.no_grad()
def plain_loss(folder: Path, rows: list[tuple[str, str, str]]) -> float:
    """transformers' loss of a padded batch with labels; the chat form written out by hand."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer, model = (
        AutoTokenizer.from_pretrained(folder),
        AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager"),
    )
    encoded = []
    for _, prompt, answer in rows:
        start = tokenizer.encode(
            f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n", add_special_tokens=False
        )
        encoded.append((start, tokenizer.encode(f"{answer}<|im_end|>", add_special_tokens=False)))
    longest = max(len(start) + len(end) for start, end in encoded)
    ids = torch.tensor([[*start, *end, *[9] * (longest - len(start) - len(end))] for start, end in encoded])
    labels = torch.tensor(
        [[-100] * len(start) + end + [-100] * (longest - len(start) - len(end)) for start, end in encoded]
    )
    mask = torch.tensor(
        [[1] * (len(start) + len(end)) + [0] * (longest - len(start) - len(end)) for start, end in encoded]
    )
    return float(model(input_ids=ids, attention_mask=mask, labels=labels).loss)


def test_the_loss_is_transformers_own_with_masked_prompts(
    tiny_llama: Path, files: tuple[Path, Path], tmp_path: Path
) -> None:
    metrics = trained(
        tiny_llama,
        files,
        tmp_path,
        data__val_files=files[1],
        total_training_steps=2,
        trainer__test_freq=1,
        trainer__save_freq=1,
        optim__lr=1e-2,
    )
    for step, before in enumerate([tiny_llama, tmp_path / "global_step_1"]):
        batch = batch_of(TRAIN, 8, step, seed=1)
        assert metrics[step]["loss"] == pytest.approx(plain_loss(before, batch), rel=1e-5)
        after = plain_loss(tmp_path / f"global_step_{step + 1}", HELD_OUT)  # 5 rows, in micro-batches of 4
        assert metrics[step]["val_loss"] == pytest.approx(after, rel=1e-5)
    assert metrics[1]["val_loss"] < metrics[0]["val_loss"]


def test_the_micro_batch_size_does_not_change_the_losses(
    tiny_llama: Path, files: tuple[Path, Path], tmp_path: Path
) -> None:
    runs = {
        name: losses(trained(tiny_llama, files, tmp_path / name, **changed))
        for name, changed in {
            "8": {"micro_batch_size_per_gpu": 8},
            "1": {"micro_batch_size_per_gpu": 1},
            "checkpointed": {"micro_batch_size_per_gpu": 2, "model__enable_gradient_checkpointing": True},
        }.items()
    }
    for other in ("1", "checkpointed"):
        for left, right in zip(runs[other], runs["8"], strict=True):
            assert left == pytest.approx(right, rel=1e-4)
    assert runs["8"][-1][1] < runs["8"][0][1]


class Break(Exception):
    """Stands for the end of the process."""


def breaking_at(step: int, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Lets the training end when optimiser step ``step`` (from 0) of it begins; returns what mends it."""
    original, calls = sft.sft_step, [0]

    def sft_step(*arguments: Any) -> dict[str, float]:
        calls[0] += 1
        if calls[0] == step + 1:
            raise Break
        return original(*arguments)

    monkeypatch.setattr(sft, "sft_step", sft_step)
    return lambda: monkeypatch.setattr(sft, "sft_step", original)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_broken_run_has_the_losses_of_an_unbroken_one(
    dtype: str, tiny_llama: Path, files: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"total_training_steps": 7, "trainer__save_freq": 2, "optim__warmup_steps_ratio": 0.3, "dtype": dtype}
    unbroken = trained(tiny_llama, files, tmp_path / "unbroken", **options)
    assert json.loads((tmp_path / "unbroken" / "config.json").read_text())["model"]["dtype"] == dtype
    mend = breaking_at(5, monkeypatch)
    with pytest.raises(Break):
        trained(tiny_llama, files, tmp_path / "broken", **options)
    assert [record["step"] for record in read_metrics(tmp_path / "broken")] == [0, 1, 2, 3, 4]
    with (tmp_path / "broken" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')  # a line that was being written
    mend()
    broken = trained(tiny_llama, files, tmp_path / "broken", **options)
    assert losses(broken) == losses(unbroken)
    assert [record["lr"] for record in broken] == [record["lr"] for record in unbroken]
    left, right = ((tmp_path / name / "model" / "model.safetensors").read_bytes() for name in ("broken", "unbroken"))
    assert left == right
    assert sorted(path.name for path in (tmp_path / "broken").glob("global_step_*")) == [
        "global_step_6",
        "global_step_7",
    ]
    assert not list((tmp_path / "broken").glob("**/*tmp*"))


def test_a_finished_run_is_left_as_it_is(tiny_llama: Path, files: tuple[Path, Path], tmp_path: Path) -> None:
    first = trained(tiny_llama, files, tmp_path)
    model = (tmp_path / "model" / "model.safetensors").read_bytes()
    assert trained(tiny_llama, files, tmp_path) == first
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == model


@pytest.mark.parametrize("kind", ["tiny_llama", "tiny_qwen2"])
def test_the_export_loads_in_transformers_with_the_trained_weights(
    kind: str, files: tuple[Path, Path], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source: Path = request.getfixturevalue(kind)
    trained(source, files, tmp_path, total_training_steps=2)
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not any(info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    saved, checkpoint = (
        load_file(tmp_path / "model" / "model.safetensors"),
        load_file(tmp_path / "global_step_2" / "model.safetensors"),
    )
    start = dict(AutoModelForCausalLM.from_pretrained(source).named_parameters())
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, saved[name])
        assert torch.equal(parameter, checkpoint[name])
        assert not torch.equal(parameter, start[name])
    assert {name for name, _ in model.named_parameters()} == set(saved)
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (source, tmp_path / "model"))
    assert after == before
    tokenizers = [AutoTokenizer.from_pretrained(folder) for folder in (source, tmp_path / "model")]
    assert tokenizers[0].chat_template == tokenizers[1].chat_template
    assert tokenizers[0].encode(PAIRS[0][1]) == tokenizers[1].encode(PAIRS[0][1])


@pytest.mark.parametrize(("side", "kept"), [("right", slice(None, 40)), ("left", slice(-40, None))])
def test_long_rows_are_cut_at_the_named_end(side: str, kept: slice, tiny_llama: Path, tmp_path: Path) -> None:
    from convsearch.model.loading import encode_chat, load_tokenizer

    long = ("q", "where is rome? " * 4, helpers.answer("rome", "food") * 2)
    file = helpers.write_parquet(tmp_path / "long.parquet", helpers.sft_rows([long]))
    overrides = helpers.sft_overrides(tiny_llama, file, tmp_path / "run", max_length=40, data__truncation=side)
    cfg, tokenizer = load_sft_config(overrides), load_tokenizer(str(tiny_llama))
    (tree,) = sft.read_rows(cfg.data, cfg.data.train_files, tokenizer)
    prompt_ids = encode_chat(tokenizer, ({"role": "user", "content": long[1]},))
    whole = (*prompt_ids, *tokenizer.encode(long[2], add_special_tokens=False), tokenizer.eos_token_id)
    assert len(whole) > 40 > len(prompt_ids)
    assert (*tree.prompt_ids, *tree.branches[0].token_ids) == whole[kept]
    assert len(tree.prompt_ids) == (len(prompt_ids) if side == "right" else len(prompt_ids) - len(whole) + 40)


def failed(model: Path, train: Path, run_dir: Path, **changed: Any) -> str:
    return helpers.one_sentence(*helpers.call(command.main, helpers.sft_overrides(model, train, run_dir, **changed)))


def test_a_truncated_checkpoint_is_named_with_the_remedy(
    tiny_llama: Path, files: tuple[Path, Path], tmp_path: Path
) -> None:
    whole = losses(trained(tiny_llama, files, tmp_path, trainer__save_freq=2))
    (tmp_path / "model" / "model.safetensors").unlink()  # as if the run had ended before the export
    damaged = tmp_path / "global_step_4" / "optimizer.safetensors"
    size = damaged.stat().st_size
    damaged.write_bytes(damaged.read_bytes()[:-100])
    error = failed(tiny_llama, files[0], tmp_path, trainer__save_freq=2)
    assert "global_step_4 is damaged: optimizer.safetensors" in error
    assert f"{size - 100} bytes where {size} were written" in error
    assert "delete the folder to go on from the one before it" in error
    assert losses(read_metrics(tmp_path)) == whole  # nothing lost by the failure
    for path in damaged.parent.iterdir():
        path.unlink()
    damaged.parent.rmdir()
    assert losses(trained(tiny_llama, files, tmp_path, trainer__save_freq=2)) == whole


def test_mistakes_in_the_data_are_one_sentence(tiny_llama: Path, files: tuple[Path, Path], tmp_path: Path) -> None:
    run_dir, rows = tmp_path / "run", helpers.sft_rows(TRAIN)
    no_column = helpers.write_parquet(
        tmp_path / "columns.parquet", [{k: v for k, v in row.items() if k != "extra_info"} for row in rows]
    )
    assert f"{no_column}: column 'extra_info' is missing" in failed(tiny_llama, no_column, run_dir)
    no_key = helpers.write_parquet(tmp_path / "keys.parquet", [{**row, "extra_info": {"prompt": "a"}} for row in rows])
    assert "row 0: column 'extra_info' has no key 'answer'" in failed(tiny_llama, no_key, run_dir)
    extra = {**rows[3]["extra_info"], "answer": " "}
    empty = helpers.write_parquet(tmp_path / "empty.parquet", [*rows[:3], {**rows[3], "extra_info": extra}])
    assert f"{empty}: row 3: extra_info.answer must be a non-empty text" in failed(tiny_llama, empty, run_dir)
    no_parquet = tmp_path / "text.parquet"
    no_parquet.write_text("id,prompt\n1,a\n" * 20)
    assert f"{no_parquet}: not a parquet file" in failed(tiny_llama, no_parquet, run_dir)
    cut = tmp_path / "cut.parquet"
    cut.write_bytes(files[0].read_bytes()[:-50])
    assert f"{cut}: not a parquet file" in failed(tiny_llama, cut, run_dir)
    assert f"{tmp_path / 'none.parquet'}: no such file" in failed(tiny_llama, tmp_path / "none.parquet", run_dir)
    error = failed(tiny_llama, files[0], run_dir, max_length=30, data__truncation="error")
    assert "above data.max_length=30" in error
    assert "13 rows do not fill one batch of data.train_batch_size=16" in failed(
        tiny_llama, files[0], run_dir, train_batch_size=16
    )


def test_mistakes_in_the_model_are_one_sentence(tiny_llama: Path, files: tuple[Path, Path], tmp_path: Path) -> None:
    import shutil

    run_dir = tmp_path / "run"
    assert "is not a model folder: it has no config.json" in failed(tmp_path, files[0], run_dir)
    damaged, bare, silent = tmp_path / "damaged", tmp_path / "bare", tmp_path / "silent"
    for folder in (damaged, bare, silent):
        shutil.copytree(tiny_llama, folder)
    weights = damaged / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    assert f"the weights in {damaged} are damaged" in failed(damaged, files[0], run_dir)
    (bare / "model.safetensors").unlink()
    assert f"{bare} does not load as a causal language model" in failed(bare, files[0], run_dir)
    (silent / "chat_template.jinja").unlink()
    assert f"the tokenizer of {silent} has no chat template" in failed(silent, files[0], run_dir)
    assert "data.max_length=2048 tokens is above the model's limit of 1024" in failed(
        tiny_llama, files[0], run_dir, max_length=2048
    )
    assert not list(run_dir.glob("global_step_*"))


def test_starting_anew_beside_old_checkpoints_is_refused(
    tiny_llama: Path, files: tuple[Path, Path], tmp_path: Path
) -> None:
    trained(tiny_llama, files, tmp_path)
    error = failed(tiny_llama, files[0], tmp_path, trainer__resume_mode="disable")
    assert "global_step_4" in error
    assert "trainer.default_local_dir" in error


TORCHRUN = ["torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "convsearch.sft"]


def torchrun(arguments: list[str]) -> None:
    command = [sys.executable, "-m", *TORCHRUN, *arguments]
    done = subprocess.run(
        command, cwd=helpers.ROOT, env=helpers.environment(), capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_two_ranks_have_the_losses_of_one(tiny_llama: Path, files: tuple[Path, Path], tmp_path: Path) -> None:
    options = {
        "data__val_files": files[1],
        "trainer__save_freq": 3,
        "trainer__test_freq": 1,
        "total_training_steps": 6,
        "micro_batch_size_per_gpu": 2,
    }
    one = trained(tiny_llama, files, tmp_path / "one", **options)
    torchrun(helpers.sft_overrides(tiny_llama, files[0], tmp_path / "two", **options))
    two = read_metrics(tmp_path / "two")
    assert [record["step"] for record in two] == list(range(6))
    for name in ("loss", "val_loss", "grad_norm"):
        assert [record[name] for record in two] == pytest.approx([record[name] for record in one], rel=1e-5), name
    # what two ranks have saved (each its shards) goes on with one, and the other way round
    assert sorted(path.name for path in (tmp_path / "two" / "global_step_3" / "shards").iterdir()) == [
        "shard-00001-model-00001-of-00001.safetensors",
        "shard-00002-model-00001-of-00001.safetensors",
    ]
    for run_dir in (tmp_path / "two", tmp_path / "one"):
        shutil.rmtree(run_dir / "global_step_6")
    on_one = trained(tiny_llama, files, tmp_path / "two", trainer__checkpoint_format="dcp", **options)
    torchrun(helpers.sft_overrides(tiny_llama, files[0], tmp_path / "one", **options))
    for continued in (on_one, read_metrics(tmp_path / "one")):
        assert [record["loss"] for record in continued] == pytest.approx([record["loss"] for record in one], rel=1e-5)
    # one rank's shards on two ranks: nothing is left to train, the export is the same to the bit
    exported = tmp_path / "two" / "model" / "model.safetensors"
    before = exported.read_bytes()
    exported.unlink()
    torchrun(helpers.sft_overrides(tiny_llama, files[0], tmp_path / "two", trainer__checkpoint_format="dcp", **options))
    assert exported.read_bytes() == before


@pytest.mark.slow
def test_two_ranks_that_are_told_to_stop_save_and_go_on_as_one(
    tiny_llama: Path, files: tuple[Path, Path], tmp_path: Path
) -> None:
    options = {"total_training_steps": 120, "trainer__save_freq": 1000, "optim__lr": 1e-4}
    process = helpers.start(
        TORCHRUN[0], [*TORCHRUN[1:], *helpers.sft_overrides(tiny_llama, files[0], tmp_path / "run", **options)]
    )
    deadline = time.monotonic() + 120
    while len(read_metrics(tmp_path / "run")) < 3:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 1, output  # torchrun's own; scripts/run.sh makes 143 of it
    done = len(read_metrics(tmp_path / "run"))
    assert done < 120
    assert f"stopped: SIGTERM after step {done} of 120" in output
    assert (tmp_path / "run" / "latest").read_text() == f"global_step_{done}\n"
    assert len(list((tmp_path / "run" / f"global_step_{done}" / "shards").iterdir())) == 2
    continued = trained(tiny_llama, files, tmp_path / "run", **options)
    unbroken = trained(tiny_llama, files, tmp_path / "unbroken", **options)
    assert [record["loss"] for record in continued] == pytest.approx([record["loss"] for record in unbroken], rel=1e-4)
