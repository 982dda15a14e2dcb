"""Text -> vectors: ANCE checkpoints under their published parameter names, and sentence-transformers folders.

ANCE (Xiong et al., arXiv 2007.00808): RoBERTa, the first token's last hidden state, Linear(hidden, 768), LayerNorm. The
modules.json of a sentence-transformers folder may name Transformer, Pooling (first token or mean), Dense, LayerNorm and
Normalize; other modules are refused by name.
"""

import hashlib
import json
import pickle
import re
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from tqdm import tqdm
from transformers import AutoConfig, AutoModel, AutoTokenizer
from transformers.utils import logging

from convsearch.cli import Unavailable
from convsearch.files import read_json
from retriever_server.storage import Array

WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # in order of preference
ACTIVATIONS = {"torch.nn.modules.linear.Identity": "Identity", "torch.nn.modules.activation.Tanh": "Tanh"}
AGAIN = "copy the model's folder again"
CHARS_PER_TOKEN = 6  # of a long token, to estimate what truncation leaves of a text
MIN_BATCH = 4  # texts that are batched however much their lengths differ
HASHED = ("*.safetensors", "*.bin", "*.json", "*.txt", "*/*.safetensors", "*/*.bin", "*/*.json")
SKIPPED = ["onnx/*", "openvino/*", "*.h5", "*.msgpack", "*.ot", "*.onnx"]  # weights in other formats on the hub


class Encoder:
    """A loaded model; thread-safe (one call at a time).

    Example: ``Encoder.load("castorini/ance-msmarco-passage").encode(["who wrote Hamlet?"], 512)`` is float32 [1, 768].
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        device: str,
        kind: str,
        model: Any,
        pooling: str,
        heads: Sequence[Any],
        limit: int,
    ) -> None:
        self.name, self.kind, self.device, self.limit = name, kind, device, limit
        self.sha256 = folder_sha256(folder)
        self._tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        self._model, self._pooling = model.eval().to(device), pooling
        self._heads = [head.eval().to(device) for head in heads]
        self._lock = threading.Lock()  # a fast tokenizer keeps its truncation as state, so threads must not share it
        with torch.inference_mode():
            self.dim = int(self._forward([""], 8).shape[1])

    @classmethod
    def load(cls, name_or_path: str, device: str = "auto") -> "Encoder":
        """Opens a folder, or fetches a model of that name from the Hugging Face hub.

        Raises:
            ValueError: the folder holds no known kind of encoder, or weights are missing.
            Unavailable: there is no such folder, and the model cannot be fetched from the hub.
        """
        logging.disable_progress_bar()
        folder, device = find(name_or_path), choose_device(device)
        if (folder / "modules.json").is_file():
            model, pooling, heads, limit = _sentence_transformer(folder)
            return cls(folder, name_or_path, device, "dense", model, pooling, heads, limit)
        model, heads, limit = _ance(folder)
        return cls(folder, name_or_path, device, "ance", model, "cls", heads, limit)

    def encode(self, texts: Sequence[str], max_length: int, batch_size: int = 64, progress: bool = False) -> Array:
        """float32 [n, dim] in the order of the texts, cut at ``max_length`` tokens or the model's limit, special ones
        included.

        Texts are sorted by length; a batch ends before a text shorter than 3/4 of its first one, to limit padding.
        """
        order = sorted(range(len(texts)), key=lambda i: -len(texts[i]))
        lengths = [min(len(text), CHARS_PER_TOKEN * max_length) for text in texts]
        out = np.empty((len(texts), self.dim), np.float32)
        bar = tqdm(total=len(texts), desc="encode", unit=" texts", disable=not progress, leave=False, mininterval=0.5)
        with self._lock, torch.inference_mode(), bar:
            for rows in _batches(order, lengths, batch_size):
                vectors = self._forward([texts[i] for i in rows], min(max_length, self.limit))
                out[rows] = vectors.float().cpu().numpy()
                bar.update(len(rows))
        return out

    def _forward(self, texts: list[str], max_length: int) -> Any:
        # a lone half of a surrogate pair would crash the tokenizer
        clean = [text.encode("utf-8", "replace").decode("utf-8") for text in texts]
        batch = self._tokenizer(clean, max_length=max_length, truncation=True, padding=True, return_tensors="pt")
        batch = batch.to(self.device)
        hidden = self._model(**batch).last_hidden_state
        if self._pooling == "cls":
            vectors = hidden[:, 0]
        else:
            mask = batch["attention_mask"].unsqueeze(-1).to(hidden.dtype)
            vectors = (hidden * mask).sum(1) / mask.sum(1).clamp(min=1e-9)
        for head in self._heads:
            vectors = head(vectors)
        return vectors


def _batches(order: Sequence[int], lengths: Sequence[int], batch_size: int) -> Iterator[list[int]]:
    """Consecutive batches of ``order`` (longest first), of at most ``batch_size`` texts of similar lengths."""
    rows: list[int] = []
    for i in order:
        if len(rows) == batch_size or (len(rows) >= MIN_BATCH and 4 * lengths[i] < 3 * lengths[rows[0]]):
            yield rows
            rows = []
        rows.append(i)
    if rows:
        yield rows


def find(name_or_path: str) -> Path:
    """The folder of a model, fetched from the Hugging Face hub if it is not a folder."""
    path = Path(name_or_path)
    if path.is_dir():
        return path
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name_or_path):
        remedy = "give an encoder's folder, or a name on the Hugging Face hub such as owner/model"
        raise ValueError(f"there is no folder {name_or_path}: {remedy}")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name_or_path, ignore_patterns=SKIPPED))
    except (OSError, ValueError) as error:
        what = f"{name_or_path} is no folder, and cannot be fetched from the Hugging Face hub"
        raise Unavailable(f"{what} ({type(error).__name__})") from error


def choose_device(device: str) -> str:
    """ "auto": the first CUDA device, or the CPU if there is none."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device is {device!r}, but torch sees no CUDA device here: use cpu or auto")
    return device


