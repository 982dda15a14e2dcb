"""One GRPO step, ours against TRL's GRPOTrainer: ``python -m benchmarks.grpo_step --size smollm2``.

The same model, prompts, number and length of samples (no end of sequence on either side), KL, arithmetic and threads; 4 prompts x 4 samples, prompts of
TopiOCQA turns with three turns of history (the demo's conversations where those are not there). Each contestant runs in a process of its own, in turns;
its first step warms up and does not count, and its memory is the process's peak (VmHWM). The table says where the time goes. The last line is
``ratio=… memory_ratio=…``: samples a second, ours over TRL's, and peak memory, ours over TRL's.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from convsearch.cli import run

ROOT = Path(__file__).resolve().parents[1]
ORACLES = Path(os.environ.get("CONVSEARCH_ORACLES", ROOT / ".venv" / "oracles"))
TOPIOCQA = ROOT.parent / "shared" / "data" / "topiocqa" / "topiocqa.zip"
CONTESTANTS = ("ours", "unshared", "trl")
PHASES = ("sample_s", "reference_s", "update_s")


@dataclass(frozen=True, slots=True)
class Work:
    """What every contestant is given."""

    model: str
    prompts: list[str]
    samples: int = 4
    tokens: int = 64
    beta: float = 0.001
    temperature: float = 0.7
    threads: int = 2
    steps: int = 1
    trl_micro_batch: int = 4


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="python -m benchmarks.grpo_step",
        description=__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    top.add_argument(
        "--size",
        choices=["tiny", "smollm2"],
        default="smollm2",
        help="tiny: a random model of two layers, 24 tokens a sample",
    )
    top.add_argument(
        "--model",
        type=Path,
        default=ROOT / "data" / "models" / "smollm2-135m",
        help="folder of SmolLM2; made where it is absent",
    )
    top.add_argument("--prompts", type=int, default=4, help="prompts a step")
    top.add_argument("--samples", type=int, default=4, help="samples a prompt")
    top.add_argument("--rounds", type=int, default=2, help="processes of each contestant, in turns")
    top.add_argument("--steps", type=int, default=1, help="measured steps a process, after one that warms up")
    top.add_argument("--threads", type=int, default=2, help="threads of every contestant")
    top.add_argument(
        "--trl_micro_batch", type=int, default=4, help="sequences of TRL's forward-backward passes (less: less memory)"
    )
    top.add_argument("--contestants", nargs="*", choices=CONTESTANTS, default=list(CONTESTANTS), help="who runs")
    top.add_argument("--work", type=Path, default=Path("data/benchmarks"), help="folder for the work's description")
    top.add_argument(
        "--contestant", choices=CONTESTANTS, help=argparse.SUPPRESS
    )  # the child process: one contestant, answers in JSON
    top.add_argument("--task", type=Path, help=argparse.SUPPRESS)
    return top


# --- the work


def conversations(count: int) -> list[Any]:
    """Turns of ``count`` different TopiOCQA conversations with at least three turns behind them; of the demo where there is no TopiOCQA."""
    import zipfile

    from convsearch.trainers.data import read_conversations
    from convsearch.types import Conversation, Turn

    if TOPIOCQA.is_file():
        with zipfile.ZipFile(TOPIOCQA) as archive:
            rows = json.loads(archive.read("topiocqa_dev.json"))
        found = [
            Conversation(
                f"{row['Conversation_no']}_{row['Turn_no']}",
                tuple(
                    Turn(question, answer)
                    for question, answer in zip(row["Context"][::2], row["Context"][1::2], strict=True)
                ),
                row["Question"],
                (),
            )
            for row in rows
        ]
    else:
        found = read_conversations(ROOT / "assets" / "demo" / "train.jsonl")
    chosen: dict[str, Conversation] = {}
    for conversation in found:
        if len(conversation.history) >= 3:
            chosen.setdefault(conversation.qid.rpartition("_")[0], conversation)
    return list(chosen.values())[:count]


def make_work(args: argparse.Namespace) -> Work:
    from convsearch.prompts import render

    model, tokens = args.model, 64
    if args.size == "tiny":
        model, tokens = args.work / "tiny_model", 24
        tiny_model(model, args.model)
    elif not (model / "config.json").is_file():
        done = subprocess.run([sys.executable, "-m", "data_preprocess.demo_model", "--output", str(model)], check=False)
        if done.returncode:
            raise ValueError(f"{model} is no model folder and data_preprocess.demo_model could not make it")
    prompts = [render(conversation, "paper", 3)[0]["content"] for conversation in conversations(args.prompts)]
    return Work(
        str(model),
        prompts,
        args.samples,
        tokens,
        threads=args.threads,
        steps=args.steps,
        trl_micro_batch=args.trl_micro_batch,
    )


def tiny_model(folder: Path, source: Path) -> None:
    """A random Llama of two layers with the tokenizer of ``source``, or with one of bytes where there is none."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    if (folder / "config.json").is_file():
        return
    tokenizer = _tokenizer(source)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(1)
    shape: dict[str, Any] = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    ids = {
        "bos_token_id": tokenizer.eos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.eos_token_id,
    }
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), num_key_value_heads=2, **shape, **ids)).save_pretrained(
        folder
    )


