"""Loads a causal language model and its tokenizer; errors say what is wrong with the folder."""

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from convsearch.model import attention
from convsearch.types import Message

transformers_logging.disable_progress_bar()  # a model loads in seconds; its bars would interrupt those of the job


def pick_device(name: str) -> torch.device:
    """``auto`` is CUDA if available, else CPU. Raises ValueError for CUDA on a machine without it."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"trainer.device={name} but there is no CUDA device; use trainer.device=cpu")
    return torch.device(name)


def load_tokenizer(path: str, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a model folder or hub name. Raises ValueError without chat template or end-of-sequence token."""
    _check_folder(path)
    tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    if tokenizer.chat_template is None:
        raise ValueError(f"the tokenizer of {path} has no chat template: use an instruction-tuned model or add one")
    if tokenizer.eos_token_id is None:
        raise ValueError(f"the tokenizer of {path} has no end-of-sequence token: set eos_token in its config")
    return tokenizer


def load_model(path: str, dtype: torch.dtype = torch.float32, *, trust_remote_code: bool = False) -> Any:
    """A transformers causal LM on the CPU, with our attention function. Raises ValueError if it does not load."""
    _check_folder(path)
    try:
        options = {"attn_implementation": attention.NAME, "trust_remote_code": trust_remote_code}
        return AutoModelForCausalLM.from_pretrained(path, dtype=dtype, **options)
    except (OSError, RuntimeError, KeyError) as error:
        raise ValueError(f"{path} does not load as a causal language model: {error}") from error
    except SafetensorError as error:
        raise ValueError(f"the weights in {path} are damaged ({error}): copy or export the folder again") from error


def encode_chat(tokenizer: Any, messages: tuple[Message, ...]) -> tuple[int, ...]:
    """Token ids of the chat, up to the start of the model's answer."""
    text = tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=False)
    return tuple(tokenizer.encode(text, add_special_tokens=False))


def stop_token_ids(model: Any, tokenizer: Any) -> tuple[int, ...]:
    """The ids that end an answer: those of the tokenizer and of the generation config."""
    configured = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    listed = configured if isinstance(configured, list) else [configured]
    return tuple(sorted({int(i) for i in [tokenizer.eos_token_id, *listed] if i is not None}))


def _check_folder(path: str) -> None:
    if not path:
        keys = "actor_rollout_ref.model.path (GRPO), model.partial_pretrain (SFT) or --model_name_or_path"
        raise ValueError(f"no model is named: set {keys}")
    folder = Path(path)
    looks_local = path.startswith((".", "/", "~")) or folder.exists() or path.count("/") > 1
    if looks_local and not (folder / "config.json").is_file():
        raise ValueError(f"{path} is not a model folder: it has no config.json")
