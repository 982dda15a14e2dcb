"""Results of another model, other data, other prompts or another index under the same paths are never mixed in."""

import json
import shutil
from pathlib import Path

import helpers_trainers as helpers
import pytest
from safetensors.torch import load_file, save_file

from convsearch import checksums, distill, fingerprints, grpo, infer, sft

ROWS = helpers.conversation_rows(list(helpers.GOLDS))
COMPACT = ["--prompt_style", "compact", "--device", "cpu", "--threads", 1]


def retrained(model: Path, folder: Path) -> Path:
    """A copy of the model in which one weight of the first tensor differs."""
    shutil.copytree(model, folder, dirs_exist_ok=True)
    (folder / checksums.NAME).unlink(missing_ok=True)
    weights = load_file(folder / "model.safetensors")
    next(iter(weights.values())).view(-1)[0] += 0.5
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_a_fingerprint_is_of_the_content(tmp_path: Path, tiny_llama: Path) -> None:
    copy = shutil.copytree(tiny_llama, tmp_path / "copy")
    assert fingerprints.of_model_folder(copy) == fingerprints.of_model_folder(tiny_llama)
    assert fingerprints.of_model_folder(retrained(tiny_llama, copy)) != fingerprints.of_model_folder(tiny_llama)
    assert fingerprints.of_texts(["ab", "c"]) != fingerprints.of_texts(["a", "bc"])
    large = tmp_path / "large"
    large.mkdir()
    weights = bytearray(40 << 20)
    (large / "model.safetensors").write_bytes(weights)
    first = fingerprints.of_model_folder(large)
    weights[::4096] = bytes([1]) * len(weights[::4096])  # a training step changes nearly every weight
    (large / "model.safetensors").write_bytes(weights)
    assert fingerprints.of_model_folder(large) != first


def test_inference_does_not_go_on_with_another_model_or_input(form_llama: Path, tmp_path: Path) -> None:
    model = shutil.copytree(form_llama, tmp_path / "model")
    rows, output = helpers.write_jsonl(tmp_path / "rows.json", ROWS), tmp_path / "out.jsonl"
    command = ["--model_name_or_path", model, "--input_path", rows, "--output_path", output, "--max_tokens", 20]
    assert helpers.call(infer.main, [*command, *COMPACT, "--limit", 3])[0] == 0
    before = output.read_bytes()
    helpers.write_jsonl(rows, [*ROWS[:-1], ROWS[-1] | {"question": "its rivers, please?"}])
    error = helpers.one_sentence(*helpers.call(infer.main, [*command, *COMPACT]))
    assert f"{output} was made with the data xxh3-" in error
    helpers.write_jsonl(rows, ROWS)
    shutil.rmtree(model)
    retrained(form_llama, model)
    error = helpers.one_sentence(*helpers.call(infer.main, [*command, *COMPACT]))
    assert f"{output} was made with the model xxh3-" in error
    assert ", now it is xxh3-" in error
    assert "set it back, delete the file, or name another output" in error
    assert output.read_bytes() == before


def test_distillation_does_not_keep_the_ranks_of_another_index(
    form_llama: Path, toy_index: Path, tmp_path: Path
) -> None:
    passages = [{"id": docid, "contents": f"{town} {aspect}"} for (town, aspect), docid in helpers.GOLDS.items()]
    collection = helpers.write_jsonl(tmp_path / "collection.jsonl", passages)
    from retriever_server.bm25.build import build

    build(collection, tmp_path / "index", progress=False)
    rows = helpers.write_jsonl(tmp_path / "rows.json", ROWS)
    command = ["--model_name_or_path", form_llama, "--input_path", rows, "--output_dir", tmp_path / "out", "--names"]
    command += ["--k", 0, "--rank_limit", 20, *COMPACT, "--retriever_url"]
    assert helpers.call(distill.main, [*command, f"embedded:{toy_index}"])[0] == 0
    error = helpers.one_sentence(*helpers.call(distill.main, [*command, f"embedded:{tmp_path / 'index'}"]))
    assert "samples.jsonl was made with the index bm25-" in error