def _tokenizer(source: Path) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    if (source / "tokenizer.json").is_file():
        return AutoTokenizer.from_pretrained(source)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe = Tokenizer(
        models.BPE(vocab={letter: i for i, letter in enumerate([*letters, "<|im_start|>", "<|im_end|>"])}, merges=[])
    )
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|im_end|>")
    tokenizer.chat_template = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
    return tokenizer


# --- the contestants, each in a process of its own


class LengthJudge:
    """Stands for the retriever: a rank from the text alone, at no cost, so that samples of a group differ."""

    def gold_ranks(self, golds: Sequence[Sequence[str]], queries: Sequence[str | None]) -> list[int | None]:
        return [None if query is None else 1 + len(query) % 20 for query in queries]

    def similarity_gains(self, *_: Any) -> list[float | None]:
        raise NotImplementedError("the benchmark's reward has no similarity")


def run_ours(work: Work, share: bool, folder: Path) -> dict[str, Any]:
    """``convsearch.grpo.grpo_step`` as it is."""
    import torch

    from convsearch.config import load_grpo_config
    from convsearch.model.loading import encode_chat, load_tokenizer
    from convsearch.sampling.hf import HfSampler, SamplingConfig
    from convsearch.trainers.grpo import build_policy
    from convsearch.trainers.grpo_step import Trainer, grpo_step
    from convsearch.types import Example

    torch.set_num_threads(work.threads)
    count = len(work.prompts)
    overrides = {
        "cluster": "cpu",
        "algorithm": "grpo",
        "data.train_files": "none",
        "data.train_batch_size": count,
        "data.max_prompt_length": 512,
        "data.max_response_length": work.tokens,
        "actor_rollout_ref.model.path": work.model,
        "actor_rollout_ref.actor.ppo_mini_batch_size": count,
        "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu": work.samples,
        "actor_rollout_ref.actor.ppo_max_token_len_per_gpu": 512
        + work.tokens,  # a tree at a time: larger passes only cost memory on a CPU
        "actor_rollout_ref.actor.kl_loss_coef": work.beta,
        "actor_rollout_ref.actor.share_prompts": str(share).lower(),
        "actor_rollout_ref.rollout.n": work.samples,
        "actor_rollout_ref.rollout.temperature": work.temperature,
        "reward_model.reward.form": "text",
        "trainer.default_local_dir": folder,
        "trainer.resume_mode": "disable",
    }
    cfg = load_grpo_config([f"{key}={value}" for key, value in overrides.items()])
    tokenizer = load_tokenizer(work.model)
    examples = [
        Example(f"q{i}", ({"role": "user", "content": text},), text, ("d",)) for i, text in enumerate(work.prompts)
    ]
    ids = {example.qid: encode_chat(tokenizer, example.messages) for example in examples}
    _, policy, reference = build_policy(cfg, folder, torch.device("cpu"))
    sampler = HfSampler(
        policy.causal_lm, tokenizer, SamplingConfig(work.temperature, max_tokens=work.tokens), ()
    )  # no token ends a sample
    trainer = Trainer(cfg, folder, ids, sampler, LengthJudge(), policy, reference, 100)
    steps = [grpo_step(trainer, step, examples) for step in range(work.steps + 1)]
    assert all(step["response_tokens"] == work.tokens for step in steps)
    return {"steps": [{name: step[name] for name in ("step_s", *PHASES)} for step in steps[1:]]}


