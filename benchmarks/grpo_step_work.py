"""What the contestants of benchmarks.grpo_step get. It imports nothing heavy, because their memory is measured."""

from dataclasses import dataclass

PHASES = ("sample_s", "reference_s", "update_s")


@dataclass(frozen=True, slots=True)
class Work:
    """What every contestant gets."""

    model: str
    prompts: list[str]
    samples: int = 4
    tokens: int = 64
    beta: float = 0.001
    temperature: float = 0.7
    threads: int = 2
    steps: int = 1
    trl_micro_batch: int = 4
    dtype: str = "fp32"  # of the arithmetic; weights and Adam's state are in fp32
