"""Loading a causal language model and its tokenizer, with errors that say what is wrong with the folder."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from convsearch.model import attention
from convsearch.types import Message

transformers_logging.disable_progress_bar()  # a model loads in a second or two; the bars would only break up those of the job


def pick_device(name: str) -> torch.device:
    """``auto`` is CUDA where there is one, else CPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"trainer.device={name} but this machine shows no CUDA device; use trainer.device=cpu")
    return torch.device(name)


def load_tokenizer(path: str, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a model folder or hub name; it must bring a chat template and an end-of-sequence token."""
    _check_folder(path)
    tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    if tokenizer.chat_template is None:
        raise ValueError(
            f"the tokenizer of {path} has no chat template; use an instruction-tuned model or add a template to it"
        )
    if tokenizer.eos_token_id is None:
        raise ValueError(f"the tokenizer of {path} has no end-of-sequence token")
    return tokenizer


def load_model(path: str, dtype: torch.dtype = torch.float32, *, trust_remote_code: bool = False) -> Any:
    """A transformers causal LM on the CPU, with the project's attention function."""
    _check_folder(path)
    try:
        return AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, attn_implementation=attention.NAME, trust_remote_code=trust_remote_code
        )
    except (OSError, RuntimeError, KeyError) as error:
        raise ValueError(f"{path} does not load as a causal language model: {error}") from error
    except Exception as error:  # safetensors has an error type of its own for cut files
        if type(error).__name__ != "SafetensorError":
            raise
        raise ValueError(f"the weights in {path} are damaged ({error}); copy or export the folder again") from error


def encode_chat(tokenizer: Any, messages: tuple[Message, ...]) -> tuple[int, ...]:
    """Token ids of the chat up to where the model's answer begins."""
    text = tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=False)
    return tuple(tokenizer.encode(text, add_special_tokens=False))


def stop_token_ids(model: Any, tokenizer: Any) -> tuple[int, ...]:
    """The ids that end an answer: the tokenizer's end of sequence and those of the generation config."""
    configured = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    listed = configured if isinstance(configured, list) else [configured]
    return tuple(sorted({int(i) for i in [tokenizer.eos_token_id, *listed] if i is not None}))


def _check_folder(path: str) -> None:
    if not path:
        raise ValueError(
            "no model was named: set actor_rollout_ref.model.path (GRPO), model.partial_pretrain (SFT) or --model_name_or_path"
        )
    folder = Path(path)
    looks_local = path.startswith((".", "/", "~")) or folder.exists() or path.count("/") > 1
    if looks_local and not (folder / "config.json").is_file():
        raise ValueError(f"{path} is no model folder: it has no config.json")
