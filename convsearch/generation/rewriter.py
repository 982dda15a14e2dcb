"""What distillation and inference share: a model on a device with its sampler, and conversations -> completions in resumable slices."""

from collections.abc import Iterator, Sequence
from typing import Any

from convsearch.model.loading import encode_chat, load_model, load_tokenizer, pick_device, stop_token_ids
from convsearch.prompts import PromptStyle, render, with_worked_example
from convsearch.sampling.hf import HfSampler, SamplingConfig, Scaffold
from convsearch.types import Completion, Conversation


class Rewriter:
    """Conversation -> completions by one model.

    Args:
        example: put the worked example in front (the warm-up prompt).
        scaffold: we write the tags and the model fills them; see ``convsearch.sampling.hf.Scaffold``.
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
        bf16: bool = False,
    ):
        self.tokenizer: Any = load_tokenizer(path)
        model = load_model(path).to(pick_device(device))
        self.sampler = HfSampler(
            model, self.tokenizer, sampling, stop_token_ids(model, self.tokenizer), scaffold, bf16=bf16
        )
        self.style, self.example, self.max_turns = style, example, max_turns
        self.max_prompt_tokens = model.config.max_position_embeddings - sampling.max_tokens
        if self.max_prompt_tokens < 1:
            limit = model.config.max_position_embeddings
            raise ValueError(
                f"--max_tokens {sampling.max_tokens} leaves no room for a prompt in the model's {limit} positions; lower it"
            )

    def prompt_ids(self, conversation: Conversation) -> tuple[int, ...]:
        """The encoded prompt; the oldest turns go until it fits into the model."""
        turns = len(conversation.history) if self.max_turns is None else min(self.max_turns, len(conversation.history))
        while True:
            messages = render(conversation, self.style, turns)
            ids = encode_chat(self.tokenizer, with_worked_example(messages, self.style) if self.example else messages)
            if len(ids) <= self.max_prompt_tokens:
                return ids
            if turns == 0:
                raise ValueError(
                    f"{conversation.qid}: the question alone has {len(ids)} tokens, above the {self.max_prompt_tokens} that the model has room for"
                )
            turns -= 1

    def slices(
        self, conversations: Sequence[Conversation], n: int, seed: int, prompts_a_slice: int
    ) -> Iterator[tuple[Sequence[Conversation], list[Completion]]]:
        """Yields (conversations, their n completions each, group-major) slice by slice; the seed of a sample is its conversation's own."""
        for start in range(0, len(conversations), prompts_a_slice):
            part = conversations[start : start + prompts_a_slice]
            yield (
                part,
                self.sampler.generate(
                    [self.prompt_ids(c) for c in part], n, seed, keys=[_stable_key(c.qid) for c in part]
                ),
            )


def _stable_key(qid: str) -> int:
    """A number that names the query in a random seed, equal in every process."""
    import zlib

    return zlib.crc32(qid.encode())
