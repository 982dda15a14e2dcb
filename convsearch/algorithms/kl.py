"""Estimates of the KL divergence to the reference, per token."""

from typing import Literal

from torch import Tensor

KlEstimator = Literal["low_var_kl", "kl", "abs", "mse"]


def kl_penalty(logprobs_R: Tensor, ref_logprobs_R: Tensor, estimator: KlEstimator = "low_var_kl") -> Tensor:
    """A per-token estimate of KL(policy || reference), after Schulman's note "Approximating KL divergence".

    ``low_var_kl`` is k3 = e^d - d - 1 with d = ref - policy, its value clamped to +-10 (and d to
    +-20), as in the paper's trainer.
    """
    difference_R = logprobs_R - ref_logprobs_R
    if estimator == "kl":
        return difference_R
    if estimator == "abs":
        return difference_R.abs()
    if estimator == "mse":
        return 0.5 * difference_R.square()
    if estimator != "low_var_kl":
        raise ValueError(f"KL estimator {estimator!r} is not one of low_var_kl, kl, abs, mse")
    d_R = (-difference_R).clamp(-20, 20)
    return (d_R.exp() - d_R - 1).clamp(-10, 10)