def folder_sha256(folder: Path) -> str:
    """Of an encoder's weights, tokenizer and settings, to check that the queries' encoder is that of an index."""
    digest = hashlib.sha256()
    for path in sorted({path for pattern in HASHED for path in folder.glob(pattern)}):
        digest.update(str(path.relative_to(folder)).encode())
        with open(path, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def _ance(folder: Path) -> tuple[Any, list[Any], int]:
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} has neither modules.json nor config.json, so it is no encoder")
    weights = read_weights(folder)
    if "embeddingHead.weight" not in weights or "norm.weight" not in weights:
        what = f"{folder} is no ANCE checkpoint (no embeddingHead.weight or norm.weight) and has no modules.json"
        raise ValueError(f"{what}: save it as a sentence-transformers folder, which says how its vectors are pooled")
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    model = AutoModel.from_config(config, add_pooling_layer=False, trust_remote_code=False).float()
    size, hidden = weights["embeddingHead.weight"].shape
    linear, norm = torch.nn.Linear(hidden, size), torch.nn.LayerNorm(size)
    for module, prefix in ((model, model.base_model_prefix + "."), (linear, "embeddingHead."), (norm, "norm.")):
        _fill(module, weights, folder, prefix)
    return model, [linear, norm], _positions(model)


def _positions(model: Any) -> int:
    """How many tokens the model has positions for; those of RoBERTa begin after the padding's."""
    last, padding = int(model.config.max_position_embeddings), None
    if model.config.model_type in ("roberta", "xlm-roberta", "camembert"):
        padding = getattr(model.embeddings, "padding_idx", None)
    return last if padding is None else last - padding - 1


