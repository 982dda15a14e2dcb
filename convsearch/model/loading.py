"""Loads a causal language model and its tokenizer; errors say what is wrong with the folder."""

import re
from functools import lru_cache
from pathlib import Path
from typing import Any

import httpx2
import torch
from huggingface_hub import model_info, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from convsearch import checksums, fingerprints
from convsearch.files import read_json
from convsearch.model import attention, distributed
from convsearch.types import Message

AGAIN = "copy or export the folder again"
JSON_FILES = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")
SMALL = 32 << 20  # bytes of the files that the tokenizer's loading checks; that of the model checks all
HUB_S = 10  # for one answer of the hub
transformers_logging.disable_progress_bar()  # a model loads in seconds; its bars would interrupt those of the job


def pick_device(name: str) -> torch.device:
    """``auto`` is CUDA if available, else CPU. Raises ValueError for CUDA on a machine without it."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"trainer.device={name} but there is no CUDA device; use trainer.device=cpu")
    return torch.device(name)


def fingerprint(path: str) -> str:
    """Of a model folder, or the commit of a model of the hub. Raises ValueError if there is no such model."""
    _check_model(path)
    return fingerprints.of_model_folder(Path(path)) if Path(path).is_dir() else f"commit {_commit(path)}"


def load_tokenizer(path: str, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a model folder or hub name. Raises ValueError without chat template or end-of-sequence token."""
    _check_model(path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except Exception as error:
        if type(error) is not Exception:  # the type that tokenizers raises
            raise
        raise ValueError(f"the tokenizer in {path} is damaged ({error}): {AGAIN}") from error
    if tokenizer.chat_template is None:
        raise ValueError(f"the tokenizer of {path} has no chat template: use an instruction-tuned model or add one")
    if tokenizer.eos_token_id is None:
        raise ValueError(f"the tokenizer of {path} has no end-of-sequence token: set eos_token in its config")
    return tokenizer


def load_model(path: str, dtype: torch.dtype = torch.float32, *, trust_remote_code: bool = False) -> Any:
    """A transformers causal LM on the CPU, with our attention function. Raises ValueError if it does not load."""
    _check_model(path, largest=None if distributed.rank() == 0 else SMALL)
    try:
        options = {"attn_implementation": attention.NAME, "trust_remote_code": trust_remote_code}
        return AutoModelForCausalLM.from_pretrained(path, dtype=dtype, **options)
    except (OSError, RuntimeError, KeyError) as error:
        raise ValueError(f"{path} does not load as a causal language model: {error}") from error
    except SafetensorError as error:
        raise ValueError(f"the weights in {path} are damaged ({error}): {AGAIN}") from error


def encode_chat(tokenizer: Any, messages: tuple[Message, ...]) -> tuple[int, ...]:
    """Token ids of the chat, up to the start of the model's answer.

    Only the template makes control tokens: where the text of a message spells one (``<|im_end|>``), it stays text.
    """
    control = _control_tokens(tokenizer)
    spelled = [number for number, message in enumerate(messages) if control.search(message["content"])]
    marks = {number: f"\ue000{number}\ue001" for number in spelled}  # private characters, which the template keeps
    shown = [{**message, "content": marks.get(number, message["content"])} for number, message in enumerate(messages)]
    text = tokenizer.apply_chat_template(shown, add_generation_prompt=True, tokenize=False)
    ids: list[int] = []
    for number in spelled:
        if marks[number] not in text:
            raise ValueError(f"the chat template leaves out a message that spells a control token: {messages[number]}")
        before, _, text = text.partition(marks[number])
        ids += tokenizer.encode(before, add_special_tokens=False)
        ids += tokenizer.encode(messages[number]["content"], add_special_tokens=False, split_special_tokens=True)
    return (*ids, *tokenizer.encode(text, add_special_tokens=False))


@lru_cache(maxsize=8)
def _control_tokens(tokenizer: Any) -> re.Pattern[str]:
    names = [re.escape(token.content) for token in tokenizer.added_tokens_decoder.values() if token.special]
    return re.compile("|".join(names) or r"(?!)")  # (?!) matches nothing


def stop_token_ids(model: Any, tokenizer: Any) -> tuple[int, ...]:
    """The ids that end an answer: those of the tokenizer and of the generation config."""
    configured = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    listed = configured if isinstance(configured, list) else [configured]
    return tuple(sorted({int(i) for i in [tokenizer.eos_token_id, *listed] if i is not None}))


def _check_model(path: str, largest: int | None = SMALL) -> None:
    """Raises ValueError if a folder is not a model's, or damaged; or if a model of the hub is not within reach."""
    if not path:
        keys = "actor_rollout_ref.model.path (GRPO), model.partial_pretrain (SFT) or --model_name_or_path"
        raise ValueError(f"no model is named: set {keys}")
    folder = Path(path)
    if not (path.startswith((".", "/", "~")) or folder.exists() or path.count("/") > 1):
        _commit(path)
        return
    if not (folder / "config.json").is_file():
        raise ValueError(f"{path} is not a model folder: it has no config.json")
    checksums.check(folder, f"{AGAIN}, or delete its {checksums.NAME} if you have changed it", largest)
    for name in JSON_FILES:
        if (folder / name).is_file():
            read_json(folder / name, AGAIN)


def _commit(name: str) -> str:
    """The commit of a model of the hub: of the cache, else the hub's newest, which is asked once."""
    try:
        cached = try_to_load_from_cache(name, "config.json")
        return Path(cached).parent.name if isinstance(cached, str) else str(model_info(name, timeout=HUB_S).sha)
    except (httpx2.HTTPError, OSError, HFValidationError) as error:
        reason = str(error).splitlines()[0]
        fault = f"{name} is neither a folder nor a model within reach on the hub ({reason})"
        raise ValueError(f"{fault}: give a model folder, or check the name and the network") from error
