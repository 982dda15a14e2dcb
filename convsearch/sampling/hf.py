"""Sampling with plain transformers modules: each prompt is read once, and its n samples are decoded together after it.

Each sample has its own stream of uniform random numbers, seeded by (seed, key of the prompt, number of the sample). So
a sample does not depend on what else is in its batch, and a resumed run draws what the unbroken run would have drawn.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from convsearch.model.attention import DecodeContext, TreeContext
from convsearch.sampling.base import Finished, Prompt, SamplingConfig, WeightSource, check_finite, collect
from convsearch.sampling.scaffold import Scaffold, Script
from convsearch.types import Completion, FinishReason

SHRINK = 0.9  # finished samples leave the batch when at most this share of it is left
FIRST_CAPACITY = 256  # decoded tokens per sample that memory is reserved for at first; doubled when used up


class HfSampler:
    """Samples from a transformers causal LM with the ``tree`` attention (``convsearch.model.loading.load_model``)."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        config: SamplingConfig,
        stop_ids: tuple[int, ...],
        scaffold: Scaffold | None = None,
    ):
        self.model, self.tokenizer, self.config = model, tokenizer, config
        self.stop_ids, self.version = frozenset(stop_ids), 0
        self._script = Script(tokenizer, scaffold, model.config.vocab_size, self.stop_ids) if scaffold else None
        if self._script is not None and self._script.max_tokens > config.max_tokens:
            limits = f"max_tokens = {config.max_tokens} is below the {self._script.max_tokens} tokens of the scaffold"
            raise ValueError(f"sampling: {limits}; raise it or lower the budgets of thinking and rewrite")

    def load_weights(self, source: WeightSource, version: int) -> None:
        """Takes over the policy's weights. If sampler and policy share one module, only the version changes."""
        if source.causal_lm is not self.model:
            missing, unknown = self.model.load_state_dict(source.weights(), strict=False)
            absent = set(missing) & {name for name, _ in self.model.named_parameters()}  # tied weights: only once
            assert not absent, f"weights without {sorted(absent)[:3]}"
            assert not unknown, f"weights with {unknown[:3]}, which the sampler's model lacks"
        self.version = version

    def generate(
        self, prompts: Sequence[Prompt], n: int, seed: int, keys: Sequence[int] | None = None
    ) -> list[list[Completion]]:
        """n samples of every prompt; prompts of similar length are decoded together.

        Args:
            keys: one number per prompt that identifies it in the random seed; by default its position.
        """
        return collect(self.stream(prompts, n, seed, keys), len(prompts))

    @torch.inference_mode()
    def stream(
        self, prompts: Sequence[Prompt], n: int, seed: int, keys: Sequence[int] | None = None
    ) -> Iterator[Finished]:
        """The same, one batch of prompts at a time."""
        order = sorted(range(len(prompts)), key=lambda p: (len(prompts[p]), p))
        per_chunk = max(1, self.config.batch_size // n)
        was_training = self.model.training
        self.model.eval()
        try:
            for start in range(0, len(order), per_chunk):
                chunk = order[start : start + per_chunk]
                batch, batch_keys = [prompts[p] for p in chunk], [keys[p] if keys else p for p in chunk]
                groups = self._generate_chunk(batch, batch_keys, n, seed)
                yield dict(zip(chunk, groups, strict=True))
        finally:
            self.model.train(was_training)

    def _generate_chunk(self, prompts: list[Prompt], keys: list[int], n: int, seed: int) -> list[list[Completion]]:
        limit = self.config.max_tokens if self._script is None else self._script.max_tokens
        context, hidden_PX = self._read(prompts, n, min(limit, FIRST_CAPACITY))
        rows = [
            _Row(np.random.default_rng([seed, key, g]).random(limit), self._script, set(prompt))
            for prompt, key in zip(prompts, keys, strict=True)
            for g in range(n)
        ]
        live_PG = [list(range(p * n, (p + 1) * n)) for p in range(len(prompts))]  # the rows in the context
        hidden_NX = hidden_PX.repeat_interleave(n, dim=0)
        while True:
            live_N = [i for live_G in live_PG for i in live_G]
            token_ids_N = self._choose(self.model.lm_head(hidden_NX).float(), [rows[i] for i in live_N])
            kept_PG = _unfinished(live_PG, rows)
            if not kept_PG:
                break
            kept = [i for kept_G in kept_PG for i in kept_G]
            if len(kept) <= SHRINK * len(live_N):  # removing rows copies the keys and values of all others
                place = {i: number for number, i in enumerate(live_N)}
                chosen_N = torch.tensor([place[i] for i in kept], device=token_ids_N.device)
                group = len(live_PG[0])
                context.select(chosen_N.view(len(kept_PG), -1)[:, 0] // group, chosen_N)
                token_ids_N, live_N, live_PG = token_ids_N[chosen_N], kept, kept_PG
            lengths_N = torch.tensor([len(prompts[i // n]) for i in live_N], device=token_ids_N.device)
            hidden_NX = self._step(context, token_ids_N, lengths_N + context.length)
        return [[self._completion(row) for row in rows[p * n : (p + 1) * n]] for p in range(len(prompts))]

    def _read(self, prompts: list[Prompt], n: int, capacity: int) -> tuple[DecodeContext, Tensor]:
        """Reads the prompts, padded on the right; returns the decoding state and the last hidden states [P, X].

        The common prefix of all prompts (the system prompt, the worked example) is read once.
        """
        device, shared = self.model.device, _common_prefix(prompts)
        prefix = None
        if shared:
            causal = torch.ones(shared, shared, dtype=torch.bool, device=device).tril()
            prefix = TreeContext(causal[None, None], keep=True)
            token_ids_1T = torch.tensor([prompts[0][:shared]], device=device)
            self._forward(token_ids_1T, torch.arange(shared, device=device)[None], prefix)
        lengths = torch.tensor([len(prompt) - shared for prompt in prompts], device=device)
        longest = int(lengths.max())
        padded = [[*prompt[shared:], *[0] * (longest + shared - len(prompt))] for prompt in prompts]
        token_ids_PT = torch.tensor(padded, device=device)
        visible = torch.ones(longest, shared + longest, dtype=torch.bool, device=device).tril(diagonal=shared)
        tree = TreeContext(visible[None, None], keep=True, prefix=prefix)
        positions = shared + torch.arange(longest, device=device).expand(len(prompts), -1)
        hidden = self._forward(token_ids_PT, positions, tree)
        padding = torch.arange(shared + longest, device=device)[None] >= shared + lengths[:, None]
        mask = torch.zeros(padding.shape, dtype=hidden.dtype, device=device).masked_fill(padding, float("-inf"))
        samples = len(prompts) * n
        keys = [key.new_zeros(samples, key.shape[1], capacity, key.shape[3]) for key in tree.keys]
        values = [torch.zeros_like(key) for key in keys]
        context = DecodeContext(tree.keys, tree.values, mask[:, None, None], keys, values)
        return context, hidden[torch.arange(len(prompts), device=device), lengths - 1]

    def _forward(self, token_ids: Tensor, positions: Tensor, context: TreeContext | DecodeContext) -> Tensor:
        output = self.model.model(input_ids=token_ids, position_ids=positions, use_cache=False, context=context)
        return output.last_hidden_state  # type: ignore[no-any-return]

    def _step(self, context: DecodeContext, token_ids_N: Tensor, positions_N: Tensor) -> Tensor:
        context.make_room()
        hidden = self._forward(token_ids_N[:, None], positions_N[:, None], context)
        context.length += 1
        return hidden[:, 0]

    def _choose(self, logits_NV: Tensor, rows: list["_Row"]) -> Tensor:
        """Draws the next token of every row, applies the scaffold, and appends it; returns the ids to feed [N]."""
        logprobs_NV = (self._penalised(logits_NV, rows) / (self.config.temperature or 1.0)).log_softmax(dim=-1)
        offered_NV = logprobs_NV if self._script is None else self._without_empty_parts(logprobs_NV, rows)
        if self.config.temperature == 0:
            drawn_N = offered_NV.argmax(dim=-1)
        else:
            uniform_N = torch.tensor([row.uniform() for row in rows], device=logits_NV.device, dtype=torch.float32)
            drawn_N = _inverse_cdf(self._truncate(offered_NV), uniform_N)
        if self._script is not None:
            followed = [row.follow(token) for row, token in zip(rows, drawn_N.tolist(), strict=True)]
            drawn_N = torch.tensor(followed, device=drawn_N.device)
        chosen_N = logprobs_NV.gather(1, drawn_N[:, None])[:, 0].tolist()
        check_finite(chosen_N)
        for row, token, logprob in zip(rows, drawn_N.tolist(), chosen_N, strict=True):
            row.append(token, logprob, self.stop_ids)
        return drawn_N

    def _penalised(self, logits_NV: Tensor, rows: list["_Row"]) -> Tensor:
        """The repetition penalty, as transformers and vLLM apply it, before the temperature."""
        penalty = self.config.repetition_penalty
        if penalty == 1:
            return logits_NV
        penalised_NV = logits_NV.clone()
        for logits_V, row in zip(penalised_NV, rows, strict=True):
            seen = torch.tensor(sorted(row.seen), device=logits_V.device)
            logits_V[seen] = torch.where(logits_V[seen] > 0, logits_V[seen] / penalty, logits_V[seen] * penalty)
        return penalised_NV

    def _without_empty_parts(self, logprobs_NV: Tensor, rows: list["_Row"]) -> Tensor:
        """Forbids, at the beginning of a part of the scaffold, the tokens that would leave it empty."""
        assert self._script is not None
        starting = [[i] for i, row in enumerate(rows) if row.starts_part]
        if not starting:
            return logprobs_NV
        offered_NV = logprobs_NV.clone()
        offered_NV[starting, self._script.cannot_start] = float("-inf")
        return offered_NV

    def _truncate(self, logprobs_NV: Tensor) -> Tensor:
        """Probabilities after top-k and top-p, not renormalised."""
        probs_NV = logprobs_NV.exp()
        if self.config.top_k:
            kth = probs_NV.topk(min(self.config.top_k, probs_NV.shape[1]), dim=-1).values[:, -1:]
            probs_NV = probs_NV.masked_fill(probs_NV < kth, 0.0)
        if self.config.top_p < 1:
            ordered, index = (probs_NV / probs_NV.sum(dim=-1, keepdim=True)).sort(dim=-1, descending=True)
            ordered = ordered.masked_fill(ordered.cumsum(dim=-1) - ordered > self.config.top_p, 0.0)
            probs_NV = torch.zeros_like(probs_NV).scatter(1, index, ordered)
        return probs_NV

    def _completion(self, row: "_Row") -> Completion:
        text_ids = row.token_ids[:-1] if row.token_ids and row.token_ids[-1] in self.stop_ids else row.token_ids
        text = self.tokenizer.decode(text_ids, skip_special_tokens=False)
        reason: FinishReason = "stop" if row.stopped else "length"
        return Completion(tuple(row.token_ids), tuple(row.logprobs), text, reason, self.version)


def _unfinished(live_PG: list[list[int]], rows: list["_Row"]) -> list[list[int]]:
    """The rows of the prompts with an unfinished one: equally many of each, the unfinished first."""
    width = max(sum(not rows[i].done for i in live_G) for live_G in live_PG)
    sorted_PG = [sorted(live_G, key=lambda i: (rows[i].done, i)) for live_G in live_PG]
    return [live_G[:width] for live_G in sorted_PG if not rows[live_G[0]].done] if width else []


def _common_prefix(prompts: Sequence[Prompt]) -> int:
    """Length of the common prefix; at least one token of each prompt stays outside it."""
    first, last = min(prompts), max(prompts)
    limit = min(map(len, prompts)) - 1
    return next((i for i in range(limit) if first[i] != last[i]), limit) if len(prompts) > 1 else 0


def _inverse_cdf(probs_NV: Tensor, uniform_N: Tensor) -> Tensor:
    """The first token whose cumulative probability exceeds ``uniform`` x total; never one of probability 0."""
    cumulated_NV = probs_NV.cumsum(dim=-1)
    threshold_N1 = uniform_N[:, None] * cumulated_NV[:, -1:]
    drawn_N = torch.searchsorted(cumulated_NV, threshold_N1, right=True)[:, 0]
    last_N = probs_NV.shape[1] - 1 - probs_NV.flip(1).gt(0).int().argmax(dim=-1)
    return torch.minimum(drawn_N, last_N)


@dataclass(slots=True)
class _Row:
    """One unfinished sample."""

    uniforms: np.ndarray[Any, np.dtype[np.float64]]
    script: Script | None
    seen: set[int] = field(default_factory=set)  # tokens of the prompt and of the sample
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    stopped: bool = False
    part: int = -1  # scaffold: the part that is being filled
    spent: int = 0  # tokens sampled in that part
    forced: list[int] = field(default_factory=list)

    def uniform(self) -> float:
        return float(self.uniforms[min(len(self.token_ids), len(self.uniforms) - 1)])

    @property
    def starts_part(self) -> bool:
        assert self.script is not None
        return not self.done and not self.forced and self.spent == 0 and 0 <= self.part < len(self.script.budgets)

    @property
    def done(self) -> bool:
        return self.stopped or len(self.token_ids) >= len(self.uniforms)

    def follow(self, drawn: int) -> int:
        """The token that the scaffold allows: the drawn one, or the next token of a literal."""
        assert self.script is not None
        if self.done:
            return drawn
        budgets, ends_part = self.script.budgets, self.script.ends_part
        if not self.forced and (self.part < 0 or self.spent >= budgets[self.part] or drawn in ends_part):
            self.part, self.spent = self.part + 1, 0
            self.forced = list(self.script.literals[self.part])
        if self.forced:
            return self.forced.pop(0)
        self.spent += 1
        return drawn

    def append(self, token: int, logprob: float, stop_ids: frozenset[int]) -> None:
        if self.done:
            return
        self.token_ids.append(token)
        self.seen.add(token)
        self.logprobs.append(logprob)
        scripted_end = self.script is not None and self.part == len(self.script.budgets) and not self.forced
        self.stopped = token in stop_ids or scripted_end