def read_weights(folder: Path) -> dict[str, Any]:
    """Parameter name -> tensor of a folder's weight file, without a "model." or "module." at the start of all names."""
    path = next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
    if path is None:
        raise ValueError(f"{folder} has none of {', '.join(WEIGHTS)}")
    try:
        safe = path.suffix == ".safetensors"
        weights = load_file(path) if safe else torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, EOFError, RuntimeError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"{path} is damaged, or holds more than tensors ({reason}): get the weights again") from error
    for wrapper in ("module.", "model."):
        if all(name.startswith(wrapper) for name in weights):
            weights = {name.removeprefix(wrapper): value for name, value in weights.items()}
    return dict(weights)


def _fill(module: Any, weights: dict[str, Any], folder: Path, prefix: str) -> None:
    """Loads the parameters whose names begin with ``prefix``; ValueError if one of the module's is missing."""
    mine = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)} or weights
    floats = {name: value.float() if value.is_floating_point() else value for name, value in mine.items()}
    missing = module.load_state_dict(floats, strict=False).missing_keys
    absent = [name for name in missing if not name.endswith("position_ids")]
    if absent:
        raise ValueError(f"{folder}: parameter {prefix + absent[0]} is missing ({len(absent)} in all)")


def _sentence_transformer(folder: Path) -> tuple[Any, str, list[Any], int]:
    model, pooling, limit, heads = None, None, 0, []
    try:
        modules = json.loads((folder / "modules.json").read_bytes())
    except ValueError as error:
        raise ValueError(f"{folder}/modules.json is damaged ({error}): {AGAIN}") from error
    for module in modules:
        kind, place = module["type"].rpartition(".")[2], folder / module["path"]
        if kind == "Transformer" and model is None:
            model = AutoModel.from_pretrained(place, trust_remote_code=False).float()
            longest = _settings(place, "sentence_bert_config.json").get("max_seq_length")
            limit = min(longest or 1 << 30, _positions(model))
        elif kind == "Pooling" and pooling is None:
            pooling = _pooling(_settings(place, "config.json"), place)
        elif kind == "Dense":
            heads.append(_dense(place))
        elif kind == "LayerNorm":
            norm = torch.nn.LayerNorm(_settings(place, "config.json")["dimension"])
            _fill(norm, read_weights(place), place, "norm.")
            heads.append(norm)
        elif kind == "Normalize":
            heads.append(_Normalize())
        else:
            raise ValueError(f"{folder}/modules.json: a module of type {module['type']!r} is not supported here")
    if model is None or pooling is None:
        raise ValueError(f"{folder}/modules.json needs a Transformer and a Pooling module")
    return model, pooling, heads, limit


def _settings(folder: Path, name: str) -> dict[str, Any]:
    path = folder / name
    return read_json(path, AGAIN) if path.is_file() else {}


def _pooling(settings: dict[str, Any], place: Path) -> str:
    """ "cls" or "mean", from either of the two forms of sentence-transformers."""
    modes = [name for name, value in settings.items() if name.startswith("pooling_mode_") and value is True]
    modes = modes or [str(settings.get("pooling_mode"))]
    known = {"pooling_mode_cls_token": "cls", "pooling_mode_mean_tokens": "mean", "cls": "cls", "mean": "mean"}
    if len(modes) != 1 or modes[0] not in known:
        raise ValueError(f"{place}/config.json pools by {modes}: only cls and mean are supported")
    return known[modes[0]]


def _dense(place: Path) -> Any:
    settings = _settings(place, "config.json")
    activation = settings.get("activation_function", "torch.nn.modules.activation.Tanh")
    if activation not in ACTIVATIONS:
        raise ValueError(f"{place}/config.json: activation {activation!r} is not supported ({', '.join(ACTIVATIONS)})")
    linear = torch.nn.Linear(settings["in_features"], settings["out_features"], bias=settings.get("bias", True))
    _fill(linear, read_weights(place), place, "linear.")
    return torch.nn.Sequential(linear, getattr(torch.nn, ACTIVATIONS[activation])())


class _Normalize(torch.nn.Module):
    """Vectors of length 1."""

    def forward(self, vectors: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.normalize(vectors, dim=1)
