"""The original project's inference and evaluation commands parse here word for word, apart from the module names (those
of SFT and GRPO: test_config.py)."""

import shlex

import pytest

from convsearch import infer

INFERENCE = """
    --model_name_or_path path/to/your/model \
    --model_name ConvSearch-R1 \
    --dp_size 8 \
    --gpus_per_dp_rank 1 \
    --temperature 0.7 \
    --input_path data/topiocqa/dev.json \
    --output_path path/to/your/output
"""


def test_the_inference_command_is_accepted() -> None:
    args = infer.parse_args(shlex.split(INFERENCE))
    assert (args.model_name_or_path, args.model_name) == ("path/to/your/model", "ConvSearch-R1")
    assert (args.dp_size, args.gpus_per_dp_rank, args.temperature) == (8, 1, 0.7)
    assert (args.input_path, args.output_path) == ("data/topiocqa/dev.json", "path/to/your/output")
    assert args.prompt_style == "paper"
    assert not args.scaffold
    assert args.max_tokens == 4096


def test_the_flag_of_the_engines_address_is_accepted() -> None:
    assert infer.parse_args([*shlex.split(INFERENCE), "--dp_master_ip", "10.0.0.1"]).dp_master_ip == "10.0.0.1"


def test_an_unknown_flag_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        infer.parse_args([*shlex.split(INFERENCE), "--nonsense", "1"])
    assert "--nonsense" in capsys.readouterr().err
