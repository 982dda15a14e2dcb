"""A checkpoint -> a Hugging Face folder: ``python -m convsearch.export RUN_FOLDER --output MODEL [--dtype bf16]``.

The checkpoint is a run folder (its newest one), a ``global_step_N`` of either form (whole tensors, or the shards of
several ranks), or any Hugging Face folder of safetensors. Tensors are read one output file at a time: a model larger
than the memory can be exported.
"""

import argparse
from pathlib import Path

from convsearch.cli import command_parser, run


def build_parser() -> argparse.ArgumentParser:
    parser = command_parser("convsearch.export", __doc__)
    parser.add_argument("checkpoint", type=Path, help="run folder, global_step_N, or Hugging Face folder")
    parser.add_argument("--output", type=Path, required=True, help="folder to write; must be absent or empty")
    parser.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), help="type of the weights; None: as saved")
    parser.add_argument("--base", type=Path, help="folder of config.json and the tokenizer; None: the checkpoint")
    parser.add_argument("--max_shard_size", default="5GB", help="largest size of a weight file")
    return parser


def main() -> None:
    """Parses the arguments, then exports (torch is imported here)."""
    args = build_parser().parse_args()
    from convsearch.runs.export import export, size_of

    files = export(args.checkpoint, args.output, args.dtype, size_of(args.max_shard_size), args.base)
    size = sum(file.stat().st_size for file in files) / 10**9
    print(f"{args.output}: {len(files)} weight file{'s' if len(files) > 1 else ''}, {size:.2f} GB")


if __name__ == "__main__":
    run(main)