def test_training_does_not_go_on_with_another_model_or_other_data(
    form_llama: Path, toy_parquet: Path, toy_server: str, tmp_path: Path
) -> None:
    model = shutil.copytree(form_llama, tmp_path / "model")
    data = Path(shutil.copy(toy_parquet, tmp_path / "train.parquet"))
    arguments = helpers.grpo_overrides(model, data, tmp_path / "run", toy_server, total_training_steps=1)
    status, output = helpers.call(grpo.main, arguments)
    assert status == 0, output
    made_of = json.loads((tmp_path / "run" / "made_of.json").read_text())
    assert list(made_of) == ["model", "prompts", "training data", "index"]
    helpers.write_parquet(data, helpers.grpo_rows(list(helpers.GOLDS)[::-1]))
    error = helpers.one_sentence(*helpers.call(grpo.main, arguments))
    assert f"{tmp_path / 'run'} was made with the prompts xxh3-" in error
    shutil.copy(toy_parquet, data)
    assert "all 1 steps are done already" in helpers.call(grpo.main, arguments)[1]
    shutil.rmtree(model)
    retrained(form_llama, model)
    for steps in (1, 2):  # finished, and to be resumed
        arguments[-1:] = [arguments[-1], f"trainer.total_training_steps={steps}"]
        error = helpers.one_sentence(*helpers.call(grpo.main, arguments))
        assert f"{tmp_path / 'run'} was made with the model xxh3-" in error or "total_training_steps=1, now" in error


def test_damaged_settings_are_named(form_llama: Path, toy_parquet: Path, toy_server: str, tmp_path: Path) -> None:
    pairs = [(f"q{n}", helpers.question(*pair), helpers.answer(*pair)) for n, pair in enumerate(helpers.GOLDS)]
    rows = helpers.write_parquet(tmp_path / "rows.parquet", helpers.sft_rows(pairs))
    arguments = helpers.sft_overrides(form_llama, rows, tmp_path / "run", total_training_steps=1)
    assert helpers.call(sft.main, arguments)[0] == 0
    for name in ("config.json", "made_of.json"):
        path = tmp_path / "run" / name
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
        assert f"{path} is damaged (" in helpers.one_sentence(*helpers.call(sft.main, arguments))
        path.write_bytes(whole)
    conversations = helpers.write_jsonl(tmp_path / "dev.json", ROWS)
    command = ["--model_name_or_path", form_llama, "--input_path", conversations, "--output_path", tmp_path / "o"]
    assert helpers.call(infer.main, [*command, *COMPACT, "--limit", 2, "--max_tokens", 20])[0] == 0
    (tmp_path / "o.settings.json").write_text('{"n": ')
    error = helpers.one_sentence(*helpers.call(infer.main, [*command, *COMPACT, "--max_tokens", 20]))
    assert f"{tmp_path / 'o.settings.json'} is damaged (" in error
    assert "delete it together with its output" in error


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json"])
def test_a_truncated_model_folder_is_named(name: str, tiny_llama: Path, tmp_path: Path) -> None:
    model = shutil.copytree(tiny_llama, tmp_path / "model")
    content = (model / name).read_bytes()
    (model / name).write_bytes(content[: len(content) // 2])
    rows = helpers.write_jsonl(tmp_path / "rows.json", ROWS)
    command = ["--model_name_or_path", model, "--input_path", rows, "--output_path", tmp_path / "out.jsonl", *COMPACT]
    error = helpers.one_sentence(*helpers.call(infer.main, command))
    assert f"{model / name} is damaged (" in error
    assert "copy or export the folder again" in error


def test_a_model_that_is_not_within_reach_is_named_at_once(tmp_path: Path) -> None:
    rows = helpers.write_jsonl(tmp_path / "rows.json", ROWS)
    command = ["--model_name_or_path", "nobody/no-model", "--input_path", rows, "--output_path", tmp_path / "out.jsonl"]
    error = helpers.one_sentence(*helpers.finish("convsearch.infer", [*command, *COMPACT]))
    assert "nobody/no-model is neither a folder nor a model within reach on the hub (" in error
