"""The configuration of the warm-up (``python -m convsearch.sft``), with the keys of the original ``fsdp_sft_trainer``.

Defaults are the paper's: batch 64, 3072 tokens, 2 epochs, lr 1e-5, cosine with 10% warm-up, weight decay 0.01, betas
0.9/0.95, clip 1.0.
"""

from typing import Literal, Self

from pydantic import Field, model_validator

from convsearch.config.base import (
    Betas,
    CountOrMinusOne,
    Dtype,
    Section,
    Text,
    Texts,
    TrainerSection,
    key,
    require_fit,
    require_multiple,
)


class SftDataConfig(Section):
    train_files: Texts = Field(min_length=1, description="parquet file, or list of them, with the training rows")
    val_files: Texts = key((), "parquet file(s) whose loss is reported; none: no validation")
    prompt_key: Text = key("extra_info", "column that holds the prompt")
    response_key: Text = key("extra_info", "column that holds the output to learn")
    prompt_dict_keys: Texts = key(("prompt",), "path inside the prompt column if it is a dict; [] if it is text")
    response_dict_keys: Texts = key(("answer",), "path inside the response column if it is a dict; [] if it is text")
    train_batch_size: int = key(64, "rows per optimiser step, over all ranks", ge=1)
    micro_batch_size_per_gpu: int = key(8, "rows per forward pass of one rank", ge=1)
    max_length: int = key(3072, "largest number of tokens of prompt and response together", ge=2)
    truncation: Literal["error", "left", "right"] = key("right", "rows above max_length: an error, or cut at that end")
    shuffle: bool = key(True, "new order of the rows in each epoch, drawn from data.seed")
    seed: int = key(1, "seed of the order of the rows", ge=0)


class SftModelConfig(Section):
    partial_pretrain: Text = Field(description="folder or hub name of the model to start from")
    enable_gradient_checkpointing: bool = key(
        True, "recompute activations in the backward pass: less memory, about a third more time"
    )
    trust_remote_code: bool = key(False, "run Python code of the model folder")
    dtype: Dtype = key("bf16", "type of the arithmetic; weights and Adam's state stay in fp32")


class SftOptimConfig(Section):
    lr: float = key(1e-5, "peak learning rate", gt=0)
    betas: Betas = key((0.9, 0.95), "AdamW's decay rates")
    weight_decay: float = key(0.01, "AdamW's weight decay", ge=0)
    warmup_steps_ratio: float = key(0.1, "share of the steps in which the learning rate rises from 0", ge=0, le=1)
    clip_grad: float = key(1.0, "largest gradient norm", gt=0)
    lr_scheduler: Literal["cosine", "constant"] = key("cosine", "learning rate after the warm-up")
    min_lr_ratio: float = key(0.0, "final learning rate of the cosine, as a share of lr", ge=0, le=1)


class SftTrainerConfig(TrainerSection):
    default_local_dir: Text = key("outputs/run/sft", "folder for checkpoints, logs and the exported model")
    project_name: Text = key("convsearch-sft", "project in wandb")
    total_epochs: int = key(2, "passes over the training rows", ge=1)
    total_training_steps: int | None = key(None, "number of optimiser steps; null: total_epochs decides", ge=1)
    seed: int = key(1, "seed of everything random except the order of the rows", ge=0)
    save_freq: CountOrMinusOne = key(-1, "steps between checkpoints; -1: at the end of each epoch")
    test_freq: CountOrMinusOne = key(-1, "steps between validations; -1: at the end of each epoch")


class SftConfig(Section):
    """The whole configuration of ``convsearch.sft``."""

    data: SftDataConfig
    model: SftModelConfig
    optim: SftOptimConfig = SftOptimConfig()
    trainer: SftTrainerConfig = SftTrainerConfig()

    @model_validator(mode="after")
    def _clashes(self) -> Self:
        self.check_world(1)
        return self

    def check_world(self, world_size: int) -> None:
        """Raises ValueError unless ``world_size`` ranks can share a batch evenly in whole micro-batches."""
        name, size = "data.train_batch_size", self.data.train_batch_size
        require_multiple(name, size, "the number of ranks", world_size)
        if world_size > 1:
            name = f"rows per rank ({name} / {world_size} ranks)"
        micro = self.data.micro_batch_size_per_gpu
        require_multiple(name, size // world_size, "data.micro_batch_size_per_gpu", micro)

    def check_context(self, model_max: int) -> None:
        """Raises ValueError when ``data.max_length`` is above the model's ``model_max`` positions."""
        require_fit("data.max_length", self.data.max_length, model_max)
