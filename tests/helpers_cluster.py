"""Ray and vLLM for the tests: packages from a folder of their own, in processes of their own.

``python tests/helpers_cluster.py --kills 10`` kills a process at random in each of ten runs, and compares them with an unbroken one.
"""

import argparse
import importlib.util
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

import helpers_trainers as helpers  # noqa: E402

FOLDER = ROOT / ".venv" / "vllm"  # where scripts/test.sh puts them
KINDS = {
    "rank": "ray::PolicyProcess",
    "sampler": "ray::SamplerWorker",
    "server": "-m retriever_server",
    "raylet": "/raylet/raylet ",
    "gcs": "/gcs/gcs_server ",
}  # what the command lines of a run's processes hold
SAME = ("loss", "policy_loss", "kl", "entropy", "reward", "grad_norm", "response_tokens")


def why_absent() -> str | None:
    """Why Ray and vLLM cannot be used here; None where they can."""
    if (FOLDER / "ray").is_dir() or importlib.util.find_spec("ray"):
        return None
    return f"Ray and vLLM are not in {FOLDER}: scripts/test.sh puts them there"


def environment() -> dict[str, str]:
    beside = "" if importlib.util.find_spec("vllm") else str(FOLDER)  # the extra "gpu" has brought the real one
    paths = [str(ROOT), str(ROOT / "tests"), beside, os.environ.get("PYTHONPATH", "")]
    quiet = {
        "RAY_USAGE_STATS_ENABLED": "0",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "OMP_WAIT_POLICY": "PASSIVE",
        "TOKENIZERS_PARALLELISM": "false",
    }
    return helpers.environment() | quiet | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}


def start(arguments: Sequence[object]) -> "subprocess.Popen[str]":
    """``python -m convsearch.grpo arguments``; all it prints goes to a file, for workers that outlive it would hold a pipe open."""
    descriptor, name = tempfile.mkstemp(prefix="cluster-", suffix=".log")
    command = [sys.executable, "-m", "convsearch.grpo", *map(str, arguments)]
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment(), stdout=descriptor, stderr=subprocess.STDOUT, text=True
    )
    os.close(descriptor)
    process.log = Path(name)  # type: ignore[attr-defined]
    return process


def end(process: "subprocess.Popen[str]", limit_s: float = 1500) -> tuple[int, str]:
    """(exit status, all it has printed)."""
    status = process.wait(timeout=limit_s)
    log: Path = process.log  # type: ignore[attr-defined]
    output = log.read_text(errors="replace")
    log.unlink()
    return status, output


