"""What every section of a configuration shares: frozen, strict about types and keys; and the few value types of the key tree."""

from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field


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
CountOrMinusOne = Annotated[int, Field(ge=-1), AfterValidator(_not_zero)]
"""A positive number, or -1 with a meaning of its own."""


def require_multiple(total_name: str, total: int, part_name: str, part: int) -> None:
    """Raises ValueError, naming both numbers, unless ``part`` divides ``total``."""
    if total % part:
        raise ValueError(f"{total_name}={total} is not divisible by {part_name}={part}: choose {total_name} as a multiple of {part_name}")


def require_fit(names: str, tokens: int, model_max: int) -> None:
    """Raises ValueError when sequences of ``tokens`` tokens do not fit into the model's ``model_max`` positions."""
    if tokens > model_max:
        raise ValueError(
            f"{names}={tokens} tokens is above the model's limit of {model_max} positions: shorten the lengths or choose another model"
        )
