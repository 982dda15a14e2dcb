"""Rollouts -> micro-batches in which each prompt occurs once, followed by its samples as the branches of a tree.

A tree is ``prompt | branch 1 | branch 2 | ...``; the positions of each branch start at the end of the prompt, and by
the attention mask a branch sees only the prompt and itself. This is exact. With prompts several times as long as the
samples it saves most of the compute. A row that shares nothing is a tree of one branch; supervised fine-tuning uses
those.

A row holds one tree, or several one after another: then nothing is computed for padding. Rows never see each other, so
that ranks can split a micro-batch by rows. The k-th tree of a row numbers its branches from k x ``STRIDE``.

Worked example: prompt [7, 8], branches [1, 2] and [3]::

    token_ids_T      7 8 1 2 3
    position_ids_T   0 1 2 3 2
    branch_T         0 0 1 1 2      (0: the prompt)
    target_ids_R     1 2 3
    source_R         1 2 1          (the position whose logits predict the target)
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

STRIDE = 1 << 16  # more than the branches of any tree


@dataclass(frozen=True, slots=True)
class Branch:
    """One sample of a prompt; ``weight`` multiplies the loss of each of its tokens."""

    token_ids: tuple[int, ...]
    advantage: float = 0.0
    weight: float = 1.0
    sampler_logprobs: tuple[float, ...] | None = None


@dataclass(frozen=True, slots=True)
class Tree:
    """A prompt and its branches. Packing never splits a tree."""

    prompt_ids: tuple[int, ...]
    branches: tuple[Branch, ...]

    def __post_init__(self) -> None:
        assert self.prompt_ids, "a tree needs a prompt"
        assert all(branch.token_ids for branch in self.branches), "a branch needs tokens"

    def __len__(self) -> int:
        return len(self.prompt_ids) + sum(len(branch.token_ids) for branch in self.branches)


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """The input of a forward pass. ``_B`` rows, ``_T`` padded length, ``_R`` response tokens of all rows, in order."""

    token_ids_BT: Tensor
    position_ids_BT: Tensor
    branch_BT: Tensor  # 0: prompt, k: k-th branch, -1: padding; + STRIDE for each tree before in the row
    row_R: Tensor
    source_R: Tensor
    target_ids_R: Tensor
    advantages_R: Tensor
    weights_R: Tensor
    sampler_logprobs_R: Tensor | None = None
    ref_logprobs_R: Tensor | None = None
    old_logprobs_R: Tensor | None = None

    @property
    def num_tokens(self) -> int:
        """Computed positions, padding included."""
        return self.token_ids_BT.numel()

    @property
    def sequence_R(self) -> Tensor:
        """Number of the sample of each response token, from 0, in the order of the columns."""
        # The first token of a sample is the one that is predicted from the prompt.
        first_R = self.branch_BT[self.row_R, self.source_R] % STRIDE == 0
        return first_R.cumsum(0) - 1

    @property
    def segments(self) -> list[tuple[int, int, int]]:
        """(row, start, end) of every tree, in order."""
        found = []
        for row, tree_T in enumerate((self.branch_BT // STRIDE).tolist()):
            length = len(tree_T)
            starts = [t for t, tree in enumerate(tree_T) if tree >= 0 and (t == 0 or tree != tree_T[t - 1])]
            end = next((t for t in range(length) if tree_T[t] < 0), length)
            found += [(row, start, stop) for start, stop in zip(starts, [*starts[1:], end], strict=True)]
        return found

    def to(self, device: torch.device) -> "MicroBatch":
        columns = {name: getattr(self, name) for name in self.__slots__}
        return replace(self, **{name: value.to(device) for name, value in columns.items() if value is not None})


Loss = Callable[[MicroBatch, Tensor, Tensor], tuple[Tensor, dict[str, float]]]
"""(micro-batch, log-probs [R], entropies [R]) -> (weighted sum to minimise, named sums to report)."""


def unshared(trees: Sequence[Tree]) -> list[Tree]:
    """The same samples, each with its own copy of the prompt."""
    return [Tree(tree.prompt_ids, (branch,)) for tree in trees for branch in tree.branches]


def related(query: Tensor, key: Tensor) -> Tensor:
    """Whether the key is in the query's branch or in the prompt of its tree, by their branch numbers."""
    return (key == query) | (key == query - query % STRIDE)