def call(function: str, *arguments: object) -> Any:
    """A function of this module in a process that has vLLM; what it returns comes back through JSON."""
    code = f"import helpers_cluster, json, sys; print('\\n' + json.dumps(helpers_cluster.{function}(*sys.argv[1:])))"
    options: dict[str, Any] = {"cwd": ROOT, "env": environment(), "capture_output": True, "text": True, "timeout": 300}
    done = subprocess.run([sys.executable, "-c", code, *map(str, arguments)], **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def vllm_model(folder: Path, kind: str = "llama", spread: float = 0.15) -> Path:
    """A tiny model whose heads are large enough for vLLM's CPU attention."""
    folder.mkdir(parents=True, exist_ok=True)
    helpers.build_tokenizer(folder, helpers.training_texts())
    helpers.build_model(folder, kind, spread, head_size=32)
    return folder


def vllm_report(folder: str) -> dict[str, Any]:
    """What VllmSampler does with a model, against our policy on the same weights: before an update of them, with stale ones, and after."""
    import torch

    from convsearch.model.batch import Branch, Tree, collate
    from convsearch.model.loading import encode_chat, load_model, load_tokenizer, stop_token_ids
    from convsearch.policy.policy import LocalPolicy
    from convsearch.sampling.base import SamplingConfig
    from convsearch.sampling.vllm import VllmSampler

    tokenizer, model = load_tokenizer(folder), load_model(folder)
    stop_ids = (*stop_token_ids(model, tokenizer), *range(40, 50))
    sampler = VllmSampler(
        folder, tokenizer, SamplingConfig(0.7, max_tokens=24, batch_size=16), stop_ids, model_len=160, device="cpu"
    )
    texts = ("rome", "where is oslo? " * 5, "lima, its food?")
    prompts = [encode_chat(tokenizer, ({"role": "user", "content": text},)) for text in texts]
    policy = LocalPolicy(model, torch.device("cpu"), temperature=0.7, lr=1e-2)

    def gap() -> float:
        samples = helpers.flat(sampler.generate(prompts, 4, seed=3))
        branches = [Branch(sample.token_ids, 1.0, 0.1, sample.logprobs) for sample in samples]
        micro = collate([Tree(prompt, tuple(branches[4 * p : 4 * p + 4])) for p, prompt in enumerate(prompts)])
        assert micro.sampler_logprobs_R is not None
        return float((policy.logprobs(micro) - micro.sampler_logprobs_R).abs().mean())

    report: dict[str, Any] = {"before": gap(), "stale": [], "after": []}
    for version in (1, 2):
        branch = Branch(tuple(range(60, 70)), 1.0, 0.1)
        policy.forward_backward(
            collate([Tree(prompts[0], (branch,))]), lambda micro, logprobs_R, _: (-logprobs_R.sum(), {})
        )
        policy.optim_step(1e-2)
        report["stale"].append(gap())
        sampler.load_weights(policy, version)
        report["after"].append(gap())
    samples = helpers.flat(sampler.generate(prompts, 4, seed=3))
    report["versions"] = sorted({sample.weights_version for sample in samples})
    report["again"] = helpers.flat(sampler.generate(prompts, 4, seed=3)) == samples
    report["alone"] = [
        helpers.flat(sampler.generate([prompt], 4, seed=3, keys=[p])) == samples[4 * p : 4 * p + 4]
        for p, prompt in enumerate(prompts)
    ]
    report["other_seed"] = helpers.flat(sampler.generate(prompts, 4, seed=4)) == samples
    report["different"] = len({sample.token_ids for sample in samples})
    report["ends"] = [
        (
            sample.finish_reason,
            len(sample.token_ids),
            sample.token_ids[-1] in stop_ids,
            any(token in stop_ids for token in sample.token_ids[:-1]),
        )
        for sample in samples
    ]
    report["texts"] = all(
        sample.text == tokenizer.decode(list(sample.token_ids[: -1 if sample.finish_reason == "stop" else None]))
        for sample in samples
    )
    parts = sampler.stream(prompts, 4, seed=3)  # left after the first part: the rest must not come back later
    next(parts)
    parts.close()
    report["left"] = helpers.flat(sampler.generate(prompts, 4, seed=3)) == samples
    return report


def family(pid: int) -> dict[int, str]:
    """Command lines of the process and all its descendants."""
    parents, lines = {}, {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                parents[int(folder.name)] = int((folder / "stat").read_text().rsplit(")", 1)[1].split()[1])
                lines[int(folder.name)] = (folder / "cmdline").read_text().replace("\0", " ")
            except (OSError, IndexError):
                continue  # it has just ended
    found, before = {pid}, 0
    while len(found) > before:
        before = len(found)
        found |= {child for child, parent in parents.items() if parent in found}
    return {each: lines[each] for each in found if each in lines}


def kill(pid: int, kind: str, draw: random.Random) -> bool:
    """kill -9 of one process of the run; False where there is none of the kind at the moment."""
    victims = (
        [pid]
        if kind == "driver"
        else [each for each, line in family(pid).items() if KINDS[kind] in line and each != pid]
    )
    if not victims:
        return False
    os.kill(draw.choice(sorted(victims)), signal.SIGKILL)
    return True


def wait_until(condition: Callable[[], bool], process: "subprocess.Popen[str]", limit_s: float = 1500) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        assert process.poll() is None, end(process)
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


def steps_logged(run_dir: Path) -> int:
    from convsearch.runs.tracking import read_metrics

    return len(read_metrics(run_dir)) if (run_dir / "metrics.jsonl").is_file() else 0


def kill_at_random(
    arguments: Sequence[object], run_dir: Path, steps: int, kind: str, draw: random.Random
) -> dict[str, Any]:
    """One run with one kill at a random moment, and a second command where the first one has ended with it."""
    begun, at, pause_s = time.monotonic(), draw.randrange(steps - 4), 0.3 * draw.random()
    process = start(arguments)
    wait_until(lambda: steps_logged(run_dir) > at, process)
    time.sleep(pause_s)
    struck = process.poll() is None and kill(process.pid, kind, draw)
    status, output = end(process)
    restarts, commands, ended = output.count("starting the workers again"), 1, ""
    if status != 0:
        commands, ended = 2, f"status {status}: {[line for line in output.splitlines() if line.strip()][-1][-200:]}"
        status, again = end(start(arguments))
        if status != 0:
            print(output, again, sep="\n----\n", file=sys.stderr)
    seconds = round(time.monotonic() - begun, 1)
    report = {
        "kind": kind,
        "step": at,
        "struck": struck,
        "commands": commands,
        "restarts": restarts,
        "status": status,
        "seconds": seconds,
    }
    return report | ({"ended": ended} if ended else {})


def curves(run_dir: Path) -> list[dict[str, float]]:
    from convsearch.runs.tracking import read_metrics

    return [{name: line[name] for name in SAME} for line in read_metrics(run_dir)]


def largest_difference(left: Sequence[dict[str, float]], right: Sequence[dict[str, float]]) -> float:
    """Over all steps and figures, relative to the larger of the figure and 1e-3."""
    assert len(left) == len(right), (len(left), len(right))
    return max(
        abs(a[name] - b[name]) / max(abs(a[name]), 1e-3) for a, b in zip(left, right, strict=True) for name in SAME
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=10, help="runs, each with one kill")
    parser.add_argument("--first", type=int, default=0, help="number of the first of them")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument(
        "--kind",
        choices=["driver", *KINDS],
        default=None,
        help="what is killed; left out: each kind once, then at random",
    )
    parser.add_argument("--sampler", choices=["vllm", "hf"], default="vllm")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--folder",
        type=Path,
        default=None,
        help="where the runs are; one that has the unbroken run already is gone on with",
    )
    options = parser.parse_args()
    folder: Path = options.folder or Path(tempfile.mkdtemp(prefix="kills-"))

    def arguments(run_dir: Path) -> list[str]:
        changed = {
            "cluster": "cpu2",
            "actor_rollout_ref__rollout__name": options.sampler,
            "total_training_steps": options.steps,
        }
        changed |= {"trainer__save_freq": 4}
        return helpers.grpo_overrides(
            folder / "form", folder / "train.parquet", run_dir, f"embedded:{folder / 'index'}", **changed
        )

    if not (folder / "unbroken" / "model" / "model.safetensors").is_file():
        helpers.teach_form(vllm_model(folder / "model", spread=0.02), folder / "form")
        helpers.write_parquet(folder / "train.parquet", helpers.grpo_rows(list(helpers.GOLDS)))
        helpers.build_index(folder)
        status, output = end(start(arguments(folder / "unbroken")))
        assert status == 0, output
    right, kinds = curves(folder / "unbroken"), ["driver", *KINDS]
    for number in range(options.first, options.first + options.kills):
        draw, run_dir = random.Random(1000 * options.seed + number), folder / f"run{number}"
        kind = options.kind or (kinds[number] if number < len(kinds) else draw.choice(kinds))
        report = kill_at_random(arguments(run_dir), run_dir, options.steps, kind, draw)
        difference = largest_difference(right, curves(run_dir)) if report["status"] == 0 else None
        print(json.dumps({"run": number, **report, "difference": difference}), flush=True)


if __name__ == "__main__":
    main()
