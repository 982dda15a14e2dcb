"""What ends a run before its last step (section ``guard`` of the RL stage's configuration)."""

from pydantic import Field

from convsearch.config.base import Section


class GuardConfig(Section):
    """Limits on means over a window of steps; null: no such limit. A run that crosses one saves, says what it saw and ends with status 3."""

    window: int = Field(
        default=20,
        ge=1,
        description="steps whose mean is held against the limits; before so many steps nothing is judged",
    )
    min_reward: float | None = Field(default=None, description="smallest mean reward; null: no limit")
    max_reward_fall: float | None = Field(
        default=1.0, gt=0, description="how far the mean reward may fall below its best window; null: no limit"
    )
    min_format_rate: float | None = Field(
        default=None, ge=0, le=1, description="smallest share of samples that keep the form; null: no limit"
    )
    max_format_fall: float | None = Field(
        default=0.5, gt=0, le=1, description="how far that share may fall below its best window; null: no limit"
    )
    min_response_tokens: float | None = Field(
        default=None, ge=0, description="smallest mean length of a response; null: no limit"
    )
    max_response_tokens: float | None = Field(
        default=None, gt=0, description="largest mean length of a response; null: no limit"
    )
    max_kl: float | None = Field(
        default=None, gt=0, description="largest mean KL to the reference, in nats a token; null: no limit"
    )
    max_non_latin_share: float | None = Field(
        default=0.5,
        gt=0,
        le=1,
        description="largest mean share of a response's letters that are not Latin; null (for data in other scripts): no limit",
    )
