"""One attention function for the three kinds of forward pass, registered with transformers under the name ``tree``.

* A tree of samples of one prompt (training): ``TreeContext`` with a mask; ``PackedContext`` for rows of several trees.
* Reading the prompts (the sampler's prefill): also ``TreeContext``, which keeps the keys and values.
* Decoding one token per sample: ``DecodeContext``. The keys of a prompt are read once for all its samples and all query
  heads that share them.

Grouped-query heads are never repeated in memory: the g query heads of a key head are in the query's length axis.
Shapes: ``_H`` key-value heads, ``_g`` query heads per key-value head, ``_D`` head size, ``_S`` decoded tokens so far.
"""

from dataclasses import dataclass, field
from functools import lru_cache
from importlib.util import find_spec
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers import AttentionInterface

from convsearch.model.batch import STRIDE, MicroBatch, related

NAME = "tree"
Kernel = Literal["auto", "sdpa", "flex", "flash"]
MOST_PAIRS = 1 << 20  # of positions that are stored for the backward pass, per head; above it SDPA stores none


@dataclass(slots=True)
class TreeContext:
    """A forward pass under an explicit mask [B or 1, 1, T, L + T].

    With ``keep``, the keys and values of each layer [B, H, L + T, D] are collected. ``prefix`` is the context of an
    earlier pass over L tokens that all rows begin with (its ``keys`` and ``values``, [1, H, L, D] per layer).
    """

    mask: Tensor
    keep: bool = False
    prefix: "TreeContext | None" = None
    keys: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)

    def extend(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """(key, value) with the prefix in front; collects them with ``keep``."""
        if self.prefix is not None:
            sizes = key.shape[0], -1, -1, -1
            key = torch.cat((self.prefix.keys[layer].expand(sizes), key), dim=2)
            value = torch.cat((self.prefix.values[layer].expand(sizes), value), dim=2)
        if self.keep:
            self.keys.append(key)
            self.values.append(value)
        return key, value


@dataclass(frozen=True, slots=True)
class Segment:
    """One tree in a row: the prompt is at ``start`` to ``prompt_end``, its branches follow until ``end``.

    The branches are padded to one length ``_L`` to be attended together; ``G`` counts them.
    """

    row: int
    start: int
    prompt_end: int
    end: int
    index_GL: Tensor  # position in the row of each token of each branch; padding repeats the last position
    kept_GL: Tensor  # false for padding
    mask_LK: Tensor  # what a branch sees of the prompt and itself

    @classmethod
    def of(cls, row: int, start: int, branch_T: Tensor) -> "Segment":
        """The layout of a tree whose tokens have the branch numbers ``branch_T`` (0: prompt)."""
        sizes = branch_T.bincount()
        prompt, end = int(sizes[0]), start + len(branch_T)
        sizes_G = sizes[1:]
        steps_L = torch.arange(int(sizes_G.max()) if len(sizes_G) else 0, device=branch_T.device)
        first_G = start + prompt + sizes_G.cumsum(0) - sizes_G
        index_GL = (first_G[:, None] + steps_L).clamp(max=end - 1)
        mask_LK = torch.ones(len(steps_L), prompt + len(steps_L), dtype=torch.bool, device=branch_T.device)
        kept_GL = steps_L < sizes_G[:, None]
        return cls(row, start, start + prompt, end, index_GL, kept_GL, mask_LK.tril(diagonal=prompt))

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """query [B, H*g, T, D], key, value [B, H, T, D] -> [H*g, length of the tree, D].

        The prompt attends causally to itself, each branch to the prompt and itself: nothing is computed for pairs of
        different branches, which one masked product over the tree would do.
        """
        q, k, v = (tensor[self.row : self.row + 1, :, self.start : self.prompt_end] for tensor in (query, key, value))
        on_prompt = _masked_attention(q, k, v, None, scaling)[0]
        if self.prompt_end == self.end:
            return on_prompt
        branches = len(self.index_GL)
        q_G, k_G, v_G = (tensor[self.row, :, self.index_GL].transpose(0, 1) for tensor in (query, key, value))
        k_G, v_G = (torch.cat((x.expand(branches, -1, -1, -1), y), dim=2) for x, y in ((k, k_G), (v, v_G)))
        out_GHLD = _masked_attention(q_G, k_G, v_G, self.mask_LK, scaling)
        on_branches = out_GHLD.transpose(1, 2)[self.kept_GL].transpose(0, 1)
        return torch.cat((on_prompt, on_branches), dim=1)


def _masked_attention(query: Tensor, key: Tensor, value: Tensor, mask_TK: Tensor | None, scaling: float) -> Tensor:
    """query [B, H*g, T, D], key and value [B, H, K, D] -> [B, H*g, T, D]; without a mask: causal.

    On a CPU, SDPA's backward pass over short sequences takes 2 to 3 times as long as that of plain products.
    """
    batch, heads, tokens, size = query.shape
    if query.is_cuda or tokens * key.shape[2] > MOST_PAIRS:
        options: dict[str, Any] = {"scale": scaling, "enable_gqa": heads != key.shape[1]}
        return scaled_dot_product_attention(query, key, value, mask_TK, is_causal=mask_TK is None, **options)
    grouped = heads // key.shape[1]
    hidden_TK = _later(tokens) if mask_TK is None else ~mask_TK
    query_BHxD = (query * scaling).reshape(batch, heads // grouped, grouped * tokens, size)
    scores = (query_BHxD @ key.transpose(-1, -2)).view(batch, heads, tokens, -1)
    weights = scores.masked_fill(hidden_TK, float("-inf")).softmax(dim=-1)
    return (weights.view(batch, heads // grouped, grouped * tokens, -1) @ value).view(batch, heads, tokens, size)


@lru_cache(maxsize=64)
def _later(tokens: int) -> Tensor:
    """[T, T] on the CPU: what a causal mask hides."""
    return torch.ones(tokens, tokens, dtype=torch.bool).triu(diagonal=1)


@dataclass(slots=True)
class PackedContext:
    """A forward pass over rows of several trees that do not see each other.

    One of three: SDPA for one tree at a time; FlexAttention, whose block mask skips what is not seen (GPU);
    flash-attn's kernel for sequences of different lengths, if every tree has one branch (GPU, half precision).
    """

    segments: list[Segment] = field(default_factory=list)
    block_mask: Any = None
    spans: list[tuple[int, slice]] = field(default_factory=list)  # flash-attn: row and positions of each tree
    cu_seqlens: Tensor | None = None  # [trees + 1] int32: start of each tree in the flattened rows

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """query [B, H*g, T, D], key, value [B, H, T, D] -> [B, H*g, T, D]; padding is 0 (FlexAttention: undefined)."""
        if self.cu_seqlens is not None:
            return self._flash(query, key, value, scaling)
        if self.block_mask is not None:
            grouped = query.shape[1] != key.shape[1]
            flexed: Tensor = flex()(query, key, value, block_mask=self.block_mask, scale=scaling, enable_gqa=grouped)
            return flexed
        rows: list[list[Tensor]] = [[] for _ in range(len(query))]
        for segment in self.segments:
            rows[segment.row].append(segment.attend(query, key, value, scaling))
        whole = [torch.cat(pieces, dim=1) for pieces in rows]
        return torch.stack([pad(row, (0, 0, 0, query.shape[2] - row.shape[1])) for row in whole])

    def _flash(self, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        from flash_attn import flash_attn_varlen_func  # type: ignore[import-not-found]

        assert self.cu_seqlens is not None
        # There is padding between rows: the kernel gets only the positions of the trees.
        pieces = ([tensor[row, :, span] for row, span in self.spans] for tensor in (query, key, value))
        flat = [torch.cat(piece, dim=1).transpose(0, 1) for piece in pieces]
        longest = max(span.stop - span.start for _, span in self.spans)
        seqlens = (self.cu_seqlens, self.cu_seqlens, longest, longest)
        found = flash_attn_varlen_func(*flat, *seqlens, softmax_scale=scaling, causal=True).transpose(0, 1)
        out, begin = torch.zeros_like(query), 0
        for row, span in self.spans:
            out[row, :, span] = found[:, begin : begin + span.stop - span.start]
            begin += span.stop - span.start
        return out


@lru_cache(maxsize=1)
def flex() -> Any:
    """FlexAttention; compiled on a GPU, to skip blocks. On a CPU it is for tests only and has no backward pass."""
    return torch.compile(flex_attention, dynamic=True) if torch.cuda.is_available() else flex_attention


@lru_cache(maxsize=1)
def block_masks() -> Any:
    """FlexAttention's function for block masks; compiled on a GPU, or it would store a number per pair of positions."""
    return torch.compile(create_block_mask, dynamic=True) if torch.cuda.is_available() else create_block_mask


def packed_context(micro: MicroBatch, kernel: Kernel = "auto", half: bool = False) -> PackedContext:
    """The context of a micro-batch whose rows may hold several trees, on the device of its tensors.

    ``auto``: SDPA on a CPU. On a GPU flash-attn if it is installed, every tree has one branch and the arithmetic is in
    ``half`` precision; otherwise FlexAttention.
    """
    branch_BT = micro.branch_BT
    if kernel == "auto":
        kernel = "sdpa"
        if branch_BT.is_cuda:
            sequences = bool((branch_BT % STRIDE <= 1).logical_or(branch_BT < 0).all())
            kernel = "flash" if half and sequences and find_spec("flash_attn") else "flex"
    if kernel == "flex":

        def visible(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return (q >= k) & related(branch_BT[b, q], branch_BT[b, k])

        rows, length = branch_BT.shape
        return PackedContext(block_mask=block_masks()(visible, rows, None, length, length, device=branch_BT.device))
    if kernel == "flash":
        spans = [(row, slice(start, end)) for row, start, end in micro.segments]
        lengths = torch.tensor([0, *(span.stop - span.start for _, span in spans)], device=branch_BT.device)
        return PackedContext(spans=spans, cu_seqlens=lengths.cumsum(0).to(torch.int32))
    trees = ((row, start, branch_BT[row, start:end] % STRIDE) for row, start, end in micro.segments)
    return PackedContext([Segment.of(*tree) for tree in trees])


@dataclass(slots=True)
class DecodeContext:
    """The state of decoding N = P x G samples of P prompts; lists have one entry per layer."""

    prompt_keys: list[Tensor]  # [P, H, Tp, D]
    prompt_values: list[Tensor]
    prompt_mask_P11T: Tensor  # [P, 1, 1, Tp] float: 0 for a token, -inf for padding
    sample_keys: list[Tensor]  # [N, H, capacity, D]
    sample_values: list[Tensor]
    length: int = 0  # tokens decoded so far: the position to write next

    def make_room(self) -> None:
        """Doubles the capacity when it is full: a high limit costs no memory until samples are that long."""
        capacity = self.sample_keys[0].shape[2]
        if self.length < capacity:
            return
        for tensors in (self.sample_keys, self.sample_values):
            tensors[:] = [pad(tensor, (0, 0, 0, capacity)) for tensor in tensors]

    def select(self, kept_P: Tensor, kept_N: Tensor) -> None:
        """Keeps the prompts ``kept_P`` [P'] and the samples ``kept_N`` [P' x G'], equally many of each (indices)."""
        self.prompt_mask_P11T = self.prompt_mask_P11T[kept_P]
        for tensors in (self.prompt_keys, self.prompt_values):
            tensors[:] = [tensor[kept_P] for tensor in tensors]
        for tensors in (self.sample_keys, self.sample_values):
            tensors[:] = [tensor[kept_N] for tensor in tensors]


def tree_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    context: TreeContext | PackedContext | DecodeContext | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: query [B, H*g, T, D], key and value [B, H, T, D] -> [B, T, H*g, D]."""
    assert context is not None, "the 'tree' attention needs a context; call the model through Policy or HfSampler"
    if isinstance(context, PackedContext):
        return context.attend(query, key, value, scaling).transpose(1, 2), None
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    if isinstance(context, TreeContext):
        key, value = context.extend(layer, key, value)
        grouped = query.shape[1] != key.shape[1]
        out = scaled_dot_product_attention(query, key, value, attn_mask=context.mask, scale=scaling, enable_gqa=grouped)
        return out.transpose(1, 2), None
    return _decode(context, layer, query, key, value, scaling), None


def _decode(context: DecodeContext, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
    samples, heads, _, size = key.shape
    keys, values, now = context.sample_keys[layer], context.sample_values[layer], context.length
    keys[:, :, now] = key[:, :, 0]
    values[:, :, now] = value[:, :, 0]
    prompt_keys, prompt_values = context.prompt_keys[layer], context.prompt_values[layer]
    prompts, prompt_length = prompt_keys.shape[0], prompt_keys.shape[2]
    group, grouped = samples // prompts, query.shape[1] // heads

    query_NHgD = query.view(samples, heads, grouped, size) * scaling

    def by_prompt(tensor_NHgX: Tensor) -> Tensor:  # [P, H, G*g, X]: all queries of a prompt in one product
        split = tensor_NHgX.view(prompts, group, heads, grouped, -1).transpose(1, 2)
        return split.reshape(prompts, heads, group * grouped, -1)

    def by_sample(tensor_PHKX: Tensor) -> Tensor:  # and back [N, H, g, X]
        split = tensor_PHKX.view(prompts, heads, group, grouped, -1).transpose(1, 2)
        return split.reshape(samples, heads, grouped, -1)

    to_prompt = by_sample(by_prompt(query_NHgD) @ prompt_keys.transpose(-1, -2) + context.prompt_mask_P11T)
    to_sample = query_NHgD @ keys[:, :, : now + 1].transpose(-1, -2)
    weights = torch.cat((to_prompt, to_sample), dim=-1).softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    on_prompt, on_sample = weights[..., :prompt_length], weights[..., prompt_length:]
    out = by_sample(by_prompt(on_prompt) @ prompt_values) + on_sample @ values[:, :, : now + 1]
    return out.reshape(samples, 1, heads * grouped, size)


AttentionInterface.register(NAME, tree_attention)
