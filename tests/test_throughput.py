"""Rates: tokens per second and MFU equal those calculated by hand; a device is known by its name."""

import pytest

from convsearch.model.shapes import PUBLISHED, Shape
from convsearch.runs.throughput import Throughput, peak_of, throughput_of

SMALL = Shape(
    hidden=4, layers=2, heads=2, kv_heads=1, head_size=2, inner=8, vocabulary=10, tied=True
)  # 152 parameters a layer
GROUPS = [(3, [2, 1]), (5, [1, 4])]  # (prompt, responses)
ALONE = [(3, [2]), (3, [1]), (5, [1]), (5, [4])]
SECONDS = {"step_s": 4.0, "sample_s": 2.0, "update_s": 1.0}


def by_hand(tokens: int, scored: int, attended: int) -> float:
    return 2 * 2 * 152 * tokens + 2 * 40 * scored + 4 * 2 * 4 * attended


def test_a_forward_pass_with_shared_prompts_by_hand() -> None:
    # group 1: prompt 1+2+3, branches 4+5 and 4; group 2: prompt 1+..+5, branches 6 and 6+7+8+9
    meter = Throughput(SMALL, None, 1)
    assert meter.forward(GROUPS) == by_hand(3 + 3 + 5 + 5, 8, 6 + 13 + 15 + 36)
    assert meter.forward(ALONE) == by_hand(5 + 4 + 6 + 9, 8, (6 + 9) + (6 + 4) + (15 + 6) + (15 + 30))


@pytest.mark.parametrize("share", [True, False])
def test_the_rates_of_a_grpo_step_by_hand(share: bool) -> None:
    throughput = Throughput(SMALL, 1e-6, devices=3)  # 3e6 operations per second
    sample, learn = throughput.forward(GROUPS), throughput.forward(GROUPS if share else ALONE)
    rates = throughput.of_grpo(GROUPS, GROUPS, SECONDS, share_prompts=share, passes=1, epochs=1)
    assert rates["tokens_per_s"] == pytest.approx((3 + 5 + 8) / 4)
    assert rates["sampled_tokens_per_s"] == pytest.approx(8 / 2)
    assert rates["mfu_update"] == pytest.approx(3 * learn / 1.0 / 3e6)
    assert rates["mfu"] == pytest.approx((sample + learn + 3 * learn) / 4.0 / 3e6)  # sampling, reference, update
    other = throughput.of_grpo(GROUPS, GROUPS, SECONDS, share_prompts=share, passes=0, epochs=2)
    assert other["mfu"] == pytest.approx((sample + 2 * 3 * learn) / 4.0 / 3e6)
    part = throughput.of_grpo(GROUPS, [(3, [2])], SECONDS, share_prompts=share, passes=1, epochs=1)
    assert part["mfu"] == pytest.approx((sample + 4 * throughput.forward([(3, [2])])) / 4.0 / 3e6)
    assert part["tokens_per_s"] == rates["tokens_per_s"]


def test_the_rates_of_a_fine_tuning_step_by_hand() -> None:
    rates = Throughput(SMALL, 1e-6, devices=1).of_sft([(3, 2)], step_s=2.0)
    assert rates == {"step_s": 2.0, "tokens_per_s": 2.5, "mfu": pytest.approx(3 * by_hand(5, 2, 6 + 9) / 2.0 / 1e6)}


def test_unknown_rates_are_left_out() -> None:
    options = {"share_prompts": True, "passes": 1, "epochs": 1}
    rates = Throughput(SMALL, None, 1).of_grpo(GROUPS, GROUPS, SECONDS, **options)
    assert set(rates) == {"tokens_per_s", "sampled_tokens_per_s"}
    rates = Throughput(None, 100.0, 1).of_grpo(GROUPS, GROUPS, {"step_s": 1.0, "sample_s": 0.0}, **options)
    assert set(rates) == {"tokens_per_s"}
    assert throughput_of("Qwen/Qwen2.5-3B-Instruct", None, "cpu", 1).peak is None
    throughput = throughput_of("Qwen/Qwen2.5-3B-Instruct", 100.0, "cpu", 8)
    assert (throughput.shape, throughput.peak) == (PUBLISHED["Qwen/Qwen2.5-3B-Instruct"], 8e14)


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H200", 989.4),
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.5),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA A10", 125.0),
        ("Tesla V100-SXM2-32GB", 125.0),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA GB10", None),
        ("", None),
    ],
)
def test_devices_by_name(name: str, peak: float | None) -> None:
    assert peak_of(name) == peak
