"""Log-probability and entropy of chosen tokens from logits over a large vocabulary, with little memory."""

from typing import Any

import torch
from torch import Tensor

ROWS = 16  # scored at a time: their logits stay in a CPU's cache


class ChosenLogprobs(torch.autograd.Function):
    """logits [R, V], target ids [R], temperature -> log-probability [R] and entropy [R] in float32.

    It keeps the logits as they are and one normaliser per row, and computes the probabilities again in the backward
    pass, on a CPU ``ROWS`` rows at a time. Plain operations would keep several float32 tensors [R, V].
    """

    @staticmethod
    def forward(ctx: Any, logits_RV: Tensor, target_ids_R: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        normaliser_R = torch.empty(len(logits_RV), dtype=torch.float32, device=logits_RV.device)
        chosen_R, entropy_R = torch.empty_like(normaliser_R), torch.empty_like(normaliser_R)
        for rows in _chunks(logits_RV):
            logprobs = logits_RV[rows].float() / temperature
            normaliser_R[rows] = normaliser = logprobs.logsumexp(dim=-1)
            logprobs -= normaliser[:, None]
            chosen_R[rows] = logprobs.gather(1, target_ids_R[rows, None])[:, 0]
            entropy_R[rows] = -logprobs.exp().mul_(logprobs).sum(dim=-1)
        ctx.save_for_backward(logits_RV, target_ids_R, normaliser_R, entropy_R)
        ctx.temperature = temperature
        ctx.set_materialize_grads(False)
        return chosen_R, entropy_R

    @staticmethod
    def backward(ctx: Any, grad_chosen_R: Tensor | None, grad_entropy_R: Tensor | None) -> Any:
        logits_RV, target_ids_R, normaliser_R, entropy_R = ctx.saved_tensors
        grad_RV = torch.empty_like(logits_RV)
        if grad_chosen_R is None:
            grad_chosen_R = torch.zeros_like(normaliser_R)
        for rows in _chunks(logits_RV):
            logprobs = (logits_RV[rows].float() / ctx.temperature).sub_(normaliser_R[rows, None])
            probs, slope = logprobs.exp(), grad_chosen_R[rows, None]
            total = (probs * -slope).scatter_add_(1, target_ids_R[rows, None], slope)
            if grad_entropy_R is not None:
                total -= probs * (logprobs + entropy_R[rows, None]) * grad_entropy_R[rows, None]
            grad_RV[rows] = total.div_(ctx.temperature)
        return grad_RV, None, None


def _chunks(logits_RV: Tensor) -> list[slice]:
    """All rows at once on a GPU, where many small kernels would cost more than the memory."""
    size = ROWS if logits_RV.device.type == "cpu" else max(1, len(logits_RV))
    return [slice(start, start + size) for start in range(0, len(logits_RV), size)]
