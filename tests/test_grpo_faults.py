"""Real trainer processes that are killed, starved of their server, and run out of disk: nothing is lost, and what goes
on is the same run.

1. After kill -9 (at any moment, in the middle of an update, in the middle of a checkpoint), SIGTERM or Ctrl-C the same
   command ends with the metrics, rollouts and weights of a run that nothing disturbed. SIGTERM saves first.
2. A server that is killed and comes back is waited for. One that stays dead, and a full disk, end in one sentence with
   status 2; with the server or the room back, the run goes on likewise.
3. A damaged checkpoint is named, with the remedy.
"""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import helpers_trainers as helpers
import pytest

from convsearch import grpo, infer, sft
from convsearch.runs import checkpoint, rollouts
from convsearch.runs.tracking import read_metrics

pytestmark = pytest.mark.slow

STEPS = 30
SAME = (
    "step",
    "loss",
    "policy_loss",
    "llds",
    "kl",
    "entropy",
    "reward",
    "grad_norm",
    "mrr",
    "response_tokens",
    "spread_rate",
    "val_reward",
    "val_mrr",
)


class Job:
    """One command, run any number of times on one folder."""

    def __init__(self, model: Path, parquet: Path, run_dir: Path, url: str, **changed: Any):
        options = {
            "train_batch_size": 8,
            "ppo_mini_batch_size": 4,
            "n": 8,
            "actor_rollout_ref__rollout__n_train": 4,
            "actor_rollout_ref__actor__ppo_epochs": 2,
            "actor_rollout_ref__actor__llds_coef": 0.2,
            "algorithm__filter_groups__enable": True,
            "total_training_steps": STEPS,
            "trainer__save_freq": 3,
            "data__val_files": parquet,
            "trainer__test_freq": 6,
            "trainer__best_metric": "val_reward",
        }
        self.run_dir = run_dir
        self.arguments = helpers.grpo_overrides(model, parquet, run_dir, url, **(options | changed))

    def start(self) -> "subprocess.Popen[str]":
        return helpers.start("convsearch.grpo", self.arguments)

    def finish(self) -> tuple[int, str]:
        return helpers.finish("convsearch.grpo", self.arguments)

    def steps_logged(self) -> int:
        return len(read_metrics(self.run_dir))

    def saving(self) -> bool:
        """Whether the weights of a checkpoint are being written."""
        folders = [self.run_dir / f".tmp-global_step_{step}" for step in range(3, STEPS + 1, 3)]
        return any(
            (folder / name).exists() for folder in folders for name in ("model.safetensors.tmp", "model.safetensors")
        )

    def updating(self, since_s: float = 0) -> bool:
        """Whether the step that comes next in the metrics has its samples on disk, written after ``since_s``
        (time.time)."""
        samples = rollouts.path_of(self.run_dir, self.steps_logged())
        return samples.is_file() and samples.stat().st_mtime > since_s


def assert_same_run(run_dir: Path, unbroken: Path) -> None:
    left, right = (
        [{name: line.get(name) for name in SAME} for line in read_metrics(folder)] for folder in (run_dir, unbroken)
    )
    assert left == right
    assert len(left) == STEPS
    for step in range(STEPS):
        assert rollouts.load(run_dir, step) == rollouts.load(unbroken, step), step
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (run_dir / "model" / name).read_bytes() == (unbroken / "model" / name).read_bytes()
    assert (run_dir / "best").read_text() == (unbroken / "best").read_text()
    kept = {f"global_step_{STEPS - 3}", f"global_step_{STEPS}", (unbroken / "best").read_text().strip()}
    assert {path.name for path in run_dir.glob("*global_step_*")} == kept


