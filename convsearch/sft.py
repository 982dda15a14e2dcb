"""Supervised fine-tuning on the warm-up data.

``torchrun --nproc_per_node=8 -m convsearch.sft experiment=...``, or plain ``python -m convsearch.sft experiment=...``
"""

import sys

from convsearch.cli import Ended, run
from convsearch.config import load_sft_config


def main() -> None:
    """Reads the configuration, then trains."""
    cfg = load_sft_config(sys.argv[1:])
    from convsearch.model import distributed
    from convsearch.trainers.sft import train

    try:
        train(cfg)
    except Ended as end:
        if distributed.world_size() == 1:
            raise
        if distributed.rank() == 0:
            print(f"stopped: {end}", file=sys.stderr)
        distributed.stop(end.status)
    distributed.stop()


if __name__ == "__main__":
    run(main)