def pack(
    trees: Sequence[Tree], max_tokens: int, pad_id: int = 0, world_size: int = 1, remove_padding: bool = False
) -> Iterator[MicroBatch]:
    """Micro-batches of at most ``max_tokens`` positions per rank, in a fixed order; a longer tree is alone in its row.

    With padding, each row has one tree, and rows of similar length are packed together. With ``remove_padding``, each
    rank gets one row of several trees, and the rows have similar lengths.
    """
    if remove_padding:
        rows = balanced([len(tree) for tree in trees], max_tokens, world_size)
        for start in range(0, len(rows), world_size):
            yield collate_rows([[trees[i] for i in row] for row in rows[start : start + world_size]], pad_id)
        return
    chunk: list[Tree] = []
    for tree in sorted(trees, key=len):
        if chunk and len(chunk) >= world_size * max(1, max_tokens // len(tree)):
            yield collate(chunk, pad_id)
            chunk = []
        chunk.append(tree)
    if chunk:
        yield collate(chunk, pad_id)


def greedy_bins(lengths: Sequence[int], bins: int) -> list[list[int]]:
    """Greedy bin packing, longest first: each position of ``lengths`` goes into the (first) least loaded bin.

    Among equal lengths the lower position goes first. The positions of each bin are sorted.
    """
    positions: list[list[int]] = [[] for _ in range(bins)]
    loads = [0] * bins
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        least = loads.index(min(loads))
        positions[least].append(i)
        loads[least] += lengths[i]
    return [sorted(mine) for mine in positions]


def balanced(lengths: Sequence[int], max_tokens: int, world_size: int = 1) -> list[list[int]]:
    """The smallest multiple of ``world_size`` bins of at most ``max_tokens``; a longer item is alone in its bin.

    The bins are sorted by load, the largest first, so that neighbours have similar loads; empty bins are left out.
    """
    micros = max(1, -(-sum(lengths) // (world_size * max_tokens)))
    while True:
        bins = [(sum(lengths[i] for i in mine), mine) for mine in greedy_bins(lengths, micros * world_size) if mine]
        if all(load <= max_tokens or len(mine) == 1 for load, mine in bins):
            return [mine for _, mine in sorted(bins, key=lambda pair: -pair[0])]
        micros += 1


@dataclass(slots=True)
class _Columns:
    row: list[int] = field(default_factory=list)
    source: list[int] = field(default_factory=list)
    target: list[int] = field(default_factory=list)
    advantage: list[float] = field(default_factory=list)
    weight: list[float] = field(default_factory=list)
    logprob: list[float] = field(default_factory=list)

    def add(self, row: int, start: int, tree: Tree) -> None:
        """The response tokens of a tree that begins at ``start``."""
        last = start + len(tree.prompt_ids) - 1
        begin = last + 1
        for branch in tree.branches:
            size = len(branch.token_ids)
            self.row += [row] * size
            self.source += [last, *range(begin, begin + size - 1)]
            self.target += branch.token_ids
            self.advantage += [branch.advantage] * size
            self.weight += [branch.weight] * size
            self.logprob += branch.sampler_logprobs or ()
            begin += size


def collate(trees: Sequence[Tree], pad_id: int = 0) -> MicroBatch:
    """One micro-batch of these trees, one row per tree, padded on the right."""
    return collate_rows([[tree] for tree in trees], pad_id)


def collate_rows(rows: Sequence[Sequence[Tree]], pad_id: int = 0) -> MicroBatch:
    """One micro-batch of rows of one or several trees, padded on the right to the longest row."""
    length = max(sum(map(len, row)) for row in rows)
    token_ids_BT = torch.full((len(rows), length), pad_id)
    position_ids_BT = torch.zeros(len(rows), length, dtype=torch.long)
    branch_BT = torch.full((len(rows), length), -1)
    columns = _Columns()
    for row, trees in enumerate(rows):
        start = 0
        for number, tree in enumerate(trees):
            assert len(tree.branches) < STRIDE
            span = slice(start, start + len(tree))
            positions, branches = _layout(tree)
            responses = (i for branch in tree.branches for i in branch.token_ids)
            token_ids_BT[row, span] = torch.tensor([*tree.prompt_ids, *responses])
            position_ids_BT[row, span] = torch.tensor(positions)
            branch_BT[row, span] = torch.tensor(branches) + number * STRIDE
            columns.add(row, start, tree)
            start += len(tree)
    has_logprobs, complete = bool(columns.logprob), len(columns.logprob) == len(columns.target)
    assert complete or not has_logprobs, "either all branches have log-probs or none"
    return MicroBatch(
        token_ids_BT=token_ids_BT,
        position_ids_BT=position_ids_BT,
        branch_BT=branch_BT,
        row_R=torch.tensor(columns.row),
        source_R=torch.tensor(columns.source),
        target_ids_R=torch.tensor(columns.target),
        advantages_R=torch.tensor(columns.advantage),
        weights_R=torch.tensor(columns.weight),
        sampler_logprobs_R=torch.tensor(columns.logprob) if has_logprobs else None,
    )


def _layout(tree: Tree) -> tuple[list[int], list[int]]:
    """Position and branch of every token of a tree."""
    end = len(tree.prompt_ids)
    positions, branches = list(range(end)), [0] * end
    for number, branch in enumerate(tree.branches, start=1):
        positions += range(end, end + len(branch.token_ids))
        branches += [number] * len(branch.token_ids)
    return positions, branches
