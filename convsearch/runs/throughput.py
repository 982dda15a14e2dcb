"""Tokens a second, and MFU: the share of the devices' arithmetic that a step's model operations have used.

Model operations are those of the mathematics: 2 a parameter and token forward, twice that backward, and attention's two products; what is recomputed to save
memory does not count, a prompt that is shared by its group counts once, and logits count for response tokens alone (``shapes.Shape.forward_flops``).
"""

import re
import subprocess
from collections.abc import Mapping, Sequence

from convsearch.config import GrpoConfig
from convsearch.model.shapes import Shape, shape_of

# 10^12 operations a second in dense bfloat16 (float16 where the device has no bfloat16), from the makers' data sheets; all words of the key stand in the name.
PEAK_TFLOPS = {
    "B200": 2250.0,
    "H200": 989.4,
    "H100": 989.4,
    "H100 PCIe": 756.5,
    "H100 NVL": 835.0,
    "H800": 989.4,
    "H20": 148.0,
    "A100": 312.0,
    "A800": 312.0,
    "A40": 149.7,
    "A30": 165.0,
    "A10": 125.0,
    "A6000": 154.8,
    "L40S": 362.0,
    "L40": 181.0,
    "L4": 121.0,
    "4090": 165.2,
    "3090": 71.0,
    "V100": 125.0,
    "T4": 65.0,
}


def peak_of(device_name: str) -> float | None:
    """The peak of a device by the words of its name (``NVIDIA H100 80GB HBM3``), the most particular entry; None where it is unknown."""
    words = set(re.split(r"[^A-Za-z0-9]+", device_name))
    known = [key for key in PEAK_TFLOPS if set(key.split()) <= words]
    return PEAK_TFLOPS[max(known, key=lambda key: len(key.split()))] if known else None


class Meter:
    """Turns lengths and seconds into rates.

    Args:
        shape: of the model; None: no MFU.
        peak_tflops: of one device; None: no MFU.
    """

    def __init__(self, shape: Shape | None, peak_tflops: float | None, devices: int):
        self.shape = shape
        self.peak = peak_tflops * 1e12 * devices if peak_tflops else None

    def forward(self, lengths_N: Sequence[tuple[int, int]], group: int) -> float:
        """Operations of one forward pass over (prompt, response) lengths in group-major order, each prompt once for its group of ``group``."""
        assert self.shape is not None
        total = 0.0
        for start in range(0, len(lengths_N), group):
            prompt = lengths_N[start][0]
            responses = [response for _, response in lengths_N[start : start + group]]
            attended = prompt * (prompt + 1) / 2 + sum(
                length * prompt + length * (length + 1) / 2 for length in responses
            )
            total += self.shape.forward_flops(prompt + sum(responses), sum(responses), attended)
        return total

    def of_grpo(
        self, cfg: GrpoConfig, lengths_N: Sequence[tuple[int, int]], seconds: Mapping[str, float]
    ) -> dict[str, float]:
        """Rates of a GRPO step from its phases' ``*_s`` metrics: sampling, the reference and the update over the same sequences."""
        actor, n = cfg.actor_rollout_ref.actor, cfg.actor_rollout_ref.rollout.n
        tokens = sum(prompt for prompt, _ in lengths_N[::n]) + sum(response for _, response in lengths_N)
        sampled = sum(response for _, response in lengths_N)
        rates = {"tokens_per_s": tokens / seconds["step_s"]}
        if seconds.get("sample_s"):
            rates["sampled_tokens_per_s"] = sampled / seconds["sample_s"]
        if self.shape and self.peak:
            sample = self.forward(lengths_N, n)
            learn = sample if actor.share_prompts else self.forward(lengths_N, 1)
            updates, passes = 3 * learn * actor.ppo_epochs, int(actor.use_kl_loss)
            passes += actor.ppo_epochs > 1 or cfg.data.train_batch_size > actor.ppo_mini_batch_size  # the old log-probs
            rates["mfu"] = (sample + passes * learn + updates) / seconds["step_s"] / self.peak
            if seconds.get("update_s"):
                rates["mfu_update"] = updates / seconds["update_s"] / self.peak
        return rates

    def of_sft(self, lengths: Sequence[tuple[int, int]], step_s: float) -> dict[str, float]:
        """Rates of a fine-tuning step over the whole batch."""
        rates = {"step_s": step_s, "tokens_per_s": sum(prompt + response for prompt, response in lengths) / step_s}
        if self.shape and self.peak:
            rates["mfu"] = 3 * self.forward(lengths, 1) / step_s / self.peak
        return rates


def meter_of(model: str, peak_tflops: float | None, device: str, devices: int) -> Meter:
    """For a model's folder or published name; models of a kind without a shape, and devices without a known peak, get no MFU."""
    if peak_tflops is None and device != "cpu":
        peak_tflops = peak_of(gpu_name())
    try:
        return Meter(shape_of(model), peak_tflops, devices)
    except ValueError:
        return Meter(None, None, devices)


def gpu_name() -> str:
    """Of the first GPU, asked of the driver's own tool: asking torch would open a context on it. Empty where there is none."""
    try:
        done = subprocess.run(
            ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"], capture_output=True, text=True, timeout=30
        )
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.partition("\n")[0].strip() if done.returncode == 0 else ""