@pytest.fixture(scope="module")
def unbroken(form_llama: Path, toy_parquet: Path, toy_server: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every key is on that makes a step depend on more than its batch: subset, refill, two epochs, LLDS, the best."""
    job = Job(form_llama, toy_parquet, tmp_path_factory.mktemp("unbroken") / "run", toy_server)
    status, output = job.finish()
    assert status == 0, output
    metrics = read_metrics(job.run_dir)
    assert any(len(rollouts.load(job.run_dir, step)) > 8 * 8 for step in range(STEPS))  # other prompts have followed
    assert any(line["llds"] > 0 for line in metrics)
    return job.run_dir


def wait_for(condition: Callable[[], bool], process: "subprocess.Popen[str]", what: str) -> None:
    deadline = time.monotonic() + 300
    while not condition():
        assert process.poll() is None, f"ended while waiting for {what}: {process.communicate()[0]}"
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        time.sleep(0.002)


def end(process: "subprocess.Popen[str]", number: signal.Signals) -> str:
    assert process.poll() is None, process.communicate()[0]
    os.kill(process.pid, number)
    output, _ = process.communicate(timeout=60)
    return output


def stop_in_an_update(job: Job, process: "subprocess.Popen[str]", since_s: float) -> None:
    """Leaves the process stopped between the samples of a step and its line in the metrics."""
    while True:
        wait_for(partial(job.updating, since_s), process, "an update")
        os.kill(process.pid, signal.SIGSTOP)
        time.sleep(0.02)
        if job.updating(since_s):
            return
        os.kill(process.pid, signal.SIGCONT)


def servers_of(index: Path) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = path.read_bytes()
        except OSError:
            continue
        if b"retriever_server" in command and str(index).encode() in command:
            found.append(int(path.parent.name))
    return found


def test_kill_dash_nine_five_times_in_a_row(
    form_llama: Path, toy_parquet: Path, toy_index: Path, unbroken: Path, tmp_path: Path
) -> None:
    index = shutil.copytree(toy_index, tmp_path / "index")  # its own, so that its servers can be told from others
    job, draw = Job(form_llama, toy_parquet, tmp_path / "run", f"embedded:{index}"), random.Random(20)
    torn = 0

    def sampled_since(start_s: float) -> bool:
        return any(path.stat().st_mtime > start_s for path in (job.run_dir / "rollouts").glob("*.parquet"))

    for attempt in range(5):
        start_s, process = time.time(), job.start()
        if attempt == 0:
            time.sleep(draw.uniform(0.5, 3))  # while it loads, or starts its server
        else:
            wait_for(partial(sampled_since, start_s), process, "the first step")
            if attempt == 2:
                stop_in_an_update(job, process, start_s)
            elif attempt == 3:
                wait_for(job.saving, process, "a checkpoint")
            else:
                if attempt == 4:
                    wait_for(lambda: bool(checkpoint.checkpoints(job.run_dir)), process, "a checkpoint that is whole")
                time.sleep(draw.uniform(0, 0.4))
        end(process, signal.SIGKILL)
        assert process.returncode == -signal.SIGKILL
        torn += job.updating(start_s)
        assert job.steps_logged() < STEPS
    assert torn > 0  # at least one step was broken off behind its samples
    (job.run_dir / "rollouts" / "000000.parquet.tmp-1").touch()
    (job.run_dir / ".tmp-global_step_2").mkdir()
    status, output = job.finish()
    assert status == 0, output
    assert f"resumed from {job.run_dir / 'global_step_'}" in output
    assert_same_run(job.run_dir, unbroken)
    assert not list(job.run_dir.glob("**/*tmp*"))
    deadline = time.monotonic() + 20
    while servers_of(index) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert servers_of(index) == []  # the killed trainers' servers are gone too
    status, output = job.finish()
    assert status == 0
    assert f"all {STEPS} steps are done already" in output
    assert_same_run(job.run_dir, unbroken)


def test_sigterm_and_ctrl_c_in_the_middle_of_a_step(
    form_llama: Path, toy_parquet: Path, toy_server: str, unbroken: Path, tmp_path: Path
) -> None:
    job = Job(form_llama, toy_parquet, tmp_path / "run", toy_server)
    process = job.start()
    wait_for(lambda: job.steps_logged() >= 4 and job.updating(), process, "step 5")
    output = end(process, signal.SIGTERM)
    assert process.returncode == 128 + signal.SIGTERM
    assert "Traceback" not in output
    saved = checkpoint.latest(job.run_dir)
    assert saved is not None
    assert saved[0] == job.steps_logged() >= 5  # the running step was finished and saved
    assert f"stopped: SIGTERM after step {saved[0]} of {STEPS}, which is saved" in output
    process = job.start()
    wait_for(lambda: job.steps_logged() >= 8 and job.updating(), process, "step 9")
    output = end(process, signal.SIGINT)
    assert process.returncode == 130
    assert "Traceback" not in output
    assert "run the same command again" in output
    status, output = job.finish()
    assert status == 0, output
    assert_same_run(job.run_dir, unbroken)


@contextmanager
def server(index: Path, port: int = 0) -> Iterator[tuple["subprocess.Popen[str]", str]]:
    command = [sys.executable, "-m", "retriever_server", "--index_path", str(index), "--port", str(port)]
    process = subprocess.Popen(command, cwd=helpers.ROOT, env=helpers.environment(), stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        ready = process.stdout.readline()
        assert ready.startswith("retriever_server: http://"), ready
        yield process, ready.split()[1]
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def test_a_server_that_dies_ends_in_a_sentence_and_loses_nothing(
    form_llama: Path, toy_parquet: Path, toy_index: Path, unbroken: Path, tmp_path: Path
) -> None:
    with server(toy_index) as (ours, url):
        job = Job(form_llama, toy_parquet, tmp_path / "run", url, retriever__max_wait_s=3)
        process = job.start()
        wait_for(lambda: job.steps_logged() >= 7, process, "step 7")
        ours.kill()
        output, _ = process.communicate(timeout=60)
    error = helpers.one_sentence(process.returncode, output)
    assert f"the retriever at {url} did not answer /rank" in error
    assert "python -m retriever_server" in error
    logged = read_metrics(job.run_dir)
    assert len(logged) >= 7
    assert [line["reward"] for line in logged] == [
        line["reward"] for line in read_metrics(unbroken)[: len(logged)]
    ]  # no zero rewards
    assert (job.run_dir / "global_step_6" / "trainer.json").is_file()
    with server(toy_index, int(url.rsplit(":", 1)[1])):
        job.arguments = [argument.replace("max_wait_s=3", "max_wait_s=600") for argument in job.arguments]
        status, output = job.finish()
    assert status == 0, output
    assert "resumed from" in output
    assert_same_run(job.run_dir, unbroken)


def test_kill_dash_nine_of_the_server_and_a_restart_go_unnoticed(
    form_llama: Path, toy_parquet: Path, toy_index: Path, unbroken: Path, tmp_path: Path
) -> None:
    """The trainer waits for the server that comes back under its address, asks again, and no reward is lost or
    invented."""
    port = 0
    job: Job | None = None
    process: subprocess.Popen[str] | None = None
    for step in (3, 12, 21, STEPS):
        with server(toy_index, port) as (ours, url):
            if job is None or process is None:
                port = int(url.rsplit(":", 1)[1])
                job = Job(form_llama, toy_parquet, tmp_path / "run", url)
                process = job.start()
            if step == STEPS:
                output, _ = process.communicate(timeout=300)
                break
            wait_for(lambda j=job, s=step: j.steps_logged() >= s, process, f"step {step}")  # type: ignore[misc]
            ours.kill()
        time.sleep(1)  # with nobody at the address
        assert process.poll() is None
    assert process is not None
    assert job is not None
    assert process.returncode == 0, output
    assert_same_run(job.run_dir, unbroken)


@contextmanager
def small_disk(folder: Path, kilobytes: int) -> Iterator[Callable[[int], None]]:
    """A file system of that size at ``folder``; yields what changes the size. Needs the right to mount."""

    def mount(*arguments: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(["mount", *arguments, str(folder)], capture_output=True, text=True)

    folder.mkdir()
    if shutil.which("mount") is None or (done := mount("-t", "tmpfs", "-o", f"size={kilobytes}k", "none")).returncode:
        reason = "there is no mount command" if shutil.which("mount") is None else done.stderr.strip()
        pytest.skip(f"a full disk needs a small file system of its own: {reason}")
    try:
        yield lambda size: mount("-o", f"remount,size={size}k").check_returncode()
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


FULL = "No space left on device"


def test_a_full_disk_ends_in_a_sentence_wherever_it_strikes(
    form_llama: Path, toy_parquet: Path, toy_server: str, unbroken: Path, tmp_path: Path
) -> None:
    """By its size the disk fills up in the rollouts, the tokenizer, the weights or the optimizer's state."""
    struck: set[str] = set()
    for kilobytes in (4, 12, 44, 60, 72, 100, 640, 1300, 1900, 3200):
        with small_disk(tmp_path / f"disk{kilobytes}", kilobytes) as resize:
            job = Job(form_llama, toy_parquet, tmp_path / f"disk{kilobytes}" / "run", toy_server)
            error = helpers.one_sentence(*helpers.call(grpo.main, job.arguments))
            assert FULL in error
            assert "nothing that was complete is lost" in error
            assert str(job.run_dir) in error
            struck |= {name for name in ("rollouts", "global_step", "model.safetensors", "optimizer") if name in error}
            logged = read_metrics(job.run_dir)
            right = read_metrics(unbroken)
            assert [line["loss"] for line in logged] == [line["loss"] for line in right[: len(logged)]]
            resize(20_000)
            if kilobytes in (12, 72, 1900):
                status, output = helpers.call(grpo.main, job.arguments)
                assert status == 0, output
                assert_same_run(job.run_dir, unbroken)
    assert len(struck) == 4, struck


def test_a_full_disk_for_the_other_commands(form_llama: Path, tmp_path: Path) -> None:
    pairs = [
        (f"q{number}", helpers.question(*pair), helpers.answer(*pair)) for number, pair in enumerate(helpers.GOLDS)
    ]
    train = helpers.write_parquet(tmp_path / "sft.parquet", helpers.sft_rows(pairs))
    turns = helpers.conversation_rows(list(helpers.GOLDS))
    rows = [row | {"qid": f"{row['qid']}_{copy}", "answer": "long " * 100} for copy in range(20) for row in turns]
    source = helpers.write_jsonl(tmp_path / "dev.json", rows)
    for kilobytes, form in ((12, "auto"), (600, "auto"), (1000, "auto"), (600, "dcp"), (1500, "dcp")):
        with small_disk(tmp_path / f"sft{kilobytes}{form}", kilobytes) as resize:
            options = {"trainer__save_freq": 1, "trainer__checkpoint_format": form}
            arguments = helpers.sft_overrides(form_llama, train, tmp_path / f"sft{kilobytes}{form}" / "run", **options)
            assert FULL in helpers.one_sentence(*helpers.call(sft.main, arguments))
            resize(20_000)
            assert helpers.call(sft.main, arguments)[0] == 0
    with small_disk(tmp_path / "infer", 100) as resize:
        output = tmp_path / "infer" / "out.jsonl"
        fixed = ["--prompt_style", "compact", "--max_tokens", 20, "--device", "cpu", "--threads", 1]
        command = ["--model_name_or_path", form_llama, "--input_path", source, "--output_path", output, *fixed]
        assert FULL in helpers.one_sentence(*helpers.call(infer.main, command))
        there = [line for line in output.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]
        assert len(there) > 20
        resize(20_000)
        status, printed = helpers.call(infer.main, command)
        assert status == 0
        assert f"{len(there)} of {len(rows)} lines are there already" in printed
        assert output.read_bytes().startswith(b"".join(there))
        assert [line["qid"] for line in helpers.read_jsonl(output)] == [row["qid"] for row in rows]


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "trainer.json", "config.json"])
def test_a_truncated_checkpoint_is_one_sentence(
    name: str, form_llama: Path, toy_parquet: Path, toy_server: str, unbroken: Path, tmp_path: Path
) -> None:
    run_dir = shutil.copytree(unbroken, tmp_path / "run")
    shutil.rmtree(run_dir / "model")
    job = Job(form_llama, toy_parquet, run_dir, toy_server)
    damaged = run_dir / f"global_step_{STEPS}" / name
    damaged.write_bytes(damaged.read_bytes()[: damaged.stat().st_size // 2])
    error = helpers.one_sentence(
        *(job.finish() if name == "model.safetensors" else helpers.call(grpo.main, job.arguments))
    )
    assert f"global_step_{STEPS} is damaged: {name}" in error
    assert "delete the folder to go on from the one before it" in error
    shutil.rmtree(damaged.parent)
    status, output = helpers.call(grpo.main, job.arguments)
    assert status == 0, output
    assert_same_run(run_dir, unbroken)
