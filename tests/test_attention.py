"""Attention over the trees of a row, branch by branch, is one masked product over the whole row."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from convsearch.model import attention
from convsearch.model.attention import PackedContext, Segment
from convsearch.model.batch import STRIDE, related

HEADS, SIZE = 2, 8
# Rows of trees; a tree is the lengths of its prompt and of its branches.
ROWS = {
    "one branch": [[[4, 3]]],
    "unequal branches": [[[5, 1, 6, 3]]],
    "a prompt alone": [[[6]]],
    "a prompt of one token": [[[1, 2, 4]]],
    "several trees": [[[3, 2, 4], [5], [2, 1, 1, 5]]],
    "several rows, padding": [[[3, 2, 4], [4, 1]], [[2, 3]], [[1], [7, 2, 2]]],
}


def branches_of(rows: list[list[list[int]]]) -> tuple[Tensor, list[Segment]]:
    """The branch numbers [B, T] (-1: padding), and the trees as segments."""
    length = max(sum(map(sum, trees)) for trees in rows)
    branch_BT, segments = torch.full((len(rows), length), -1), []
    for row, trees in enumerate(rows):
        start = 0
        for number, sizes in enumerate(trees):
            own_T = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
            branch_BT[row, start : start + len(own_T)] = own_T + number * STRIDE
            segments.append(Segment.of(row, start, own_T))
            start += len(own_T)
    return branch_BT, segments


@pytest.mark.parametrize("most_pairs", [attention.MOST_PAIRS, 0])  # plain products, SDPA
@pytest.mark.parametrize("grouped", [1, 2])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("name", ROWS)
def test_segments_equal_one_masked_product(
    monkeypatch: pytest.MonkeyPatch, name: str, dtype: torch.dtype, tolerance: float, grouped: int, most_pairs: int
) -> None:
    monkeypatch.setattr(attention, "MOST_PAIRS", most_pairs)
    branch_BT, segments = branches_of(ROWS[name])
    rows, length = branch_BT.shape
    draw = torch.Generator().manual_seed(1)
    query, key, value, slope = (
        torch.randn(rows, heads, length, SIZE, generator=draw, dtype=dtype)
        for heads in (HEADS * grouped, HEADS, HEADS, HEADS * grouped)
    )
    real_BT = branch_BT >= 0
    causal_TT = torch.ones(length, length, dtype=torch.bool).tril()
    mask = (causal_TT & related(branch_BT[:, :, None], branch_BT[:, None, :]))[:, None]
    slope = slope * real_BT[:, None, :, None]  # what is computed for padding is of no use to anyone

    found = []
    for whole in (False, True):
        inputs = [tensor.clone().requires_grad_() for tensor in (query, key, value)]
        if whole:
            options = {"attn_mask": mask, "scale": 0.3, "enable_gqa": grouped > 1}
            out = scaled_dot_product_attention(*inputs, **options)  # type: ignore[arg-type]
        else:
            out = PackedContext(segments).attend(*inputs, 0.3)
            assert out.shape == query.shape
            assert out.transpose(1, 2)[~real_BT].eq(0).all()
        torch.autograd.backward((out * slope).sum())
        gradients = [tensor.grad for tensor in inputs if tensor.grad is not None]
        assert len(gradients) == 3
        found.append([out.detach() * real_BT[:, None, :, None], *gradients])
    for ours, expected in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected, atol=tolerance, rtol=tolerance)
