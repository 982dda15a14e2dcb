"""What all sections of a configuration share (they are frozen and strict), and the types of values."""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, field_validator

NO_EFFECT = "accepted, without effect: "
"""Starts the description of a key that acts on nothing: the original command lines set it. Loading warns of it."""


class Section(BaseModel):
    """A node of the key tree. A bool is not an int, a string not a number; an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


def key(default: Any, description: str, **limits: Any) -> Any:
    """A key with a default value; ``limits`` are those of ``pydantic.Field`` (ge, gt, le, ...)."""
    return Field(default=default, description=description, **limits)


def _number_as_text(value: Any) -> Any:
    return str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value


def _as_tuple(value: Any) -> Any:
    if value is None:
        return ()
    if isinstance(value, list | tuple):
        return tuple(value)
    return (value,) if isinstance(value, str | int | float) and not isinstance(value, bool) else value


def _pair(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _not_zero(value: int) -> int:
    if value == 0:
        raise ValueError("0 is not a count: give a positive number, or -1")
    return value


Text = Annotated[str, BeforeValidator(_number_as_text)]
"""A string; a bare number on the command line (``trainer.experiment_name=7``) is read as a string."""
Texts = Annotated[tuple[Text, ...], BeforeValidator(_as_tuple)]
"""One string, a list of strings, or null for none."""
Betas = Annotated[tuple[float, float], BeforeValidator(_pair)]
"""Adam's two decay rates."""
Loggers = Annotated[tuple[Literal["console", "jsonl", "wandb", "tensorboard"], ...], BeforeValidator(_as_tuple)]
"""Where metrics go; one name, a list of names, or null for nowhere."""
Device = Literal["auto", "cpu", "cuda"]
Dtype = Literal["auto", "fp32", "bf16"]
"""auto: bf16 on a GPU or CPU that multiplies it, else fp32; the trainers write what they chose into config.json."""
CountOrMinusOne = Annotated[int, Field(ge=-1), AfterValidator(_not_zero)]
"""A positive number, or -1, whose meaning the key describes."""


def require_multiple(total_name: str, total: int, part_name: str, part: int) -> None:
    """Raises ValueError, naming both numbers, unless ``part`` divides ``total``."""
    if total % part:
        remedy = f"choose {total_name} as a multiple of {part_name}"
        raise ValueError(f"{total_name}={total} is not divisible by {part_name}={part}: {remedy}")


def require_fit(names: str, tokens: int, model_max: int) -> None:
    """Raises ValueError when sequences of ``tokens`` tokens do not fit into the model's ``model_max`` positions."""
    if tokens > model_max:
        remedy = "lower the lengths or choose another model"
        raise ValueError(f"{names}={tokens} tokens is above the model's limit of {model_max} positions: {remedy}")


class TrainerSection(Section):
    """The keys of section ``trainer`` that both trainers have."""

    logger: Loggers = key(("console", "jsonl"), "where metrics go: list of console, jsonl, wandb, tensorboard")
    experiment_name: Text = key("run", "name of the run in wandb and in the logs")
    default_hdfs_dir: Text | None = key(None, f"{NO_EFFECT}must be null; nothing is copied to HDFS")
    resume_mode: Literal["auto", "disable"] = key("auto", "auto: from the newest complete checkpoint; disable: anew")
    keep_checkpoints: int = key(2, "how many of the newest complete checkpoints are kept", ge=1)
    best_metric: Text | None = key(None, "also keep the best checkpoint by this metric; GRPO exports it as model/")
    best_mode: Literal["max", "min"] = key("max", "whether a larger or a smaller best_metric is better")
    checkpoint_format: Literal["auto", "safetensors", "dcp"] = key(
        "auto",
        "safetensors: whole tensors, a Hugging Face folder; dcp: one file per rank (torch.distributed.checkpoint); "
        "auto: dcp with several ranks; a run can resume from either",
    )
    async_checkpoints: bool = key(True, "dcp: write in the background, from a copy in CPU memory")
    max_skipped_steps: int = key(
        10,
        "steps in a row without a finite gradient that end the run with status 3",
        ge=1,
    )
    peak_tflops: float | None = key(
        None, "10^12 operations per second of a fully used device, for MFU; null: by the name of the GPU", gt=0
    )
    device: Device = key("auto", "auto: cuda if available")
    num_threads: int | None = key(None, "CPU threads per rank; null: torch decides", ge=1)

    @field_validator("default_hdfs_dir")
    @classmethod
    def _no_hdfs(cls, value: str | None) -> str | None:
        if value is not None:
            raise ValueError(f"'{value}': nothing is copied to HDFS; set it to null and copy the folder after the run")
        return value
