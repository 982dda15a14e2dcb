"""Packing samples behind a shared prompt.

1. A row is the prompt once and every sample behind it; positions go on from the prompt's end in each sample.
2. What a token sees is its prompt and the tokens before it in its own sample: the same text as in a row of its own.
3. Packing loses, doubles and splits nothing, and keeps to its limit of computed positions.
"""

from collections import Counter
from itertools import accumulate, pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from convsearch.model.batch import (
    STRIDE,
    Branch,
    MicroBatch,
    Tree,
    balanced,
    collate,
    collate_rows,
    greedy_bins,
    pack,
    related,
    unshared,
)

WORKED = Tree((7, 8), (Branch((1, 2), advantage=0.5, weight=0.1), Branch((3,), advantage=-1.0, weight=0.2)))

tokens = st.lists(st.integers(1, 99), min_size=1, max_size=6).map(tuple)
small = st.integers(-8, 8).map(lambda number: number / 4)  # exact in float32
branches = st.builds(
    lambda ids, advantage, weight: Branch(ids, advantage, weight, tuple(-token / 8 for token in ids)),
    tokens,
    small,
    small,
)
trees = st.lists(st.builds(Tree, tokens, st.lists(branches, min_size=1, max_size=4).map(tuple)), min_size=1, max_size=8)


def trees_of(batch: MicroBatch) -> list[Tree]:
    """Reads the trees back out of the tensors alone."""
    assert batch.sampler_logprobs_R is not None
    found = []
    for row in range(len(batch.branch_BT)):
        ids, numbers = batch.token_ids_BT[row].tolist(), batch.branch_BT[row].tolist()
        mine = (batch.row_R == row).nonzero().flatten()
        grown, cursor = [], 0
        for number in range(1, max(numbers) + 1):
            own = tuple(token for token, branch in zip(ids, numbers, strict=True) if branch == number)
            at = mine[cursor : cursor + len(own)]
            cursor += len(own)
            assert batch.target_ids_R[at].tolist() == list(own)
            assert len(set(batch.advantages_R[at].tolist())) == len(set(batch.weights_R[at].tolist())) == 1
            logprobs = tuple(batch.sampler_logprobs_R[at].tolist())
            grown.append(Branch(own, batch.advantages_R[at][0].item(), batch.weights_R[at][0].item(), logprobs))
        assert cursor == len(mine)
        found.append(
            Tree(tuple(token for token, branch in zip(ids, numbers, strict=True) if branch == 0), tuple(grown))
        )
    return found


def test_the_worked_example() -> None:
    batch = collate([WORKED])
    assert batch.token_ids_BT.tolist() == [[7, 8, 1, 2, 3]]
    assert batch.position_ids_BT.tolist() == [[0, 1, 2, 3, 2]]
    assert batch.branch_BT.tolist() == [[0, 0, 1, 1, 2]]
    assert batch.row_R.tolist() == [0, 0, 0]
    assert batch.source_R.tolist() == [1, 2, 1]
    assert batch.target_ids_R.tolist() == [1, 2, 3]
    assert batch.advantages_R.tolist() == [0.5, 0.5, -1.0]
    assert batch.weights_R.tolist() == pytest.approx([0.1, 0.1, 0.2])
    assert batch.sampler_logprobs_R is None
    assert batch.num_tokens == 5


def mask_of(micro: MicroBatch) -> torch.Tensor:
    """[B, 1, T, T] bool, True where a query position (third axis) may see a key position (last axis)."""
    causal_TT = torch.ones(micro.branch_BT.shape[1], micro.branch_BT.shape[1], dtype=torch.bool).tril()
    return (causal_TT & related(micro.branch_BT[:, :, None], micro.branch_BT[:, None, :]))[:, None]


def test_the_worked_example_s_attention_mask() -> None:
    mask = mask_of(collate([WORKED]))
    assert mask.shape == (1, 1, 5, 5)
    assert mask.dtype == torch.bool
    assert mask[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 1, 1, 1, 0],
        [1, 1, 0, 0, 1],
    ]


