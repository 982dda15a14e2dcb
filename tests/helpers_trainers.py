"""A world small enough for a test: a tokenizer, tiny random models, eighteen passages with a real server, and the
commands over them.

Every question asks for an aspect ("its food?") of the town that the turn before it names. The gold passage is the one
that has both words, so a rewrite earns most by bringing the town back, less by the town or the aspect alone, nothing by
another word.
"""

import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
TOWNS = ("rome", "oslo", "lima", "cairo", "tokyo", "quito")
ASPECTS = ("history", "food", "rivers")
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
GOLDS = {(town, aspect): f"{town}-{aspect}" for town in TOWNS for aspect in ASPECTS}


def build_tokenizer(folder: Path, texts: Sequence[str]) -> Any:
    """A byte-level BPE with a chat template, trained on ``texts`` and saved to ``folder``."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    specials = ["<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|im_end|>")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return tokenizer


def training_texts() -> list[str]:
    from convsearch.prompts import EXAMPLE, EXAMPLE_OUTPUT, render

    prompts = [render(EXAMPLE, style)[0]["content"] for style in ("paper", "compact")]
    return [
        *prompts,
        EXAMPLE_OUTPUT,
        *(text for town, aspect in GOLDS for text in [question(town, aspect), answer(town, aspect)] * 20),
    ]


def build_model(
    folder: Path, kind: str = "llama", spread: float = 0.15, positions: int = 1024, head_size: int = 16
) -> None:
    """Saves a random model of two layers beside the tokenizer that is already in ``folder``; a wide ``spread`` gives
    uneven distributions.

    vLLM's CPU attention takes no ``head_size`` below 32.
    """
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(folder)
    shape: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": head_size,
        "max_position_embeddings": positions,
        "initializer_range": spread,
        "bos_token_id": tokenizer.convert_tokens_to_ids("<|im_start|>"),
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.eos_token_id,
    }
    torch.manual_seed(7)
    if kind == "qwen2":
        shape["num_attention_heads"] = 64 // shape.pop("head_dim")  # its attention has no head size of its own
        model: Any = Qwen2ForCausalLM(Qwen2Config(**shape, tie_word_embeddings=False))
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(parameter, std=0.3)  # zero biases would hide an error in them
    else:
        model = LlamaForCausalLM(LlamaConfig(**shape, tie_word_embeddings=True))
    model.save_pretrained(folder)


def question(town: str, aspect: str) -> str:
    return f"Q: where is {town}? Q: its {aspect}?"


def answer(town: str, aspect: str) -> str:
    return f"<think>{aspect} of {town}</think>\n<rewrite>{town} {aspect}</rewrite>"


def sft_rows(pairs: Sequence[tuple[str, str, str]]) -> list[dict[str, Any]]:
    """(query id, prompt, answer) in the columns of the SFT parquet."""
    return [
        {
            "data_source": "toy",
            "prompt": [{"role": "user", "content": prompt}],
            "ability": "rewrite",
            "reward_model": {"style": "rule", "ground_truth": ["rome-food"]},
            "extra_info": {"split": "train", "index": index, "query_id": qid, "prompt": prompt, "answer": output},
        }
        for index, (qid, prompt, output) in enumerate(pairs)
    ]


def grpo_rows(golds: Sequence[tuple[str, str]]) -> list[dict[str, Any]]:
    """One row a (town, aspect) in the columns of the GRPO parquet."""
    return [
        {
            "data_source": "toy",
            "prompt": [{"role": "user", "content": question(town, aspect)}],
            "ability": "rewrite",
            "reward_model": {"style": "rule", "ground_truth": [f"{town}-{aspect}"]},
            "extra_info": {
                "split": "train",
                "index": index,
                "answer": "",
                "question": f"its {aspect}?",
                "query_id": f"q{index}",
                "context": [f"where is {town}?", "far away"],
            },
        }
        for index, (town, aspect) in enumerate(golds)
    ]


def conversation_rows(golds: Sequence[tuple[str, str]]) -> list[dict[str, Any]]:
    """Conversations of two turns; every third of them is a first turn."""
    return [
        {
            "qid": f"c{index}_1" if index % 3 == 0 else f"c{index}_2",
            "question": f"{town} {aspect}?" if index % 3 == 0 else f"its {aspect}?",
            "context": [] if index % 3 == 0 else [f"where is {town}?", f"{town} is far away"],
            "answer": "",
            "gold_docids": [f"{town}-{aspect}"],
        }
        for index, (town, aspect) in enumerate(golds)
    ]


def write_parquet(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(list(rows)), path)
    return path


def write_jsonl(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def build_index(folder: Path) -> Path:
    from retriever_server.bm25.build import build

    passages = [{"id": docid, "contents": f"{town} {aspect} of {town}"} for (town, aspect), docid in GOLDS.items()]
    write_jsonl(folder / "collection.jsonl", passages)
    build(folder / "collection.jsonl", folder / "index", progress=False)
    return folder / "index"


def grpo_overrides(model: Path, train: Path, run_dir: Path, url: str, **changed: Any) -> list[str]:
    """The smallest command line that trains; ``changed`` names keys by their last part or, with dots as two
    underscores, in full."""
    values: dict[str, Any] = {
        "cluster": "cpu",
        "data.train_files": train,
        "data.train_batch_size": 4,
        "data.max_prompt_length": 64,
        "data.max_response_length": 40,
        "actor_rollout_ref.model.path": model,
        "actor_rollout_ref.model.dtype": "fp32",  # exact, and the same on every machine
        "actor_rollout_ref.rollout.dtype": "fp32",
        "actor_rollout_ref.actor.ppo_mini_batch_size": 4,
        "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu": 4,
        "actor_rollout_ref.actor.optim.lr": 1e-3,
        "actor_rollout_ref.actor.optim.lr_warmup_steps": 0,
        "actor_rollout_ref.rollout.n": 4,
        "actor_rollout_ref.rollout.temperature": 1.0,
        "retriever.url": url,
        "trainer.default_local_dir": run_dir,
        "trainer.total_training_steps": 3,
        "trainer.save_freq": 1,
        "trainer.num_threads": 1,
        "trainer.logger": "[jsonl]",
    }
    return _overrides(values, changed)


def sft_overrides(model: Path, train: Path, run_dir: Path, **changed: Any) -> list[str]:
    values: dict[str, Any] = {
        "cluster": "cpu",
        "data.train_files": train,
        "data.train_batch_size": 8,
        "data.micro_batch_size_per_gpu": 4,
        "data.max_length": 128,
        "model.partial_pretrain": model,
        "model.dtype": "fp32",
        "optim.lr": 1e-3,
        "trainer.default_local_dir": run_dir,
        "trainer.total_training_steps": 4,
        "trainer.num_threads": 1,
        "trainer.logger": "[jsonl]",
    }
    return _overrides(values, changed)


def _overrides(values: dict[str, Any], changed: dict[str, Any]) -> list[str]:
    for name, value in changed.items():
        key = name.replace("__", ".")
        full = [known for known in values if known == key or known.endswith(f".{key}")]
        values[full[0] if full else key] = value
    return [f"{key}={str(value).lower() if isinstance(value, bool) else value}" for key, value in values.items()]


def environment() -> dict[str, str]:
    return os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        "GLOO_SOCKET_IFNAME": "lo",
        "HF_HUB_OFFLINE": "1",
    }


def start(module: str, arguments: Sequence[object], **options: Any) -> "subprocess.Popen[str]":
    """``python -m module arguments`` as a process of its own, both outputs as text through one pipe."""
    command = [sys.executable, "-m", module, *map(str, arguments)]
    options = {"preexec_fn": listen_to_ctrl_c, **options}
    return subprocess.Popen(
        command, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options
    )


def listen_to_ctrl_c() -> None:
    """A shell starts its background jobs with SIGINT ignored, and their children inherit that; a person's terminal does
    not."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def finish(module: str, arguments: Sequence[object], **options: Any) -> tuple[int, str]:
    """Runs the command to its end; returns (exit status, all it has printed)."""
    process = start(module, arguments, **options)
    output, _ = process.communicate(timeout=600)
    return process.returncode, output


