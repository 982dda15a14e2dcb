"""What ends a run before its last step (section ``guard`` of the RL stage's configuration)."""

from convsearch.config.base import Section, key


class GuardConfig(Section):
    """Limits on means over a window of steps. A run that crosses one saves, reports it and ends with status 3."""

    window: int = key(20, "steps whose mean is compared with the limits, from the first full window on", ge=1)
    min_reward: float | None = key(None, "smallest mean reward; null: off")
    max_reward_fall: float | None = key(1.0, "largest fall of the mean reward below its best window; null: off", gt=0)
    min_format_rate: float | None = key(None, "smallest share of samples that keep the format; null: off", ge=0, le=1)
    max_format_fall: float | None = key(0.5, "largest fall of that share below its best window; null: off", gt=0, le=1)
    min_response_tokens: float | None = key(None, "smallest mean length of a response; null: off", ge=0)
    max_response_tokens: float | None = key(None, "largest mean length of a response; null: off", gt=0)
    max_kl: float | None = key(None, "largest mean KL to the reference, in nats per token; null: off", gt=0)
    max_non_latin_share: float | None = key(
        0.5, "largest mean share of non-Latin letters in a response; null: off", gt=0, le=1
    )
