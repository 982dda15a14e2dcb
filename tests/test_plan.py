"""scripts/run.sh: its plan checks every command without starting one, and its stages stop at a failure.

1. Parameter counts are the published ones, and those of transformers. Memory and steps equal a calculation by hand.
2. --dry-run composes and checks each command of every experiment. A misspelt flag or key is reported with its stage.
3. A stage that fails is the last one. (The whole run, and SIGTERM: test_pipeline.py.)
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from convsearch.config import load_grpo_config
from convsearch.model.shapes import PUBLISHED, Shape, shape_of
from convsearch.plan import GIB, Stage, describe, grpo_memory, memory_of, module_of, read_stages, text_of, variables

ROOT = Path(__file__).resolve().parents[1]
EXPERIMENTS = sorted(path.stem for path in (ROOT / "configs" / "experiment").glob("*.yaml"))
LAUNCHERS = ("scripts/multinode.sh", "scripts/slurm.sbatch")
STAGES = ["data", "index", "distill", "sft", "grpo", "infer", "eval", "report"]


def bash(*command: str, folder: Path = ROOT, **environment: str) -> "subprocess.CompletedProcess[str]":
    known = {"PATH": os.environ["PATH"], "PYTHON": sys.executable, "PYTHONPATH": str(ROOT)} | environment
    return subprocess.run(["bash", *command], cwd=folder, env=known, capture_output=True, text=True, timeout=120)


def commands_of(*command: str, **environment: str) -> list[Stage]:
    """The commands that a script would start, by stage."""
    done = bash(*command, "--dry-run", PLAN="commands", **environment)
    assert done.returncode == 0, done.stderr
    return read_stages(done.stdout.splitlines())


def figures(stages: list[Stage], name: str) -> str:
    return "\n".join(next(stage for stage in stages if stage.name == name).figures)


def test_parameter_counts_equal_the_published_ones() -> None:
    counts = {name: shape.parameters for name, shape in PUBLISHED.items()}
    assert counts == {
        "Qwen/Qwen2.5-1.5B-Instruct": 1_543_714_304,
        "Qwen/Qwen2.5-3B-Instruct": 3_085_938_688,
        "Qwen/Qwen2.5-7B-Instruct": 7_615_616_512,
        "meta-llama/Llama-3.2-3B-Instruct": 3_212_749_824,
        "smollm2-135m": 134_515_008,
    }


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["tiny_llama", "tiny_qwen2"])
def test_parameter_counts_equal_those_of_transformers(kind: str, request: pytest.FixtureRequest) -> None:
    from transformers import AutoModelForCausalLM

    folder = request.getfixturevalue(kind)
    shape = shape_of(str(folder))
    assert shape is not None
    assert shape.parameters == sum(
        parameter.numel() for parameter in AutoModelForCausalLM.from_pretrained(folder).parameters()
    )


def test_a_model_of_another_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "mamba"}')
    with pytest.raises(ValueError, match="'mamba'"):
        shape_of(str(tmp_path))
    assert shape_of("nobody/knows") is None


def test_operations_by_hand() -> None:
    shape = Shape(hidden=4, layers=2, heads=2, kv_heads=1, head_size=2, inner=8, vocabulary=10, tied=True)
    assert shape.layer == (16 + 16 + 8 + 8) + 3 * 4 * 8 + 2 * 4
    assert shape.parameters == 2 * 152 + 4 + 40
    # 3 tokens that attend to 1 + 2 + 3 positions, the last of them scored
    assert shape.forward_flops(3, 1, 6) == 2 * 2 * 152 * 3 + 2 * 40 + 4 * 2 * 4 * 6


def test_memory_by_hand() -> None:
    shape = Shape(hidden=4, layers=2, heads=2, kv_heads=1, head_size=2, inner=8, vocabulary=10, tied=True)
    one = memory_of(shape, 1, tokens=100, recompute=True, chunk=5)
    assert (one.state, one.gradients, one.gathered) == (12 * 348, 4 * 348, 0)
    assert one.activations == 100 * (2 * 4 * 2 + (8 * 4 + 2 * 4 + 4 * 8) * 2)
    assert one.logits == 3 * 4 * 5 * 10
    two = memory_of(shape, 2, tokens=100, recompute=False, chunk=5)
    assert (two.state, two.gradients, two.gathered) == (6 * 348, 2 * 348, 2 * (40 + 2 * 152))
    assert two.activations == 100 * 2 * (8 * 4 + 2 * 4 + 4 * 8) * 2


def test_plan_of_one_experiment() -> None:
    name = "paper_topiocqa_qwen_ance"
    stages = commands_of("scripts/paper.sh", "topiocqa", "qwen", "ance")
    describe(stages, 8, 1, 80.0, name)
    assert [stage.name for stage in stages] == STAGES
    assert "73.5 GiB of vectors" in figures(stages, "index")  # the flat index of the paper
    assert "184 steps of 64 rows" in figures(stages, "sft")  # 2 x (5,892 // 64)
    assert "2130 steps of 128 prompts x 8 samples on 8 GPUs" in figures(stages, "grpo")  # about as in the paper
    assert "memory per GPU, sampling: 52.3 GiB (sampler 48.0" in figures(stages, "grpo")
    assert "WARNING" not in text_of(stages, name)
    assert "nothing was started" in text_of(stages, name)


def test_plan_warns_of_a_gpu_that_is_too_small() -> None:
    stages = commands_of("scripts/paper.sh", "qrecc", "llama", "bm25", "grpo")
    describe(stages, 8, 1, 8.0, "paper_qrecc_llama_bm25")
    assert "is above the 8 GiB of the GPU: lower the micro-batch or gpu_memory_utilization" in figures(stages, "grpo")


def test_offloaded_memory_is_not_in_the_estimate() -> None:
    shape = PUBLISHED["Qwen/Qwen2.5-3B-Instruct"]
    fsdp = "actor_rollout_ref.actor.fsdp_config."
    base, moments, both = (
        grpo_memory(load_grpo_config(["experiment=paper_qrecc_qwen_bm25", *changed]), shape, 80 * GIB)
        for changed in (
            [],
            [f"{fsdp}optimizer_offload=true"],
            [f"{fsdp}optimizer_offload=true", f"{fsdp}param_offload=true"],
        )
    )
    assert base.state - moments.state == pytest.approx(8 * shape.parameters / 8)
    assert both.state == 0
    near = load_grpo_config(
        ["experiment=paper_qrecc_qwen_bm25", "actor_rollout_ref.ref.fsdp_config.param_offload=false"]
    )
    assert grpo_memory(near, shape, 80 * GIB).reference == pytest.approx(4 * shape.parameters / 8)


@pytest.mark.slow
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_has_a_valid_plan(name: str) -> None:
    stages = commands_of("scripts/run.sh", name)
    describe(stages, 8 if name.startswith(("paper", "rqr_qwen")) else 1, 1, 80.0, name)
    assert f"experiment={name}" in next(stage for stage in stages if stage.name == "grpo").commands[-1]
    assert "WARNING" not in text_of(stages, name)


@pytest.mark.slow
def test_launchers_and_variables_change_the_commands_they_should() -> None:
    paper = ("scripts/paper.sh", "topiocqa", "qwen", "bm25")
    direct = commands_of(*paper)
    for launcher in LAUNCHERS:
        assert commands_of(launcher, *paper) == direct
    two_nodes = commands_of("scripts/multinode.sh", *paper, "grpo", NNODES="2")
    describe(two_nodes, 8, 2, 80.0, "paper_topiocqa_qwen_bm25")
    assert "on 16 GPUs (2 nodes of 8)" in figures(two_nodes, "grpo")
    more = commands_of(*paper, "grpo", GRPO="actor_rollout_ref.rollout.n=16 trainer.total_epochs=1")
    describe(more, 8, 1, 80.0, "paper_topiocqa_qwen_bm25")
    assert "128 prompts x 16 samples" in figures(more, "grpo")
    describe(commands_of(*paper, "--device", "cpu", "model=smollm2-135m"), 1, 1, 80.0)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """Scripts, code and configurations, for an experiment of the test's own."""
    for name in ("scripts", "convsearch", "configs"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


def commands_in(checkout: Path, runner: str, *stages: str) -> list[str]:
    """The commands of demo_smollm2 with other values in names.runner."""
    experiment = f"# @package _global_\ndefaults: [demo_smollm2, _self_]\nnames: {{runner: {{{runner}}}}}\n"
    (checkout / "configs" / "experiment" / "mine.yaml").write_text(experiment)
    variables = {"PYTHONPATH": f"{checkout}:{ROOT}", "OUT": "o"}
    dry_run = ("scripts/run.sh", "mine", "--dry-run", *stages)
    checked = bash(*dry_run, folder=checkout, **variables)
    assert checked.returncode == 0, checked.stderr
    planned = bash(*dry_run, folder=checkout, PLAN="commands", **variables).stdout
    return [shlex.join(command[2:]) for stage in read_stages(planned.splitlines()) for command in stage.commands]


def test_rows_of_the_table(checkout: Path) -> None:
    runs = "raw previous_answer constant grpo grpo_sample grpo_fused written"
    found = commands_in(checkout, f"runs: {runs}, infer: --temperature 0, data: d", "infer", "eval", "report")
    infer = [command for command in found if command.startswith("convsearch.infer")]
    assert [re.findall(r"--output_path (\S+)", command) for command in infer] == [
        ["o/grpo.jsonl"], ["o/grpo_samples.jsonl"], ["o/grpo_samples.jsonl"],
    ]  # fmt: skip
    assert [re.findall(r"--(?:temperature|n) \S+", command) for command in infer] == [
        ["--temperature 0"],
        ["--temperature 0", "--temperature 0.7", "--n 4"],
        ["--temperature 0", "--temperature 0.7", "--n 4"],
    ]
    searches = [command.partition("--test_file_path ")[2] for command in found if command.startswith("eval.bm25")]
    test = "--trec_gold_qrel_file_path o/test.trec --qrel_output_dir o --output_trec_file"
    validation = "--trec_gold_qrel_file_path o/validation.trec --qrel_output_dir o/validation --output_trec_file"
    assert searches == [
        f"o/test.json --test_type question {test} raw.trec",
        f"o/test.json --test_type previous_answer {test} previous_answer.trec",
        f"o/grpo.jsonl --test_type rewrite {test} grpo.trec",
        f"o/grpo_samples.jsonl --test_type rewrite {test} grpo_sample.trec",
        f"o/grpo_samples.jsonl --test_type rewrite --fuse rrf {test} grpo_fused.trec",
        f"o/test.json --test_type rewrite {test} written.trec",
        f"o/validation.json --test_type question {validation} raw.trec",
        f"o/validation.json --test_type previous_answer {validation} previous_answer.trec",
    ]
    assert found[-1].partition("results.json ")[2] == (
        "o/raw.trec o/previous_answer.trec o/grpo.trec@o/grpo.jsonl o/grpo_sample.trec@o/grpo_samples.jsonl "
        "o/grpo_fused.trec@o/grpo_samples.jsonl o/written.trec@o/test.json "
        "--rules o/validation.trec o/validation/raw.trec o/validation/previous_answer.trec"
    )
    assert "--rules" not in commands_in(checkout, "runs: raw grpo", "report")[-1]


@pytest.mark.parametrize("rounds", [1, 2, 3])
def test_rounds_of_the_warm_up(checkout: Path, rounds: int) -> None:
    """Each further round samples from the last SFT model, and trains the base model on its samples alone."""
    runner = f"rounds: {rounds}, distill: --k 3, distill_size: --limit 9, distill2: --k 5, runs: sft"
    found = commands_in(checkout, runner, "distill", "sft", "grpo", "infer")
    steps = [
        (*re.findall(r"--(?:model_name_or_path|output_dir) (\S+)", command), "--k 5" in command)
        if command.startswith("convsearch.distill")
        else tuple(re.findall(r"(?:train_files|default_local_dir)=(\S+)", command))
        for command in found
        if command.startswith(("convsearch.distill", "convsearch.sft"))
    ]
    base = "data/models/smollm2-135m"
    expected = [(base, "o/distill", False), ("o/distill/sft.parquet", "o/sft")]
    expected += [("o/sft/model", "o/distill2", True), ("o/distill2/sft.parquet", "o/sft2")]
    expected += [("o/sft2/model", "o/distill3", True), ("o/distill3/sft.parquet", "o/sft3")]
    assert steps == expected[: 2 * rounds]
    assert [("--model_name ConvSearch-R1" in command) for command in found if ".distill " in command] == (
        [False] + [True] * (rounds - 1)
    )
    last = f"o/sft{rounds}/model" if rounds > 1 else "o/sft/model"
    assert [f"model.path={last}" in command for command in found if ".grpo " in command] == [True]
    assert f"--model_name_or_path {last}" in found[-1]


def test_every_seed_and_group_has_its_own_output_folder() -> None:
    for words, environment, folder in (
        ([], {}, "demo_smollm2"),
        ([], {"SEED": "2"}, "demo_smollm2_seed2"),
        (["reward=ndcg3"], {"SEED": "2", "QUICK": "1"}, "demo_smollm2_ndcg3_quick_seed2"),
    ):
        [grpo] = commands_of("scripts/run.sh", "demo_smollm2", "grpo", *words, **environment)[0].commands
        assert f"trainer.default_local_dir=outputs/{folder}/grpo" in grpo
        assert "data.train_files=data/demo/train.parquet" in grpo


def test_dry_run_starts_nothing(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "scripts", tmp_path / "scripts")
    done = bash("scripts/paper.sh", "qrecc", "llama", "ance", "--dry-run", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "2079 steps" in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["scripts"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nonsense"], "configs/experiment/nonsense.yaml does not exist, choose one of demo_mixed, demo_smollm2"),
        (["demo_smollm2", "nonsense"], "nonsense is neither --dry-run, --device, GROUP=NAME, KEY=VALUE nor one of the"),
        (["demo_smollm2", "retriever=x"], "configs/retriever/x.yaml does not exist"),
    ],
)
def test_unknown_words_are_refused(words: list[str], message: str) -> None:
    done = bash("scripts/run.sh", *words)
    assert done.returncode == 2
    assert message in done.stderr


def test_unknown_runner_key_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    (tmp_path / "configs/reward/mine.yaml").write_text("# @package _global_\nnames: {runner: {distil: x}}\n")
    for module in ("convsearch.config.load", "convsearch.plan"):
        monkeypatch.setattr(f"{module}.config_dir", lambda: tmp_path / "configs")
    with pytest.raises(ValueError, match=r"names.runner.distil is unknown: choose one of stages, device"):
        variables(["experiment=demo_smollm2", "reward=mine"])


def test_failed_stage_is_the_last(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "scripts", tmp_path / "scripts")
    done = bash("scripts/run.sh", "demo_smollm2", "index", "distill", folder=tmp_path)
    assert done.returncode == 2
    assert "collection.jsonl" in done.stderr
    assert "== index" in done.stdout
    assert "== distill" not in done.stdout


def test_runner_reports_a_server_that_ends(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "scripts", tmp_path / "scripts")
    done = bash("scripts/run.sh", "demo_smollm2", "retriever=bm25", "distill", folder=tmp_path, PORT="1")
    assert done.returncode == 2
    assert "the retrieval server ended, see outputs/demo_smollm2_bm25/server.log" in done.stderr
    assert "data/indexes/bm25_demo" in (tmp_path / "outputs/demo_smollm2_bm25/server.log").read_text()


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (
            "python -m convsearch.grpo experiment=paper_qrecc_qwen_bm25 actor_rollout_ref.rollout.m=3",
            "stage x: unknown key",
        ),
        ("python -m convsearch.infer --model_name_or_path m --input_path a --output_pth b", "--output_path"),
        ("python -m retriever_server.index bm25 --collection a --output b --k2 1", "unrecognized arguments: --k2 1"),
        ("echo hello", "runs no module"),
    ],
)
def test_refused_command_is_reported_with_its_stage(command: str, said: str) -> None:
    with pytest.raises(ValueError, match="stage x: ") as caught:
        describe(read_stages([f"x\t{command}"]), 8, 1, 80.0)
    assert said in str(caught.value)


def test_module_behind_torchrun_is_found() -> None:
    command = "python -m torch.distributed.run --standalone --nproc_per_node=8 -m convsearch.sft a=b"
    assert module_of(command.split()) == ("convsearch.sft", ["a=b"])


def test_scripts_are_valid_bash() -> None:
    files = [str(path) for path in sorted((ROOT / "scripts").iterdir()) if path.suffix in (".sh", ".sbatch")]
    assert len(files) == 10
    for file in files:
        done = subprocess.run(["bash", "-n", file], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    if shellcheck := shutil.which("shellcheck"):
        done = subprocess.run([shellcheck, "-x", "-S", "warning", *files], capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == 0, done.stdout