def call(main: Callable[[], None], arguments: Sequence[object]) -> tuple[int, str]:
    """The command inside this process: (exit status, all it has printed); a traceback stays an exception."""
    from unittest.mock import patch

    from convsearch.cli import run

    output = io.StringIO()
    with patch.object(sys, "argv", ["command", *map(str, arguments)]), redirect_stdout(output), redirect_stderr(output):
        try:
            run(main)
        except SystemExit as end:
            return int(end.code or 0), output.getvalue()
    return 0, output.getvalue()


def one_sentence(status: int, output: str) -> str:
    """The error of a command that ended as a user's mistake should; fails where it ended in any other way."""
    assert status == 2, (status, output)
    assert "Traceback" not in output, output
    errors = [line for line in output.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, output
    return errors[0]


def teach_form(source: Path, folder: Path, steps: int = 60) -> None:
    """Fine-tunes the random model until most samples keep the form, with a town and an aspect that have nothing to do
    with the question.

    One row in eight has the prompt of inference, of which fewer samples keep the form in the end.
    """
    import random

    import torch

    from convsearch.model.batch import Branch, Tree
    from convsearch.model.loading import encode_chat, load_model, load_tokenizer
    from convsearch.policy.policy import LocalPolicy
    from convsearch.prompts import render
    from convsearch.runs import checkpoint
    from convsearch.trainers.sft import sft_step
    from convsearch.types import Conversation, Message

    tokenizer, draw = load_tokenizer(str(source)), random.Random(3)
    policy = LocalPolicy(load_model(str(source)), torch.device("cpu"))

    def toy() -> tuple[Message, ...]:
        return ({"role": "user", "content": question(draw.choice(TOWNS), draw.choice(ASPECTS))},)

    def real() -> tuple[Message, ...]:
        return render(Conversation.from_record(draw.choice(conversation_rows(list(GOLDS)))), "compact")

    def row(messages: tuple[Message, ...]) -> Tree:
        answer_ids = tokenizer.encode(answer(draw.choice(TOWNS), draw.choice(ASPECTS)), add_special_tokens=False)
        return Tree(encode_chat(tokenizer, messages), (Branch((*answer_ids, tokenizer.eos_token_id)),))

    for step in range(steps):
        rows = [row(toy()) for _ in range(28)] + [row(real()) for _ in range(4)]
        sft_step(policy, rows, 28, 1e-2 * min(1, (step + 1) / 10) * (1 - step / steps))
    checkpoint.export(folder, policy.causal_lm, tokenizer, policy.weights())


def flat(groups: Sequence[Sequence[Any]]) -> list[Any]:
    """The members of all groups, group-major."""
    return [member for group in groups for member in group]
