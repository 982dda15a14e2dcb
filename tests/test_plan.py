"""The experiments' scripts: what they would run is checked and planned for without starting anything, and what they run, they run in order.

1. Parameter counts are the published ones, and transformers' own; memory and steps are those of a calculation by hand.
2. Every script's --dry-run composes and checks each of its commands; a misspelt flag or key is named with its stage.
3. A stage that fails, or is told to stop, is the last one; SIGTERM reaches what is running.
"""

import http.server
import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from convsearch.model.shapes import PUBLISHED, Shape, shape_of
from convsearch.plan import GIB, Stage, describe, grpo_memory, memory_of, module_of, read_stages, text_of

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = sorted((ROOT / "scripts" / "paper").glob("*.sh"))
LAUNCHERS = ("scripts/multinode.sh", "scripts/slurm.sbatch")
STAGES = ["data", "index", "distill", "sft", "grpo", "infer", "eval"]


def commands_of(*command: str, **environment: str) -> list[Stage]:
    """What a script would run; only bash runs."""
    known = {"PATH": os.environ["PATH"], "PLAN": "commands"}
    done = subprocess.run(
        ["bash", *command, "--dry-run"], cwd=ROOT, env=known | environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return read_stages(done.stdout.splitlines())


def figures(stages: list[Stage], name: str) -> str:
    return "\n".join(next(stage for stage in stages if stage.name == name).figures)


def test_parameter_counts_are_the_published_ones() -> None:
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
def test_parameter_counts_are_transformers_own(kind: str, request: pytest.FixtureRequest) -> None:
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


def test_the_plan_of_one_experiment() -> None:
    name = "paper_topiocqa_qwen_ance"
    stages = commands_of("scripts/paper/topiocqa_qwen_ance.sh")
    describe(stages, 8, 1, 80.0, name)
    assert [stage.name for stage in stages] == STAGES
    assert "73.5 GiB of vectors" in figures(stages, "index")  # the paper's flat index
    assert "184 steps of 64 rows" in figures(stages, "sft")  # 2 x (5,892 // 64)
    assert "2130 steps of 128 prompts x 8 samples on 8 GPUs" in figures(stages, "grpo")  # the paper's, about
    assert "memory a GPU, sampling: 52.3 GiB (sampler 48.0" in figures(stages, "grpo")
    assert "WARNING" not in text_of(stages, name)
    assert "nothing was started" in text_of(stages, name)


def test_a_gpu_that_is_too_small_is_named() -> None:
    stages = commands_of("scripts/paper/qrecc_llama_bm25.sh", "grpo")
    describe(stages, 8, 1, 8.0, "paper_qrecc_llama_bm25")
    assert "is above the GPU's 8: lower the micro-batch or gpu_memory_utilization" in figures(stages, "grpo")


def test_offloading_takes_its_part_out_of_the_estimate() -> None:
    from convsearch.config import load_grpo_config

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
def test_every_script_is_whole_with_its_variants() -> None:
    assert len(SCRIPTS) == 8
    for script in SCRIPTS:
        relative = script.relative_to(ROOT).as_posix()
        name = f"paper_{script.stem}"
        direct = commands_of(relative)
        assert [stage.name for stage in direct] == STAGES
        describe(direct, 8, 1, 80.0, name)
        assert f"experiment={name}" in direct[4].commands[-1]
        assert "WARNING" not in text_of(direct, name)
        for launcher in LAUNCHERS:
            assert [stage.commands for stage in commands_of(launcher, relative)] == [stage.commands for stage in direct]
        two_nodes = commands_of("scripts/multinode.sh", relative, "grpo", NNODES="2")
        describe(two_nodes, 8, 2, 80.0, name)
        assert "on 16 GPUs (2 nodes of 8)" in figures(two_nodes, "grpo")
        more = commands_of(relative, "grpo", GRPO="actor_rollout_ref.rollout.n=16 trainer.total_epochs=1")
        describe(more, 8, 1, 80.0, name)
        assert "128 prompts x 16 samples" in figures(more, "grpo")


@pytest.mark.slow
def test_the_dry_run_as_a_person_starts_it(tmp_path: Path) -> None:
    command = ["bash", str(ROOT / "scripts" / "paper" / "qrecc_llama_ance.sh"), "--dry-run"]
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    assert done.returncode == 0, done.stderr
    assert "2079 steps" in done.stdout
    assert list(tmp_path.iterdir()) == []
    done = subprocess.run([*command, "nonsense"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    assert "nonsense is neither --dry-run nor one of the stages" in done.stderr


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
def test_a_command_that_would_be_refused_is_named(command: str, said: str) -> None:
    with pytest.raises(ValueError, match="stage x: ") as caught:
        describe(read_stages([f"x\t{command}"]), 8, 1, 80.0)
    assert said in str(caught.value)


def test_the_module_behind_torchrun_is_found() -> None:
    command = [
        "python",
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=8",
        "-m",
        "convsearch.sft",
        "a=b",
    ]
    assert module_of(command) == ("convsearch.sft", ["a=b"])


def test_the_scripts_are_well_formed() -> None:
    files = [str(path) for path in (*(ROOT / "scripts").glob("*.sh"), *(ROOT / "scripts").glob("*.sbatch"), *SCRIPTS)]
    assert len(files) > 12
    for file in files:
        done = subprocess.run(["bash", "-n", file], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    if shellcheck := shutil.which("shellcheck"):
        done = subprocess.run([shellcheck, "-x", "-S", "warning", *files], capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == 0, done.stdout


FAKE_PYTHON = """#!/usr/bin/env bash
# Notes its module and does what the stage leaves behind; convsearch.$SLOW waits for SIGTERM.
module=""
for ((i = 1; i <= $#; i++)); do [ "${!i}" != -m ] || { j=$((i + 1)); module=${!j}; }; done
echo "$module ${CUDA_VISIBLE_DEVICES:-all}" >> "$NOTES"
[ "$module" != "${BROKEN:-}" ] || exit 7
if [ "$module" = "${SLOW:-}" ]; then
  trap 'echo "$module saved" >> "$NOTES"; exit 143' TERM
  for ((i = 0; i < 600; i++)); do sleep 0.05; done
fi
for ((i = 1; i < $#; i++)); do
  j=$((i + 1))
  case ${!i} in --output_path) cp "$INPUT" "${!j}" ;; --input_path) INPUT=${!j} ;; esac
done
"""


class World:
    """A checkout's scripts with a python that only takes notes, and a server that is healthy."""

    def __init__(self, folder: Path, url: str):
        self.folder, self.notes = folder, folder / "notes"
        shutil.copytree(ROOT / "scripts", folder / "scripts")
        data = folder / "data" / "topiocqa"
        data.mkdir(parents=True)
        (data / "train.json").write_text("".join(f'{{"qid": "t{i}"}}\n' for i in range(7)))
        (data / "dev.json").write_text("".join(f'{{"qid": "d{i}"}}\n' for i in range(5)))
        fake = folder / "python"
        fake.write_text(FAKE_PYTHON)
        fake.chmod(0o755)
        self.environment = {
            "PATH": os.environ["PATH"],
            "PYTHON": str(fake),
            "NOTES": str(self.notes),
            "RETRIEVER_URL": url,
            "GPUS": "2",
        }

    def start(self, *stages: str, **environment: str) -> "subprocess.Popen[str]":
        command = ["bash", "scripts/paper/topiocqa_qwen_bm25.sh", *stages]
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        return subprocess.Popen(command, cwd=self.folder, env=self.environment | environment, **options)  # type: ignore[call-overload,no-any-return]

    def noted(self) -> list[str]:
        return self.notes.read_text().splitlines() if self.notes.exists() else []


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    class Healthy(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()

        def log_message(self, format: str, *arguments: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Healthy)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield World(tmp_path, f"http://127.0.0.1:{server.server_address[1]}")
    server.shutdown()
    server.server_close()


def test_the_stages_run_in_order_and_each_gpu_has_its_part(world: World) -> None:
    output, _ = (process := world.start()).communicate(timeout=60)
    assert process.returncode == 0, output
    noted = [line.removeprefix("convsearch.") for line in world.noted()]
    assert sorted(noted[2:4]) == ["distill 0", "distill 1"]
    assert sorted(noted[6:8]) == ["infer 0", "infer 1"]
    rest = [
        "data_preprocess.topiocqa all",
        "retriever_server.index all",
        "sft all",
        "grpo all",
        "eval.bm25 all",
        "eval.metrics all",
    ]
    assert noted[:2] + noted[4:6] + noted[8:] == rest
    out = world.folder / "outputs" / "paper_topiocqa_qwen_bm25"
    assert (out / "rewrites.jsonl").read_text() == (world.folder / "data" / "topiocqa" / "dev.json").read_text()
    assert (out / "distill" / "in" / "00.json").read_text().count("\n") + (
        out / "distill" / "in" / "01.json"
    ).read_text().count("\n") == 7


def test_a_stage_that_fails_is_the_last(world: World) -> None:
    output, _ = (process := world.start("sft", "grpo", BROKEN="convsearch.sft")).communicate(timeout=60)
    assert process.returncode == 7, output
    assert world.noted() == ["convsearch.sft all"]


@pytest.mark.slow
def test_sigterm_reaches_the_running_stage_and_no_other_begins(world: World) -> None:
    process = world.start("grpo", "infer", SLOW="convsearch.grpo")
    deadline = time.monotonic() + 60
    while not world.noted():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    time.sleep(0.2)
    os.kill(process.pid, signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 143, output
    assert world.noted() == ["convsearch.grpo all", "convsearch.grpo saved"]