def run_trl(work: Work, folder: Path) -> dict[str, Any]:
    """``trl.GRPOTrainer`` with the same settings, on CPU in float32, without gradient checkpointing (which would be slower)."""
    import torch
    from datasets import Dataset  # type: ignore[import-not-found]
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    torch.set_num_threads(work.threads)
    sequences = len(work.prompts) * work.samples
    laps: list[dict[str, float]] = []

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            laps.append({"start": time.monotonic(), "sample_s": 0.0, "scored_s": 0.0})

        def on_step_end(self, *_: Any, **__: Any) -> None:
            laps[-1]["step_s"] = time.monotonic() - laps[-1]["start"]

    class Timed(GRPOTrainer):  # type: ignore[misc]
        def _generate(self, *args: Any, **options: Any) -> Any:
            return timed("sample_s", super()._generate, *args, **options)

        def _generate_and_score_completions(self, *args: Any, **options: Any) -> Any:
            output = timed("scored_s", super()._generate_and_score_completions, *args, **options)
            assert int(output["completion_mask"].sum()) == sequences * work.tokens
            return output

    def timed(name: str, call: Any, *args: Any, **options: Any) -> Any:
        start = time.monotonic()
        output = call(*args, **options)
        laps[-1][name] += time.monotonic() - start
        return output

    def reward(completions: list[Any], **_: Any) -> list[float]:
        return [1 / (1 + len(completion[0]["content"]) % 20) for completion in completions]

    config = GRPOConfig(
        output_dir=str(folder),
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        per_device_train_batch_size=work.trl_micro_batch,
        gradient_accumulation_steps=sequences // work.trl_micro_batch,
        num_generations=work.samples,
        max_completion_length=work.tokens,
        generation_kwargs={"min_new_tokens": work.tokens},
        temperature=work.temperature,
        beta=work.beta,
        learning_rate=1e-6,
        max_steps=work.steps + 1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        logging_strategy="no",
        model_init_kwargs={"dtype": "float32"},
        shuffle_dataset=False,
    )
    rows = [{"prompt": [{"role": "user", "content": text}]} for text in work.prompts]
    trainer = Timed(
        work.model, reward_funcs=reward, args=config, train_dataset=Dataset.from_list(rows), callbacks=[Clock()]
    )
    trainer.train()
    steps = [
        {
            "step_s": lap["step_s"],
            "sample_s": lap["sample_s"],
            "reference_s": lap["scored_s"] - lap["sample_s"],
            "update_s": lap["step_s"] - lap["scored_s"],
        }
        for lap in laps[1:]
    ]
    return {"steps": steps}


def run_contestant(name: str, work: Work) -> dict[str, Any]:
    """One contestant's steps and this process's peak memory in MiB."""
    from tempfile import TemporaryDirectory

    with TemporaryDirectory(prefix="grpo_step_") as folder:
        result = run_trl(work, Path(folder)) if name == "trl" else run_ours(work, name == "ours", Path(folder))
    status = Path("/proc/self/status").read_text(encoding="ascii")
    peak_kb = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))
    return {**result, "peak_mib": peak_kb / 1024}


# --- the comparison


def ask(name: str, task: Path, threads: int) -> dict[str, Any]:
    """Runs one contestant in a process of its own. Raises ValueError with the end of what it printed where it fails."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    path = [str(ORACLES), str(ROOT)] if name == "trl" else [str(ROOT)]
    environment["PYTHONPATH"] = os.pathsep.join(path)
    command = [sys.executable, "-m", "benchmarks.grpo_step", "--contestant", name, "--task", str(task)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ValueError(f"the contestant {name} failed:\n{done.stdout[-500:]}{done.stderr[-2500:]}")
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def compare(args: argparse.Namespace) -> str:
    """Runs the contestants in turns, prints a table and returns the last line."""
    if "trl" in args.contestants and not (ORACLES / "trl").is_dir():
        print(f"trl: not run: {ORACLES} has no trl; bash scripts/test.sh fast installs it")
        args.contestants.remove("trl")
    args.work.mkdir(parents=True, exist_ok=True)
    work = make_work(args)
    task = args.work / f"grpo_step_{args.size}.json"
    task.write_text(json.dumps(asdict(work)), encoding="utf-8")
    sequences = len(work.prompts) * work.samples
    print(
        f"{Path(work.model).name}: {len(work.prompts)} prompts x {work.samples} samples of {work.tokens} tokens, {work.threads} threads"
    )
    answers: dict[str, list[dict[str, Any]]] = {name: [] for name in args.contestants}
    for number in range(args.rounds):
        for name in args.contestants:
            answers[name].append(ask(name, task, args.threads))
            latest = answers[name][-1]
            seconds = ", ".join(f"{step['step_s']:.2f}" for step in latest["steps"])
            print(f"round {number + 1}: {name}: {seconds} s a step, {latest['peak_mib']:.0f} MiB", flush=True)
    print(
        f"\n{'contestant':<12}{'samples/s':>10}{'step s':>9}{'sampling':>10}{'reference':>11}{'update':>9}{'peak MiB':>10}"
    )
    rate, peak = {}, {}
    for name, runs in answers.items():
        steps = [step for answer in runs for step in answer["steps"]]
        medians = {phase: statistics.median(step[phase] for step in steps) for phase in ("step_s", *PHASES)}
        rate[name], peak[name] = sequences / medians["step_s"], max(answer["peak_mib"] for answer in runs)
        phases = f"{medians['sample_s']:>10.2f}{medians['reference_s']:>11.2f}{medians['update_s']:>9.2f}"
        print(f"{name:<12}{rate[name]:>10.3f}{medians['step_s']:>9.2f}{phases}{peak[name]:>10.0f}")
    if not {"ours", "trl"} <= rate.keys():
        return "ratio=nan memory_ratio=nan"
    return f"ratio={rate['ours'] / rate['trl']:.2f} memory_ratio={peak['ours'] / peak['trl']:.2f}"


def main() -> None:
    args = parser().parse_args()
    if args.contestant:
        print(json.dumps(run_contestant(args.contestant, Work(**json.loads(args.task.read_text(encoding="utf-8"))))))
    else:
        print(compare(args))


if __name__ == "__main__":
    run(main)
