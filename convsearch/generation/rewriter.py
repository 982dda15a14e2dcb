"""A model on a device with its sampler: conversations -> completions, in slices that a killed run can resume."""

import argparse
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from convsearch.generation.answers import Generate
from convsearch.model.loading import encode_chat, load_model, load_tokenizer, pick_device, stop_token_ids
from convsearch.model.precision import pick_dtype
from convsearch.prompts import PromptStyle, render, with_worked_example
from convsearch.sampling.base import SamplingConfig
from convsearch.sampling.hf import HfSampler
from convsearch.sampling.scaffold import Scaffold
from convsearch.types import Completion, Conversation, FinishReason


class Rewriter:
    """Conversation -> completions by one model.

    Args:
        example: put the worked example first (the warm-up prompt).
        scaffold: write the tags for the model; see ``convsearch.sampling.scaffold``.
        max_turns: newest turns of the history that stay in the prompt; None: all.
    """

    def __init__(
        self,
        path: str,
        sampling: SamplingConfig,
        *,
        style: PromptStyle,
        example: bool = False,
        scaffold: Scaffold | None = None,
        max_turns: int | None = None,
        device: str = "auto",
        dtype: str = "auto",
    ):
        self.tokenizer: Any = load_tokenizer(path)
        where = pick_device(device)
        model = load_model(path, pick_dtype(dtype, where)).to(where)
        stop_ids = stop_token_ids(model, self.tokenizer)
        self.sampler = HfSampler(model, self.tokenizer, sampling, stop_ids, scaffold)
        self.style, self.example, self.max_turns = style, example, max_turns
        limit = model.config.max_position_embeddings
        self.max_prompt_tokens = limit - sampling.max_tokens
        if self.max_prompt_tokens < 1:
            room = f"leaves no room for a prompt in the model's {limit} positions"
            raise ValueError(f"--max_tokens {sampling.max_tokens} {room}; lower it")

    def prompt_ids(self, conversation: Conversation) -> tuple[int, ...]:
        """The encoded prompt, without the oldest turns if it would not fit into the model."""
        history = len(conversation.history)
        for turns in range(history if self.max_turns is None else min(self.max_turns, history), -1, -1):
            messages = render(conversation, self.style, turns)
            ids = encode_chat(self.tokenizer, with_worked_example(messages, self.style) if self.example else messages)
            if len(ids) <= self.max_prompt_tokens:
                return ids
        limits = f"{len(ids)} tokens, above the {self.max_prompt_tokens} that the model has room for"
        raise ValueError(f"{conversation.qid}: the question alone has {limits}")

    def slices(
        self, conversations: Sequence[Conversation], n: int, seed: int, prompts_per_slice: int
    ) -> Iterator[tuple[Sequence[Conversation], list[list[Completion]]]]:
        """Yields (conversations, n completions of each) slice by slice; each conversation has its own seed."""
        for start in range(0, len(conversations), prompts_per_slice):
            part = conversations[start : start + prompts_per_slice]
            keys = [zlib.crc32(conversation.qid.encode()) for conversation in part]  # equal in every process
            yield part, self.sampler.generate([self.prompt_ids(c) for c in part], n, seed, keys=keys)


def build_rewriter(args: argparse.Namespace) -> Rewriter:
    """The model and sampler of a command line (``generation.options``)."""
    if args.threads:
        torch.set_num_threads(args.threads)
    limits = args.max_tokens, args.batch_size, args.repetition_penalty
    return Rewriter(
        args.model_name_or_path,
        SamplingConfig(args.temperature, args.top_p, args.top_k, *limits),
        style=args.prompt_style,
        example=args.model_name == "Get_SFT",
        scaffold=Scaffold.rewrite_form(args.think_tokens, args.rewrite_tokens) if args.scaffold else None,
        max_turns=args.max_history_turns,
        device=args.device,
        dtype=args.dtype,
    )


def by_model(path: str, style: PromptStyle, temperature: float, max_tokens: int) -> Generate:
    """Generates with a model in this process, for ``generation.answers``."""
    rewriter = Rewriter(path, SamplingConfig(temperature, 1.0, 0, max_tokens, 1), style=style)

    def generate(conversation: Conversation, style: PromptStyle, seed: int) -> tuple[str, FinishReason]:
        rewriter.style = style
        _, ((completion,),) = next(rewriter.slices([conversation], 1, seed, 1))
        return completion.text, completion.finish_reason

    return generate
