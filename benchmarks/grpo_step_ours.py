"""Our contestant of benchmarks.grpo_step: ``convsearch.trainers.grpo_step`` as it is, and a tiny model."""

from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks.grpo_step_work import PHASES, Work
from convsearch.config import load_grpo_config
from convsearch.model.loading import encode_chat, load_tokenizer
from convsearch.policy.build import grpo_policy
from convsearch.rewards.shapes import Feedback
from convsearch.sampling.base import SamplingConfig
from convsearch.sampling.hf import HfSampler
from convsearch.trainers.grpo_step import Trainer, grpo_step
from convsearch.types import Example


class LengthRetriever:
    """Replaces the retriever: a rank from the text alone, at no cost, so that samples of a group differ."""

    def feedback(
        self, examples_N: Sequence[Example], texts_N: Sequence[str | None], signals: Collection[str]
    ) -> list[Feedback]:
        return [Feedback(None if text is None else 1 + len(text) % 20) for text in texts_N]


def overrides(work: Work, share: bool, folder: Path) -> list[str]:
    """The configuration; a pass takes one tree, because larger passes only cost memory on a CPU."""
    count = len(work.prompts)
    actor: dict[str, Any] = {"ppo_mini_batch_size": count, "ppo_micro_batch_size_per_gpu": work.samples}
    actor |= {"ppo_max_token_len_per_gpu": 512 + work.tokens, "share_prompts": str(share).lower()}
    lengths = {"max_prompt_length": 512, "max_response_length": work.tokens}
    keys = {
        "cluster": "cpu",
        "algorithm": "grpo",
        "data.train_files": "none",
        "data.train_batch_size": count,
        **{f"data.{key}": value for key, value in lengths.items()},
        "actor_rollout_ref.model.path": work.model,
        "actor_rollout_ref.model.dtype": work.dtype,
        "actor_rollout_ref.rollout.dtype": work.dtype,
        "actor_rollout_ref.actor.kl_loss_coef": work.beta,
        **{f"actor_rollout_ref.actor.{key}": value for key, value in actor.items()},
        "actor_rollout_ref.rollout.n": work.samples,
        "actor_rollout_ref.rollout.temperature": work.temperature,
        "reward_model.reward.form": "text",
        "trainer.default_local_dir": folder,
        "trainer.resume_mode": "disable",
    }
    return [f"{key}={value}" for key, value in keys.items()]


def run_ours(work: Work, share: bool, folder: Path) -> list[dict[str, float]]:
    """Seconds of each measured step and of its phases."""
    torch.set_num_threads(work.threads)
    cfg = load_grpo_config(overrides(work, share, folder))
    tokenizer = load_tokenizer(work.model)
    chats = [({"role": "user", "content": text},) for text in work.prompts]
    examples = [Example(f"q{i}", chat, chat[0]["content"], ("d",)) for i, chat in enumerate(chats)]
    examples = [replace(example, prompt_ids=encode_chat(tokenizer, example.messages)) for example in examples]
    _, policy, reference = grpo_policy(cfg, folder, torch.device("cpu"))
    sampling = SamplingConfig(work.temperature, max_tokens=work.tokens)
    sampler = HfSampler(policy.causal_lm, tokenizer, sampling, ())  # no token ends a sample
    trainer = Trainer(cfg, folder, 100, sampler, LengthRetriever(), policy, reference)
    steps = [grpo_step(trainer, step, examples)[1] for step in range(work.steps + 1)]
    assert all(step["response_tokens"] == work.tokens for step in steps)
    return [{name: step[name] for name in ("step_s", *PHASES)} for step in steps[1:]]


def save_tiny_model(folder: Path, source: Path) -> None:
    """Makes a random Llama of two layers with the tokenizer of ``source``, or one of bytes if it has none."""
    if (folder / "config.json").is_file():
        return
    tokenizer = _tokenizer(source)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(1)
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    shape: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, **heads}
    ids = {f"{kind}_token_id": tokenizer.eos_token_id for kind in ("bos", "eos", "pad")}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **shape, **ids)).save_pretrained(folder)


def _tokenizer(source: Path) -> Any:
    if (source / "tokenizer.json").is_file():
        return AutoTokenizer.from_pretrained(source)
    letters = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "<|im_start|>", "<|im_end|>"]
    bpe = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|im_end|>")
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "<|im_start|>assistant\n"
    )
    return tokenizer
