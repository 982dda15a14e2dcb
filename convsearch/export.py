"""A checkpoint -> a Hugging Face folder: ``python -m convsearch.export outputs/run/grpo --output MODEL [--dtype bf16]``.

The checkpoint is a run folder (its newest one), a ``global_step_N`` of either form (whole tensors, or the shards of several ranks), any Hugging Face folder
of safetensors, or a folder of torch.distributed.checkpoint by another trainer (``--base``: whose configuration and tokenizer go with it). Tensors are read
one output file at a time: a model larger than the memory can be exported.
"""

from convsearch.cli import run
from convsearch.runs.export import main

__all__ = ["main"]

if __name__ == "__main__":
    run(main)