def test_a_shorter_row_is_padded_on_the_right() -> None:
    batch = collate([WORKED, Tree((9,), (Branch((4,)),))], pad_id=50)
    assert batch.token_ids_BT.tolist() == [[7, 8, 1, 2, 3], [9, 4, 50, 50, 50]]
    assert batch.branch_BT.tolist() == [[0, 0, 1, 1, 2], [0, 1, -1, -1, -1]]
    assert batch.row_R.tolist() == [0, 0, 0, 1]
    assert batch.source_R.tolist() == [1, 2, 1, 0]
    assert batch.target_ids_R.tolist() == [1, 2, 3, 4]
    mask = mask_of(batch)[1, 0]
    assert not mask[:2, 2:].any()  # no token sees padding
    assert mask.any(dim=1).all()  # and no row of scores is empty, whose softmax would not be a number


@settings(max_examples=30)
@given(trees)
def test_a_token_sees_the_same_context_as_in_its_own_row(forest: list[Tree]) -> None:
    batch = collate(forest)
    mask = mask_of(batch)[:, 0]
    expected = [
        (row, [*tree.prompt_ids, *branch.token_ids[:done]], branch.token_ids[done])
        for row, tree in enumerate(forest)
        for branch in tree.branches
        for done in range(len(branch.token_ids))
    ]
    assert len(expected) == len(batch.target_ids_R)
    for index, (row, context, target) in enumerate(expected):
        assert batch.row_R[index] == row
        assert batch.target_ids_R[index] == target
        seen = mask[row, batch.source_R[index]]
        assert batch.token_ids_BT[row][seen].tolist() == context
        assert batch.position_ids_BT[row][seen].tolist() == list(range(len(context)))


@settings(max_examples=30)
@given(trees, st.integers(1, 60))
def test_packing_keeps_every_tree_once_within_the_limit(forest: list[Tree], max_tokens: int) -> None:
    batches = list(pack(forest, max_tokens))
    assert Counter(tree for batch in batches for tree in trees_of(batch)) == Counter(forest)
    for batch in batches:
        assert batch.num_tokens <= max_tokens or len(batch.branch_BT) == 1
    for one, other in pairwise(batches):  # and no batch is cut short: the next row would not have fitted
        longest = len(trees_of(other)[0])
        assert longest * (len(one.branch_BT) + 1) > max_tokens
    again = list(pack(forest, max_tokens))
    assert [batch.token_ids_BT.tolist() for batch in again] == [batch.token_ids_BT.tolist() for batch in batches]


@settings(max_examples=30)
@given(trees)
def test_shared_and_unshared_trees_have_the_same_samples(forest: list[Tree]) -> None:
    alone = unshared(forest)
    assert all(len(tree.branches) == 1 for tree in alone)
    assert [(tree.prompt_ids, tree.branches[0]) for tree in alone] == [
        (tree.prompt_ids, b) for tree in forest for b in tree.branches
    ]

    def samples(batch: MicroBatch) -> Counter[tuple[float, ...]]:
        columns = (batch.target_ids_R, batch.advantages_R, batch.weights_R, batch.sampler_logprobs_R)
        return Counter(zip(*(column.tolist() for column in columns if column is not None), strict=True))

    assert samples(collate(alone)) == samples(collate(forest))
    assert sum(map(len, alone)) >= sum(map(len, forest))


def test_packing_no_trees_gives_no_batch() -> None:
    assert list(pack([], 100)) == []


def test_all_samples_have_log_probs_or_none() -> None:
    mixed = Tree((1,), (Branch((2,), sampler_logprobs=(-0.5,)), Branch((3,))))
    with pytest.raises(AssertionError, match="either all branches have log-probs or none"):
        collate([mixed])


