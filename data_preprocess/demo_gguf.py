"""Unpacks a quantised GGUF file into a Hugging Face folder, and checks that the model answers."""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from convsearch import checksums

QUESTION, ANSWER = "What is the capital of France?", "Paris"


def check_model(model: Any, tokenizer: Any) -> str:
    """Asks the model one question and returns its answer.

    Raises:
        ValueError: the embeddings are not tied, or the answer is wrong: the file or its reader is damaged.
    """
    remedy = "check the versions of transformers and gguf"
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    if not tied or not model.config.tie_word_embeddings:
        raise ValueError(f"the unpacked model's input and output embeddings are not tied, as SmolLM2's are: {remedy}")
    chat = [{"role": "user", "content": QUESTION}]
    form = {"add_generation_prompt": True, "return_tensors": "pt", "return_dict": True}
    prompt = tokenizer.apply_chat_template(chat, **form)
    with torch.inference_mode():
        tokens = model.generate(**prompt, max_new_tokens=16, do_sample=False)
    answer = str(tokenizer.decode(tokens[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)).strip()
    if ANSWER not in answer:
        raise ValueError(f"the unpacked model answers {QUESTION!r} with {answer!r}: {remedy}")
    return answer


def unpack(gguf: Path, folder: Path) -> None:
    """Writes config, float32 safetensors and the tokenizer with its chat template."""
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    settings = {"quantization_config": GgufConfig(dequantize=True), "dtype": torch.float32}
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, **settings)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer, model.is_quantized = None, False
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def convert(gguf: Path, output: Path, origin: Mapping[str, str], source_file: str) -> str:
    """Makes ``output`` from the GGUF file, atomically, and returns the answer to the check's question.

    Args:
        origin: where the file is from, for ``source_file``, which is part of the folder.

    Raises:
        ValueError: ``output`` is something else, or the model fails its check.
    """
    if output.exists() and not (output.is_dir() and ((output / source_file).exists() or not any(output.iterdir()))):
        raise ValueError(f"{output} exists and was not made by this command: give another --output, or remove it")
    temporary = output.with_name(f"{output.name}.tmp-{os.getpid()}")
    temporary.mkdir(parents=True)
    try:
        unpack(gguf, temporary)
        model = AutoModelForCausalLM.from_pretrained(temporary)
        answer = check_model(model, AutoTokenizer.from_pretrained(temporary))
        source: dict[str, Any] = {"gguf": gguf.name, "gguf_bytes": gguf.stat().st_size, **origin}
        (temporary / source_file).write_text(json.dumps(source, indent=1) + "\n", encoding="utf-8")
        checksums.seal(temporary)
        if output.exists():
            shutil.rmtree(output)
        os.replace(temporary, output)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return answer
