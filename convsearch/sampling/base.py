"""What a trainer needs of an engine: prompts in, completions out, new weights after each step."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from convsearch.types import Completion

Prompt = tuple[int, ...]  # token ids
Finished = dict[int, list[Completion]]  # position of a prompt -> its n samples


class WeightSource(Protocol):
    """Where a sampler gets new weights: a policy."""

    @property
    def causal_lm(self) -> Any:
        """The trained module; an object without weights if the module is in other processes."""

    def weights(self) -> dict[str, Tensor]:
        """Full tensors on the CPU, by Hugging Face name."""


@dataclass(frozen=True, slots=True)
class Tensors:
    """Weights that are in this process's memory."""

    named: dict[str, Tensor]
    causal_lm: None = None

    def weights(self) -> dict[str, Tensor]:
        return self.named


class Sampler(Protocol):
    """An engine. A sample depends on prompt, position, number and seed, never on the rest of the batch."""

    def generate(self, prompts: Sequence[Prompt], n: int, seed: int) -> list[list[Completion]]:
        """The n samples of each prompt."""

    def stream(self, prompts: Sequence[Prompt], n: int, seed: int) -> Iterator[Finished]:
        """The same samples in batches, each when it is finished, to be scored while others are generated."""

    def load_weights(self, source: WeightSource, version: int) -> None:
        """Takes over the weights; completions carry ``version`` from now on."""


def check_finite(logprobs: Iterable[float]) -> None:
    """Raises ValueError if a log-prob is not a number: then no sample of this model means anything."""
    if any(math.isnan(logprob) for logprob in logprobs):
        remedy = "its weights are damaged, or the training that made them has diverged"
        raise ValueError(f"the model's logits are not finite: {remedy}; use another model or an earlier checkpoint")


def collect(batches: Iterator[Finished], prompts: int) -> list[list[Completion]]:
    """All batches of a stream, in the order of the prompts."""
    found: Finished = {}
    for batch in batches:
        found |= batch
    assert sorted(found) == list(range(prompts)), "a stream must contain every prompt once"
    return [found[p] for p in range(prompts)]


@dataclass(frozen=True, slots=True)
class SamplingConfig:
    """temperature 0 is greedy; top_p 1, top_k 0 and repetition_penalty 1 change nothing; lengths in tokens."""

    temperature: float = 0.7
    top_p: float = 1.0
    top_k: int = 0
    max_tokens: int = 1024
    batch_size: int = 64  # sequences decoded at once
    repetition_penalty: float = 1.0  # the logits of tokens seen in prompt and output: / this if above 0, else x this

    def __post_init__(self) -> None:
        limits = {
            "temperature": (0, 10),
            "top_p": (0, 1),
            "top_k": (0, 1 << 20),
            "max_tokens": (1, 1 << 20),
            "batch_size": (1, 1 << 16),
            "repetition_penalty": (0.01, 100),
        }
        for name, (low, high) in limits.items():
            if not low <= getattr(self, name) <= high:
                raise ValueError(f"sampling: {name} = {getattr(self, name)} is not within {low} and {high}")