def test_an_empty_prompt_or_sample_is_refused() -> None:
    with pytest.raises(AssertionError, match="a tree needs a prompt"):
        Tree((), (Branch((1,)),))
    with pytest.raises(AssertionError, match="a branch needs tokens"):
        Tree((1,), (Branch(()),))


def test_moving_a_batch_moves_every_tensor() -> None:
    batch = collate([WORKED]).to(torch.device("meta"))
    assert {getattr(batch, name).device.type for name in MicroBatch.__slots__ if getattr(batch, name) is not None} == {
        "meta"
    }
    assert batch.ref_logprobs_R is None


def test_two_trees_in_a_row_worked_by_hand() -> None:
    other = Tree((9,), (Branch((4, 5)),))
    batch = collate_rows([[WORKED, other], [other]])
    assert batch.token_ids_BT.tolist() == [[7, 8, 1, 2, 3, 9, 4, 5], [9, 4, 5, 0, 0, 0, 0, 0]]
    assert batch.position_ids_BT.tolist() == [[0, 1, 2, 3, 2, 0, 1, 2], [0, 1, 2, 0, 0, 0, 0, 0]]
    assert batch.branch_BT.tolist() == [[0, 0, 1, 1, 2, STRIDE, STRIDE + 1, STRIDE + 1], [0, 1, 1, -1, -1, -1, -1, -1]]
    assert batch.source_R.tolist() == [1, 2, 1, 5, 6, 0, 1]
    assert batch.target_ids_R.tolist() == [1, 2, 3, 4, 5, 4, 5]
    assert batch.row_R.tolist() == [0, 0, 0, 0, 0, 1, 1]
    assert batch.sequence_R.tolist() == [0, 0, 1, 2, 2, 3, 3]
    assert batch.segments == [(0, 0, 5), (0, 5, 8), (1, 0, 3)]


@settings(max_examples=30)
@given(trees)
def test_trees_of_one_row_do_not_see_each_other(given_trees: list[Tree]) -> None:
    """The row's mask is that of each tree by itself, with nothing between them."""
    row = collate_rows([given_trees])
    expected = torch.block_diag(*(mask_of(collate([tree]))[0, 0].int() for tree in given_trees))
    assert torch.equal(mask_of(row)[0, 0].int(), expected)
    assert row.segments == [
        (0, end - len(tree), end) for tree, end in zip(given_trees, accumulate(map(len, given_trees)), strict=True)
    ]


@settings(max_examples=50)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=30), st.integers(1, 100), st.integers(1, 4))
def test_balanced_bins_keep_every_item_within_the_limit(lengths: list[int], limit: int, ranks: int) -> None:
    bins = balanced(lengths, limit, ranks)
    assert sorted(i for mine in bins for i in mine) == list(range(len(lengths)))
    loads = [sum(lengths[i] for i in mine) for mine in bins]
    assert loads == sorted(loads, reverse=True)
    assert all(load <= limit or len(mine) == 1 for load, mine in zip(loads, bins, strict=True))


def test_balanced_bins_worked_by_hand() -> None:
    # Two bins of 13 would do for 26 tokens, but longest-first ends at 14 and 12: three. 9 | 5 | 4, then 3 to the 4, 3
    # to the 5, 2 to the 7.
    assert balanced([9, 5, 4, 3, 3, 2], 13) == [[0], [2, 3, 5], [1, 4]]
    assert balanced([9, 5, 4, 3, 3, 2], 14) == [[0, 3, 5], [1, 2, 4]]
    assert balanced([20, 1], 13) == [[0], [1]]
    assert balanced([], 13) == []


def test_greedy_bins_worked_by_hand() -> None:
    assert greedy_bins([9, 1, 5, 5, 2, 2], 2) == [[0, 1, 4], [2, 3, 5]]
    assert greedy_bins([3, 3, 3], 2) == [[0, 2], [1]]  # equal lengths: the lower position first, into the first bin
    assert greedy_bins([7], 3) == [[0], [], []]
