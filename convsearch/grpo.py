"""GRPO with a retriever as the teacher: ``python -m convsearch.grpo experiment=...``.

Differs from the textbook (arXiv 2402.03300) as ConvSearch-R1 does: the reward comes from a retriever (the gold passage's rank, the nearness to it, or a
mix: ``rewarder.py``), the reference is the SFT model, one on-policy update a step.

Ours, exact and switchable: each prompt is computed once for its whole group (``batch.py``).
"""

import sys

from convsearch.cli import run
from convsearch.config import load_grpo_config


def main() -> None:
    """Composes the configuration, then hands over to the training loop (torch is imported there)."""
    cfg = load_grpo_config(sys.argv[1:])
    from convsearch.trainers.grpo import train

    train(cfg)


if __name__ == "__main__":
    run(main)
