"""The policy-update benchmark counts its FLOPs right and runs on a CPU; scripts/gpu_checks.sh runs it on a GPU."""

import re
import subprocess
from pathlib import Path

import pytest

from benchmarks.policy_update import SHAPES, build_parser, forward_flops, measure
from convsearch.model.batch import Branch, Tree, unshared

ROOT = Path(__file__).resolve().parents[1]


def test_flops_worked_by_hand() -> None:
    # Tiny: query and output 32 x 32 each, key and value 32 x 16 each, three 32 x 64: 9216 weights a layer. A prompt of
    # 3, samples of 2 and 1:
    # 6 positions; the prompt sees 6 pairs, the samples 2 x 3 + 3 and 1 x 3 + 1: 19 pairs. Logits: 3 response tokens x
    # 32 x 100.
    tree = Tree((1, 2, 3), (Branch((4, 5)), Branch((6,))))
    assert forward_flops(SHAPES["tiny"], [tree]) == 2 * (2 * 9216 * 6 + 4 * 32 * 19) + 2 * 100 * 32 * 3
    # Without sharing the prompt's 3 positions and 6 pairs come once more.
    assert forward_flops(SHAPES["tiny"], unshared([tree])) - forward_flops(SHAPES["tiny"], [tree]) == 2 * (
        2 * 9216 * 3 + 4 * 32 * 6
    )


def test_qwen_shape_has_three_billion_parameters() -> None:
    shape = SHAPES["qwen2.5-3b"]
    one = (
        forward_flops(shape | {"vocab_size": 0}, [Tree((1,), ())])
        - 4 * shape["hidden_size"] * shape["num_hidden_layers"]
    )
    assert 2.7e9 < one / 2 < 2.8e9  # Qwen2.5-3B: 2.77 billion without its embeddings


@pytest.mark.parametrize("options", [[], ["--unshared", "--padded", "--fp32", "--no_checkpointing"]])
def test_it_runs_on_a_cpu(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    sizes = "--shape tiny --device cpu --prompts 3 --samples 2 --prompt_tokens 12 --response_tokens 6 --max_tokens 40"
    sizes += " --steps 1 --side 64"
    line = measure(build_parser().parse_args([*sizes.split(), *options]))
    numbers = dict(re.findall(r"(\w+)=([\d.]+|nan)", line))
    assert list(numbers) == ["mfu", "logprob_mfu", "tokens_per_s", "sample_tokens_per_s", "peak_gib", "ceiling_tflops"]
    shared = float(numbers["sample_tokens_per_s"]) > float(numbers["tokens_per_s"])
    assert shared == (not options)
    assert "positions in" in capsys.readouterr().out


def test_the_script_of_a_gpu_session_is_sound() -> None:
    script = ROOT / "scripts" / "gpu_checks.sh"
    assert subprocess.run(["bash", "-n", str(script)], check=False).returncode == 0
    asked = subprocess.run(["bash", str(script), "--dry-run"], capture_output=True, text=True, check=True).stdout
    assert "benchmarks.policy_update" in asked
    assert "pytest -m gpu" in asked
