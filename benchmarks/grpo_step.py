"""One GRPO step, ours against TRL's GRPOTrainer: ``python -m benchmarks.grpo_step --size smollm2``.

The same model, prompts, number and length of samples (no end of sequence on either side), KL, arithmetic and threads;
4 prompts x 4 samples, prompts of TopiOCQA turns with three turns of history (the demo's conversations if they are
missing). Each contestant runs in a process of its own, in turns; its first step warms up and does not count, and its
memory is the process's peak (VmHWM). The table shows the seconds of each phase. The last line is
``ratio=… memory_ratio=…`` in fp32: samples per second, ours over TRL's, and peak memory, ours over TRL's. The line
before it has the same in bf16, ``ratio_bf16=… memory_ratio_bf16=…``.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import zipfile
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks import add_work
from benchmarks.grpo_step_work import PHASES, Work
from convsearch.cli import command_parser, run
from convsearch.files import read_jsonl
from convsearch.prompts import render
from convsearch.types import Conversation, Turn

ROOT = Path(__file__).resolve().parents[1]
ORACLES = Path(os.environ.get("CONVSEARCH_ORACLES", ROOT / ".venv" / "oracles"))
TOPIOCQA = ROOT.parent / "shared" / "data" / "topiocqa" / "topiocqa.zip"
CONTESTANTS = ("ours", "unshared", "trl")


def build_parser() -> argparse.ArgumentParser:
    parser = command_parser("benchmarks.grpo_step", __doc__)
    add, folder = parser.add_argument, ROOT / "data" / "models" / "smollm2-135m"
    add("--size", choices=["tiny", "smollm2"], default="smollm2", help="tiny: a random model, 24 tokens per sample")
    add("--model", type=Path, default=folder, help="folder of SmolLM2; made if it is missing")
    add("--prompts", type=int, default=4, help="prompts per step")
    add("--samples", type=int, default=4, help="samples per prompt")
    add("--rounds", type=int, default=2, help="processes of each contestant, in turns")
    add("--steps", type=int, default=1, help="measured steps per process, after one that warms up")
    add("--threads", type=int, default=2, help="threads of every contestant")
    add("--trl_micro_batch", type=int, default=4, help="sequences of TRL's forward-backward passes")
    add("--contestants", nargs="*", choices=CONTESTANTS, default=list(CONTESTANTS), help="who runs")
    add_work(parser)
    # the child process: one contestant, answers in JSON
    add("--contestant", choices=CONTESTANTS, help=argparse.SUPPRESS)
    add("--task", type=Path, help=argparse.SUPPRESS)
    return parser


# --- the work


def conversations(count: int) -> list[Conversation]:
    """One turn of each of ``count`` conversations, after at least three turns; of TopiOCQA, or else the demo."""
    if TOPIOCQA.is_file():
        with zipfile.ZipFile(TOPIOCQA) as archive:
            rows = json.loads(archive.read("topiocqa_dev.json"))
        found = []
        for row in rows:
            pairs = zip(row["Context"][::2], row["Context"][1::2], strict=True)
            history, qid = tuple(Turn(*pair) for pair in pairs), f"{row['Conversation_no']}_{row['Turn_no']}"
            found.append(Conversation(qid, history, row["Question"], ()))
    else:
        lines = read_jsonl(ROOT / "assets" / "demo" / "train.jsonl")
        found = [Conversation.from_record(record) for _, record in lines]
    chosen: dict[str, Conversation] = {}
    for conversation in found:
        if len(conversation.history) >= 3:
            chosen.setdefault(conversation.qid.rpartition("_")[0], conversation)
    return list(chosen.values())[:count]


def make_work(args: argparse.Namespace) -> Work:
    model, tokens = args.model, 64
    if args.size == "tiny":
        from benchmarks.grpo_step_ours import save_tiny_model

        model, tokens = args.work / "tiny_model", 24
        save_tiny_model(model, args.model)
    elif not (model / "config.json").is_file():
        done = subprocess.run([sys.executable, "-m", "data_preprocess.demo_model", "--output", str(model)], check=False)
        if done.returncode:
            raise ValueError(f"{model} is no model folder and data_preprocess.demo_model could not make it")
    prompts = [render(conversation, "paper", 3)[0]["content"] for conversation in conversations(args.prompts)]
    given: dict[str, Any] = {"threads": args.threads, "steps": args.steps, "trl_micro_batch": args.trl_micro_batch}
    return Work(str(model), prompts, args.samples, tokens, **given)


# --- the contestants, each in a process of its own


def run_contestant(name: str, work: Work) -> dict[str, Any]:
    """One contestant's steps and this process's peak memory in MiB."""
    with TemporaryDirectory(prefix="grpo_step_") as folder:
        if name == "trl":
            from benchmarks.grpo_step_trl import run_trl

            steps = run_trl(work, Path(folder))
        else:
            from benchmarks.grpo_step_ours import run_ours

            steps = run_ours(work, name == "ours", Path(folder))
    status = Path("/proc/self/status").read_text(encoding="ascii")
    peak_kb = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))
    return {"steps": steps, "peak_mib": peak_kb / 1024}


# --- the comparison


def ask(name: str, task: Path, threads: int) -> dict[str, Any]:
    """Runs one contestant in a process of its own.

    Raises:
        ValueError: it fails; with the end of its output.
    """
    path = [str(ORACLES), str(ROOT)] if name == "trl" else [str(ROOT)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path), "OMP_NUM_THREADS": str(threads)}
    environment |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, "-m", "benchmarks.grpo_step", "--contestant", name, "--task", str(task)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ValueError(f"the contestant {name} failed:\n{done.stdout[-500:]}{done.stderr[-2500:]}")
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def compare(args: argparse.Namespace) -> str:
    """Runs the contestants in turns, in bf16 and in fp32, prints the tables and returns the last two lines."""
    if "trl" in args.contestants and not (ORACLES / "trl").is_dir():
        print(f"trl: not run: {ORACLES} has no trl; bash scripts/test.sh fast installs it")
        args.contestants.remove("trl")
    args.work.mkdir(parents=True, exist_ok=True)
    work = make_work(args)
    bf16, fp32 = (measure(args, replace(work, dtype=dtype)) for dtype in ("bf16", "fp32"))
    return f"ratio_bf16={bf16[0]:.2f} memory_ratio_bf16={bf16[1]:.2f}\nratio={fp32[0]:.2f} memory_ratio={fp32[1]:.2f}"


def measure(args: argparse.Namespace, work: Work) -> tuple[float, float]:
    """Runs the contestants on one type of arithmetic, prints their table, returns ours over TRL's: speed and memory."""
    task = args.work / f"grpo_step_{args.size}_{work.dtype}.json"
    task.write_text(json.dumps(asdict(work)), encoding="utf-8")
    samples = f"{len(work.prompts)} prompts x {work.samples} samples of {work.tokens} tokens"
    print(f"{Path(work.model).name}, {work.dtype}: {samples}, {work.threads} threads")
    answers: dict[str, list[dict[str, Any]]] = {name: [] for name in args.contestants}
    for number in range(args.rounds):
        for name in args.contestants:
            latest = ask(name, task, args.threads)
            answers[name].append(latest)
            seconds = ", ".join(f"{step['step_s']:.2f}" for step in latest["steps"])
            print(f"round {number + 1}: {name}: {seconds} s per step, {latest['peak_mib']:.0f} MiB", flush=True)
    head = f"{'contestant':<12}{'samples/s':>10}{'step s':>9}{'sampling':>10}{'reference':>11}{'update':>9}"
    print(f"\n{head}{'peak MiB':>10}")
    rate, peak = {}, {}
    for name, runs in answers.items():
        steps = [step for answer in runs for step in answer["steps"]]
        medians = {phase: statistics.median(step[phase] for step in steps) for phase in ("step_s", *PHASES)}
        rate[name] = len(work.prompts) * work.samples / medians["step_s"]
        peak[name] = max(answer["peak_mib"] for answer in runs)
        phases = f"{medians['sample_s']:>10.2f}{medians['reference_s']:>11.2f}{medians['update_s']:>9.2f}"
        print(f"{name:<12}{rate[name]:>10.3f}{medians['step_s']:>9.2f}{phases}{peak[name]:>10.0f}")
    if not {"ours", "trl"} <= rate.keys():
        return float("nan"), float("nan")
    return rate["ours"] / rate["trl"], peak["ours"] / peak["trl"]


def main() -> None:
    args = build_parser().parse_args()
    if args.contestant:
        print(json.dumps(run_contestant(args.contestant, Work(**json.loads(args.task.read_text(encoding="utf-8"))))))
    else:
        print(compare(args))


if __name__ == "__main__":
    run(main)
