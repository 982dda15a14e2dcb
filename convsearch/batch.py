"""Rollouts -> micro-batches in which each prompt stands once, with its samples behind it as the branches of a tree.

A row is ``prompt | branch 1 | branch 2 | ...``; positions restart at the prompt's end in every branch, and the attention mask lets a branch
see the prompt and itself alone. That is exact, and with prompts several times as long as the samples it saves most of the compute. An
unshared row is a tree of one branch; supervised fine-tuning uses those.

Worked example: prompt [7, 8], branches [1, 2] and [3]::

    token_ids_T      7 8 1 2 3
    position_ids_T   0 1 2 3 2
    branch_T         0 0 1 1 2      (0: the prompt)
    target_ids_R     1 2 3
    source_R         1 2 1          (the position whose logits predict the target)
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Branch:
    """One sample behind a prompt; ``weight`` multiplies the loss of each of its tokens."""

    token_ids: tuple[int, ...]
    advantage: float = 0.0
    weight: float = 1.0
    sampler_logprobs: tuple[float, ...] | None = None


@dataclass(frozen=True, slots=True)
class Tree:
    """A prompt and its branches; the unit that packing never splits."""

    prompt_ids: tuple[int, ...]
    branches: tuple[Branch, ...]

    def __post_init__(self) -> None:
        assert self.prompt_ids, "a tree needs a prompt"
        assert all(branch.token_ids for branch in self.branches), "a branch needs tokens"

    def __len__(self) -> int:
        return len(self.prompt_ids) + sum(len(branch.token_ids) for branch in self.branches)


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """What one forward pass takes. ``_B`` rows, ``_T`` padded row length, ``_R`` response tokens of all rows, in order."""

    token_ids_BT: Tensor
    position_ids_BT: Tensor
    branch_BT: Tensor  # 0: prompt, k: k-th branch, -1: padding
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
        """Number of the sample that each response token belongs to, from 0 in the order of the columns: a sample's first token is predicted
        from its prompt."""
        first_R = self.branch_BT[self.row_R, self.source_R] == 0
        return first_R.cumsum(0) - 1

    def attention_mask(self) -> Tensor:
        """[B, 1, T, T] bool, True where a query position (third axis) may see a key position (last axis)."""
        length = self.branch_BT.shape[1]
        causal_TT = torch.ones(length, length, dtype=torch.bool, device=self.branch_BT.device).tril()
        key_B1T = self.branch_BT[:, None, :]
        visible_BTT = causal_TT & ((key_B1T == 0) | (key_B1T == self.branch_BT[:, :, None]))
        return visible_BTT[:, None]

    def to(self, device: torch.device) -> "MicroBatch":
        moved = {name: getattr(self, name).to(device) for name in self.__slots__ if isinstance(getattr(self, name), Tensor)}
        return replace(self, **moved)


def unshared(trees: Sequence[Tree]) -> list[Tree]:
    """The same samples, each with its own copy of the prompt."""
    return [Tree(tree.prompt_ids, (branch,)) for tree in trees for branch in tree.branches]


def pack(trees: Sequence[Tree], max_tokens: int, pad_id: int = 0) -> Iterator[MicroBatch]:
    """Micro-batches of at most ``max_tokens`` positions (a longer tree stands alone), rows of like length together, in a fixed order."""
    rows: list[Tree] = []
    for tree in sorted(trees, key=len):
        if rows and len(tree) * (len(rows) + 1) > max_tokens:
            yield collate(rows, pad_id)
            rows = []
        rows.append(tree)
    if rows:
        yield collate(rows, pad_id)


@dataclass(slots=True)
class _Columns:
    row: list[int] = field(default_factory=list)
    source: list[int] = field(default_factory=list)
    target: list[int] = field(default_factory=list)
    advantage: list[float] = field(default_factory=list)
    weight: list[float] = field(default_factory=list)
    logprob: list[float] = field(default_factory=list)


def collate(trees: Sequence[Tree], pad_id: int = 0) -> MicroBatch:
    """One micro-batch of these trees, a row each, padded on the right."""
    length = max(map(len, trees))
    token_ids_BT = torch.full((len(trees), length), pad_id)
    position_ids_BT = torch.zeros(len(trees), length, dtype=torch.long)
    branch_BT = torch.full((len(trees), length), -1)
    columns = _Columns()
    for row, tree in enumerate(trees):
        end = len(tree.prompt_ids)
        token_ids_BT[row, :end] = torch.tensor(tree.prompt_ids)
        position_ids_BT[row, :end] = torch.arange(end)
        branch_BT[row, :end] = 0
        for number, branch in enumerate(tree.branches, start=1):
            start, size = end, len(branch.token_ids)
            end = start + size
            token_ids_BT[row, start:end] = torch.tensor(branch.token_ids)
            position_ids_BT[row, start:end] = torch.arange(size) + len(tree.prompt_ids)
            branch_BT[row, start:end] = number
            columns.row += [row] * size
            columns.source += [len(tree.prompt_ids) - 1, *range(start, end - 1)]
            columns.target += branch.token_ids
            columns.advantage += [branch.advantage] * size
            columns.weight += [branch.weight] * size
            columns.logprob += branch.sampler_logprobs or ()
    has_logprobs = bool(columns.logprob)
    assert not has_logprobs or len(columns.logprob) == len(columns.target), "either all branches bring log-probs or none"
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
