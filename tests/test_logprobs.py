"""Log-probabilities and entropies of chosen tokens against plain ``log_softmax`` in float64."""

import pytest
import torch
from torch import Tensor

from convsearch.model.logprobs import ROWS, ChosenLogprobs

VOCABULARY = 50
# Beside float32's own errors: a gradient is stored in the type of the logits, and bfloat16 has 8 significant bits.
ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 2.0**-8}


def drawn(rows: int, dtype: torch.dtype, spread: float = 3.0) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(rows)
    logits_RV = spread * torch.randn(rows, VOCABULARY, generator=draw)
    return logits_RV.to(dtype).requires_grad_(), torch.randint(VOCABULARY, (rows,), generator=draw)


def plain(logits_RV: Tensor, target_ids_R: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """(float64 copy of the logits, log-probs, entropies)."""
    wide_RV = logits_RV.detach().double().requires_grad_()
    logprobs_RV = (wide_RV / temperature).log_softmax(-1)
    chosen_R = logprobs_RV.gather(1, target_ids_R[:, None])[:, 0]
    return wide_RV, chosen_R, -(logprobs_RV.exp() * logprobs_RV).sum(-1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, ROWS - 1, ROWS, 2 * ROWS + 5])
@pytest.mark.parametrize(("of_chosen", "of_entropy"), [(1.0, 0.0), (0.0, 1.0), (0.7, -0.4)])
@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_values_and_gradients(
    dtype: torch.dtype, rows: int, of_chosen: float, of_entropy: float, temperature: float
) -> None:
    """Of the log-prob alone, of the entropy alone, and of both, with another slope in each row."""
    logits_RV, target_ids_R = drawn(rows, dtype)
    before_RV, slope_R = logits_RV.detach().clone(), torch.linspace(-2, 3, rows)
    wide_RV, expected_chosen_R, expected_entropy_R = plain(logits_RV, target_ids_R, temperature)
    chosen_R, entropy_R = ChosenLogprobs.apply(logits_RV, target_ids_R, temperature)
    assert (chosen_R.dtype, entropy_R.dtype) == (torch.float32, torch.float32)
    torch.testing.assert_close(chosen_R.double(), expected_chosen_R, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(entropy_R.double(), expected_entropy_R, atol=1e-5, rtol=1e-5)

    def loss(chosen_R: Tensor, entropy_R: Tensor) -> Tensor:
        parts = [(of_chosen, chosen_R), (of_entropy, entropy_R)]
        return sum(((factor * slope_R * values_R).sum() for factor, values_R in parts if factor), torch.zeros(()))

    torch.autograd.backward(loss(expected_chosen_R, expected_entropy_R))
    torch.autograd.backward(loss(chosen_R, entropy_R))
    assert logits_RV.grad is not None
    assert logits_RV.grad.dtype == dtype
    torch.testing.assert_close(logits_RV.grad.double(), wide_RV.grad, atol=1e-6, rtol=ROUNDING[dtype])
    assert torch.equal(logits_RV, before_RV)


def test_very_uneven_logits_give_finite_numbers() -> None:
    """One token has the probability 1: the entropy is 0, and so are all gradients of its log-prob."""
    logits_RV, target_ids_R = torch.zeros(2, VOCABULARY), torch.tensor([3, 4])
    logits_RV[:, 3] = 1e4
    logits_RV.requires_grad_()
    chosen_R, entropy_R = ChosenLogprobs.apply(logits_RV, target_ids_R, 1.0)
    assert chosen_R.tolist() == [0.0, -1e4]
    assert entropy_R.tolist() == [0.0, 0.0]
    torch.autograd.backward(chosen_R.sum() + entropy_R.sum())
    assert logits_RV.grad is not None
    assert logits_RV.grad[0].eq(0).all()
    assert logits_RV.grad[1, 3:5].tolist() == [-1.0, 1.0]
    assert logits_RV.grad[1].abs().sum() == 2


def test_the_same_logits_twice_add_up() -> None:
    """Two losses of one pass, and a second pass: nothing that is kept for the backward pass is changed by it."""
    logits_RV, target_ids_R = drawn(5, torch.float32)
    chosen_R, entropy_R = ChosenLogprobs.apply(logits_RV, target_ids_R, 0.7)
    (once,) = torch.autograd.grad(chosen_R.sum() + entropy_R.sum(), logits_RV, retain_graph=True)
    (again,) = torch.autograd.grad(chosen_R.sum() + entropy_R.sum(), logits_RV)
    assert torch.equal(once, again)
