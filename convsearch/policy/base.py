"""What the trainers need of a policy, wherever its processes are."""

from collections.abc import Callable
from typing import Any, Protocol, TypeVar

from torch import Tensor

from convsearch.model.batch import Loss, MicroBatch

T = TypeVar("T")


class Reference(Protocol):
    """A frozen model."""

    def logprobs(self, micro: MicroBatch) -> Tensor:
        """Log-probability of each response token [R], on the CPU."""


class Policy(Reference, Protocol):
    """A trained model. ``LocalPolicy`` is in this process, ``RayPolicy`` in processes of its own."""

    @property
    def causal_lm(self) -> Any:
        """The model, or only its ``config`` and ``generation_config`` if the model is in other processes."""

    def forward_backward(self, micro: MicroBatch, loss: Loss) -> dict[str, float]:
        """Adds the micro-batch's gradient; returns the sums that the loss reports."""

    def optim_step(self, lr: float) -> dict[str, float]:
        """One clipped optimizer step; returns grad_norm, lr, skipped (1: the gradient was not finite), broken (1: a
        weight is not)."""

    def weights(self) -> dict[str, Tensor]:
        """Full tensors on the CPU, by Hugging Face name."""

    def run(self, function: Callable[..., T], *arguments: Any) -> T:
        """Calls ``function(local policy, *arguments)`` in every process; returns the result of process 0."""
