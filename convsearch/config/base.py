"""What every section of a configuration shares: frozen, strict about types and keys; and the few value types of the key tree."""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, field_validator


class Section(BaseModel):
    """A node of the key tree. An int is no bool and a number no string; an unknown key is an error; nothing can be changed later."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


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
"""A string; a bare number of the command line (``trainer.experiment_name=7``) is read as one."""
Texts = Annotated[tuple[Text, ...], BeforeValidator(_as_tuple)]
"""One string, a list of strings, or null for none."""
Betas = Annotated[tuple[float, float], BeforeValidator(_pair)]
"""Adam's two decay rates."""
Loggers = Annotated[tuple[Literal["console", "jsonl", "wandb", "tensorboard"], ...], BeforeValidator(_as_tuple)]
"""Where metrics go; one name, a list of them, or null for nowhere."""
Device = Literal["auto", "cpu", "cuda"]
Dtype = Literal["fp32", "bf16"]
CountOrMinusOne = Annotated[int, Field(ge=-1), AfterValidator(_not_zero)]
"""A positive number, or -1 with a meaning of its own."""


def require_multiple(total_name: str, total: int, part_name: str, part: int) -> None:
    """Raises ValueError, naming both numbers, unless ``part`` divides ``total``."""
    if total % part:
        raise ValueError(
            f"{total_name}={total} is not divisible by {part_name}={part}: choose {total_name} as a multiple of {part_name}"
        )


def require_fit(names: str, tokens: int, model_max: int) -> None:
    """Raises ValueError when sequences of ``tokens`` tokens do not fit into the model's ``model_max`` positions."""
    if tokens > model_max:
        raise ValueError(
            f"{names}={tokens} tokens is above the model's limit of {model_max} positions: shorten the lengths or choose another model"
        )


class TrainerSection(Section):
    """What both trainers are told of a run."""

    logger: Loggers = Field(
        default=("console", "jsonl"), description="where metrics go: list of console, jsonl, wandb, tensorboard"
    )
    experiment_name: Text = Field(default="run", description="run in wandb and in the logs")
    default_hdfs_dir: Text | None = Field(default=None, description="null only: copies to HDFS are not offered")
    resume_mode: Literal["auto", "disable"] = Field(
        default="auto", description="go on from the newest complete checkpoint, or start anew"
    )
    keep_checkpoints: int = Field(default=2, ge=1, description="newest complete checkpoints that stay on disk")
    best_metric: Text | None = Field(
        default=None,
        description="metric of the validation whose best checkpoint stays on disk too (val_reward, val_loss, ..); null: none",
    )
    best_mode: Literal["max", "min"] = Field(
        default="max", description="whether the larger or the smaller best_metric is the better one"
    )
    checkpoint_format: Literal["auto", "safetensors", "dcp"] = Field(
        default="auto",
        description="safetensors: whole tensors, a Hugging Face folder; dcp: each rank its shard (torch.distributed.checkpoint); "
        "auto: dcp with several ranks; a run goes on from either",
    )
    async_checkpoints: bool = Field(default=True, description="dcp: write in the background, from a copy in CPU memory")
    max_skipped_steps: int = Field(
        default=10,
        ge=1,
        description="steps in a row whose gradients are not finite (such steps are skipped) before the run ends with status 3",
    )
    peak_tflops: float | None = Field(
        default=None,
        gt=0,
        description="10^12 operations a second at which one device counts as fully used (MFU); null: by the GPU's name",
    )
    device: Device = Field(default="auto", description="auto: cuda where there is one")
    num_threads: int | None = Field(default=None, ge=1, description="CPU threads a rank; null: torch decides")

    @field_validator("default_hdfs_dir")
    @classmethod
    def _no_hdfs(cls, value: str | None) -> str | None:
        if value is not None:
            raise ValueError(
                f"copies to HDFS ('{value}') are not offered: set it to null and copy the folder when the run is done"
            )
        return value
