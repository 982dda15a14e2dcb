"""TRL's contestant of benchmarks.grpo_step: ``trl.GRPOTrainer`` with the same settings, on CPU."""

import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset  # type: ignore[import-not-found]
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from benchmarks.grpo_step_work import Work

Laps = list[dict[str, float]]  # of each step


class Clock(TrainerCallback):  # type: ignore[misc]
    """Appends the start of a step to ``laps``, and its seconds to the lap when it ends."""

    def __init__(self, laps: Laps) -> None:
        self.laps = laps

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.laps.append({"start": time.monotonic(), "sample_s": 0.0, "scored_s": 0.0})

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.laps[-1]["step_s"] = time.monotonic() - self.laps[-1]["start"]


class Timed(GRPOTrainer):  # type: ignore[misc]
    """Adds the seconds of sampling and scoring to the last lap; checks that no sample ends early."""

    laps: Laps
    num_tokens: int  # of all samples of a step

    def _generate(self, *args: Any, **options: Any) -> Any:
        return self._lap("sample_s", super()._generate, *args, **options)

    def _generate_and_score_completions(self, *args: Any, **options: Any) -> Any:
        output = self._lap("scored_s", super()._generate_and_score_completions, *args, **options)
        assert int(output["completion_mask"].sum()) == self.num_tokens
        return output

    def _lap(self, name: str, call: Any, *args: Any, **options: Any) -> Any:
        start = time.monotonic()
        output = call(*args, **options)
        self.laps[-1][name] += time.monotonic() - start
        return output


def reward(completions: list[Any], **_: Any) -> list[float]:
    return [1 / (1 + len(completion[0]["content"]) % 20) for completion in completions]


def trl_config(work: Work, folder: Path) -> Any:
    """Without gradient checkpointing, which would be slower; in bf16 under autocast, TRL's own way."""
    quiet = {"save_strategy": "no", "report_to": "none", "logging_strategy": "no", "disable_tqdm": True}
    cpu = {
        "use_cpu": True,
        "bf16": work.dtype == "bf16",
        "model_init_kwargs": {"dtype": "float32"},
        "gradient_checkpointing": False,
    }
    samples: dict[str, Any] = {
        "num_generations": work.samples,
        "temperature": work.temperature,
        "max_completion_length": work.tokens,
    }
    samples["generation_kwargs"] = {"min_new_tokens": work.tokens}
    passes = len(work.prompts) * work.samples // work.trl_micro_batch
    batch = {"per_device_train_batch_size": work.trl_micro_batch, "gradient_accumulation_steps": passes}
    steps = {"max_steps": work.steps + 1, "learning_rate": 1e-6, "beta": work.beta, "shuffle_dataset": False}
    return GRPOConfig(output_dir=str(folder), **quiet, **cpu, **samples, **batch, **steps)


def run_trl(work: Work, folder: Path) -> Laps:
    """Seconds of each measured step and of its phases."""
    torch.set_num_threads(work.threads)
    laps: Laps = []
    data = Dataset.from_list([{"prompt": [{"role": "user", "content": text}]} for text in work.prompts])
    options = {"args": trl_config(work, folder), "train_dataset": data, "callbacks": [Clock(laps)]}
    trainer = Timed(work.model, reward_funcs=reward, **options)
    trainer.laps, trainer.num_tokens = laps, len(work.prompts) * work.samples * work.tokens
    trainer.train()
    for lap in laps:
        lap |= {"reference_s": lap["scored_s"] - lap["sample_s"], "update_s": lap["step_s"] - lap["scored_s"]}
    return laps[1:]
