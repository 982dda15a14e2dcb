"""Supervised fine-tuning on the warm-up data: ``torchrun --nproc_per_node=8 -m convsearch.sft experiment=...``, or plain ``python -m``.

The loss is the mean over the response tokens of the whole batch, on all ranks; prompts are masked. Differs from the seed's trainer (mean of
micro-batch means) in that the number of ranks and the micro-batch size cannot change it.
"""

from convsearch.cli import run
from convsearch.trainers.sft import main

__all__ = ["main"]

if __name__ == "__main__":
    run(main)
