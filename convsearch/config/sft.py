"""The configuration of the warm-up (``python -m convsearch.sft``): the key tree of the seed's ``fsdp_sft_trainer`` command lines.

Defaults are the paper's (batch 64, 3072 tokens, 2 epochs, lr 1e-5, cosine with 10% warm-up, weight decay 0.01, betas 0.9/0.95, clip 1.0).
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
    require_fit,
    require_multiple,
)


class SftDataConfig(Section):
    train_files: Texts = Field(min_length=1, description="parquet file, or list of them, to learn from")
    val_files: Texts = Field(default=(), description="parquet file(s) whose loss is reported; none: no validation")
    prompt_key: Text = Field(default="extra_info", description="column that holds the prompt")
    response_key: Text = Field(default="extra_info", description="column that holds the output to learn")
    prompt_dict_keys: Texts = Field(
        default=("prompt",), description="path inside the prompt column when it is a dict; [] when it is text"
    )
    response_dict_keys: Texts = Field(
        default=("answer",), description="path inside the response column when it is a dict; [] when it is text"
    )
    train_batch_size: int = Field(default=64, ge=1, description="rows an optimiser step, over all ranks")
    micro_batch_size_per_gpu: int = Field(default=8, ge=1, description="rows a forward pass on one rank")
    max_length: int = Field(default=3072, ge=2, description="tokens of prompt and response together")
    truncation: Literal["error", "left", "right"] = Field(
        default="right", description="what happens to a row above max_length: an error, or cut at that end"
    )
    shuffle: bool = Field(default=True, description="new order of the rows in each epoch, drawn from data.seed")
    seed: int = Field(default=1, ge=0, description="seed of the order of the rows")


class SftModelConfig(Section):
    partial_pretrain: Text = Field(description="folder or hub name of the model to start from")
    enable_gradient_checkpointing: bool = Field(
        default=True, description="recompute activations in the backward pass: less memory, about a third more time"
    )
    trust_remote_code: bool = Field(default=False, description="run Python code that comes with the model")
    dtype: Dtype = Field(
        default="bf16", description="type of the arithmetic; weights and Adam's state are kept in fp32"
    )


class SftOptimConfig(Section):
    lr: float = Field(default=1e-5, gt=0, description="peak learning rate")
    betas: Betas = Field(default=(0.9, 0.95), description="AdamW's decay rates")
    weight_decay: float = Field(default=0.01, ge=0, description="AdamW's weight decay")
    warmup_steps_ratio: float = Field(
        default=0.1, ge=0, le=1, description="share of the steps in which the learning rate rises from 0"
    )
    clip_grad: float = Field(default=1.0, gt=0, description="largest gradient norm")
    lr_scheduler: Literal["cosine", "constant"] = Field(default="cosine", description="learning rate after the warm-up")
    min_lr_ratio: float = Field(default=0.0, ge=0, le=1, description="where the cosine ends, as a share of lr")


class SftTrainerConfig(TrainerSection):
    default_local_dir: Text = Field(
        default="outputs/run/sft", description="folder for checkpoints, logs and the exported model"
    )
    project_name: Text = Field(default="convsearch-sft", description="project in wandb")
    total_epochs: int = Field(default=2, ge=1, description="passes over the training rows")
    total_training_steps: int | None = Field(
        default=None, ge=1, description="stop after so many optimiser steps; null: total_epochs decides"
    )
    seed: int = Field(default=1, ge=0, description="seed of everything random but the order of the rows")
    save_freq: CountOrMinusOne = Field(
        default=-1, description="checkpoint every so many steps; -1: at the end of each epoch"
    )
    test_freq: CountOrMinusOne = Field(
        default=-1, description="validation loss every so many steps; -1: at the end of each epoch"
    )


class SftConfig(Section):
    """Everything that ``convsearch.sft`` is told."""

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
        data = self.data
        require_multiple("data.train_batch_size", data.train_batch_size, "the number of ranks", world_size)
        rows = data.train_batch_size // world_size
        name = (
            "data.train_batch_size" if world_size == 1 else f"rows a rank (data.train_batch_size / {world_size} ranks)"
        )
        require_multiple(name, rows, "data.micro_batch_size_per_gpu", data.micro_batch_size_per_gpu)

    def check_context(self, model_max: int) -> None:
        """Raises ValueError when ``data.max_length`` is above the model's ``model_max`` positions."""
        require_fit("data.max_length", self.data.max_length, model_max)
