"""Tokens per second, and MFU: the share of the devices' peak arithmetic that the model operations of a step use.

Model operations are those of the mathematics: 2 per parameter and token forward, twice that backward, and the two
products of attention. What is recomputed to save memory does not count, a prompt that a group shares counts once, and
logits count for response tokens only (``shapes.Shape.forward_flops``).
"""

import re
import subprocess
from collections.abc import Mapping, Sequence

from convsearch.model.shapes import Shape, shape_of

# 10^12 operations per second in dense bfloat16 (float16 for a device without bfloat16), from the makers' data sheets.
_HOPPER = {"H200": 989.4, "H100": 989.4, "H100 PCIe": 756.5, "H100 NVL": 835.0, "H800": 989.4, "H20": 148.0}
_AMPERE = {"A100": 312.0, "A800": 312.0, "A40": 149.7, "A30": 165.0, "A10": 125.0, "A6000": 154.8, "3090": 71.0}
_ADA = {"L40S": 362.0, "L40": 181.0, "L4": 121.0, "4090": 165.2}
PEAK_TFLOPS = {"B200": 2250.0, **_HOPPER, **_AMPERE, **_ADA, "V100": 125.0, "T4": 65.0}


def peak_of(device_name: str) -> float | None:
    """The peak of a device by the words of its name (``NVIDIA H100 80GB HBM3``); None if it is unknown.

    An entry matches if all its words are in the name; of several, the one with the most words counts.
    """
    words = set(re.split(r"[^A-Za-z0-9]+", device_name))
    known = [key for key in PEAK_TFLOPS if set(key.split()) <= words]
    return PEAK_TFLOPS[max(known, key=lambda key: len(key.split()))] if known else None


Group = tuple[int, Sequence[int]]  # prompt tokens, response tokens of each sample


class Throughput:
    """Turns lengths and seconds into rates.

    Args:
        shape: of the model; None: no MFU.
        peak_tflops: of one device; None: no MFU.
    """

    def __init__(self, shape: Shape | None, peak_tflops: float | None, devices: int):
        self.shape = shape
        self.peak = peak_tflops * 1e12 * devices if peak_tflops else None

    def forward(self, groups: Sequence[Group]) -> float:
        """Operations of one forward pass that computes the prompt of each group once."""
        assert self.shape is not None
        total = 0.0
        for prompt, responses in groups:
            pairs = sum(length * prompt + length * (length + 1) / 2 for length in responses)
            attended = prompt * (prompt + 1) / 2 + pairs
            total += self.shape.forward_flops(prompt + sum(responses), sum(responses), attended)
        return total

    def of_grpo(
        self,
        groups: Sequence[Group],
        trained: Sequence[Group],
        seconds: Mapping[str, float],
        *,
        share_prompts: bool,
        passes: int,
        epochs: int,
    ) -> dict[str, float]:
        """Rates of a GRPO step from the ``*_s`` metrics of its phases: sampling, the reference and the update.

        Args:
            trained: the part of ``groups`` that the update learns from.
            share_prompts: whether the update computes each prompt once for its group; sampling always does.
            passes: forward-only passes beside sampling: 1 for the reference, 1 for the old log-probs.
            epochs: passes of the update over the step's rollouts.
        """
        sampled = sum(sum(responses) for _, responses in groups)
        rates = {"tokens_per_s": (sum(prompt for prompt, _ in groups) + sampled) / seconds["step_s"]}
        if seconds.get("sample_s"):
            rates["sampled_tokens_per_s"] = sampled / seconds["sample_s"]
        if self.shape and self.peak:
            alone = [(prompt, (length,)) for prompt, responses in trained for length in responses]
            sample, learn = self.forward(groups), self.forward(trained if share_prompts else alone)
            updates = 3 * learn * epochs
            rates["mfu"] = (sample + passes * learn + updates) / seconds["step_s"] / self.peak
            if seconds.get("update_s"):
                rates["mfu_update"] = updates / seconds["update_s"] / self.peak
        return rates

    def of_sft(self, rows: Sequence[tuple[int, int]], step_s: float) -> dict[str, float]:
        """Rates of a fine-tuning step over a batch of (prompt tokens, response tokens)."""
        rates = {"step_s": step_s, "tokens_per_s": sum(prompt + response for prompt, response in rows) / step_s}
        if self.shape and self.peak:
            rates["mfu"] = 3 * self.forward([(prompt, (length,)) for prompt, length in rows]) / step_s / self.peak
        return rates


def throughput_of(model: str, peak_tflops: float | None, device: str, devices: int) -> Throughput:
    """For a model folder or a published name; without MFU for other architectures or a device of unknown peak."""
    if peak_tflops is None and device != "cpu":
        peak_tflops = peak_of(gpu_name())
    try:
        return Throughput(shape_of(model), peak_tflops, devices)
    except ValueError:
        return Throughput(None, None, devices)


def gpu_name() -> str:
    """The name of the first GPU by nvidia-smi, because torch would open a context on it; empty if there is none."""
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.partition("\n")[0].strip() if done.returncode == 0 else ""
