"""Kills what runs, at random moments, until the work is done; then compares it with work that nothing disturbed.

    .venv/bin/python tests/faults/kills.py [--kills 50] [--seed 1]        about ten minutes on two cores

The work is the quickstart in small: BM25 index of 100,000 passages by two processes, warm-up data, SFT, GRPO with an
embedded server and validation, inference, search with metrics; a random Llama of two layers. The victim is any process
of the stage: the command, the server that it has started, or a worker. After a dead command the same command starts
again. All files are compared byte by byte, except the times in metrics. Ends with status 1 if anything differs.
"""

import argparse
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import helpers_trainers as helpers  # noqa: E402
import pyarrow.parquet as pq  # noqa: E402
from same_results import untimed  # noqa: E402
from tqdm import tqdm  # noqa: E402

PASSAGES = 100_000
SETTLED = (".lock", "made_of.json", "config.json", ".settings.json", "checksums.json", "latest", "trainer.json")


@dataclass(frozen=True, slots=True)
class Stage:
    """One command of the work."""

    name: str
    module: str
    arguments: list[object]


def make_inputs(folder: Path) -> None:
    """Model, conversations and collection that both runs share."""
    narrow, model = folder / "narrow", folder / "model"
    narrow.mkdir()
    helpers.build_tokenizer(narrow, helpers.training_texts())
    helpers.build_model(narrow, spread=0.02)
    helpers.teach_form(narrow, model)
    rows = helpers.conversation_rows(list(helpers.GOLDS))
    helpers.write_jsonl(folder / "train.json", rows)
    helpers.write_parquet(folder / "train.parquet", helpers.grpo_rows(list(helpers.GOLDS)))
    (folder / "test.trec").write_text("".join(f"{row['qid']} 0 {row['gold_docids'][0]} 1\n" for row in rows))
    draw = random.Random(5)
    words = [f"word{number}" for number in range(5000)]
    golds = [{"id": docid, "contents": f"{town} {aspect} of {town}"} for (town, aspect), docid in helpers.GOLDS.items()]
    others = [{"id": f"p{n}", "contents": " ".join(draw.choices(words, k=40))} for n in range(PASSAGES)]
    helpers.write_jsonl(folder / "collection.jsonl", golds + others)


def stages(inputs: Path, out: Path) -> list[Stage]:
    model, index = inputs / "model", out / "index"
    sampling: list[object] = ["--prompt_style", "compact", "--device", "cpu", "--threads", 1, "--temperature", 1]
    distill: list[object] = ["--input_path", inputs / "train.json", "--output_dir", out / "distill", "--k", 6]
    distill += ["--max_tokens", 40, "--rank_limit", 100, "--batch_size", 8, "--retriever_url", f"embedded:{index}"]
    infer: list[object] = ["--input_path", inputs / "train.json", "--output_path", out / "rewrites.jsonl", "--n", 4]
    infer += ["--max_tokens", 40, "--batch_size", 8]
    sft = helpers.sft_overrides(
        model,
        out / "distill" / "sft.parquet",
        out / "sft",
        total_training_steps=40,
        trainer__save_freq=5,
        max_length=1024,
        train_batch_size=4,
        micro_batch_size_per_gpu=4,
    )
    validated = {
        "data__val_files": inputs / "train.parquet",
        "trainer__test_freq": 5,
        "trainer__best_metric": "val_mrr",
    }
    grpo = helpers.grpo_overrides(
        out / "sft" / "model",
        inputs / "train.parquet",
        out / "grpo",
        f"embedded:{index}",
        total_training_steps=30,
        trainer__save_freq=5,
        **validated,
    )
    search: list[object] = ["--index_dir_path", index, "--test_file_path", out / "rewrites.jsonl", "--fuse", "rrf"]
    search += ["--trec_gold_qrel_file_path", inputs / "test.trec", "--qrel_output_dir", out]
    search += ["--output_trec_file", "run.trec"]
    collection: list[object] = ["bm25", "--collection", inputs / "collection.jsonl", "--output", index]
    return [
        Stage("index", "retriever_server.index", [*collection, "--processes", 2, "--quiet"]),
        Stage("distill", "convsearch.distill", ["--model_name_or_path", model, *distill, *sampling]),
        Stage("sft", "convsearch.sft", list(sft)),
        Stage("grpo", "convsearch.grpo", list(grpo)),
        Stage("infer", "convsearch.infer", ["--model_name_or_path", out / "grpo" / "model", *infer, *sampling]),
        Stage("eval", "eval.bm25", search),
    ]


def family(pid: int) -> list[int]:
    """The process and its descendants."""
    found = [pid]
    for parent in found:
        try:
            for children in Path(f"/proc/{parent}/task").glob("*/children"):
                found += [int(child) for child in children.read_text().split()]
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found


def role(pid: int) -> str:
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")
    except (FileNotFoundError, ProcessLookupError):
        return "gone"
    return words[words.index("-m") + 1] if "-m" in words else "worker"


def run(stage: Stage, log: Path) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-m", stage.module, *map(str, stage.arguments)]
    with log.open("ab") as file:
        return subprocess.Popen(command, cwd=ROOT, env=helpers.environment(), stdout=file, stderr=file)


def last_line(log: Path) -> str:
    return log.read_text(errors="replace").strip().splitlines()[-1]


def undisturbed(work: list[Stage], log: Path) -> dict[str, float]:
    """Runs the stages; returns their seconds."""
    seconds = {}
    for stage in work:
        start = time.monotonic()
        if run(stage, log).wait():
            raise SystemExit(f"{stage.name} failed without any fault: {last_line(log)}")
        seconds[stage.name] = time.monotonic() - start
    return seconds


def disturbed(work: list[Stage], seconds: dict[str, float], kills: int, seed: int, log: Path) -> Counter[str]:
    """Runs the stages under ``kills`` kills, shared among them by their seconds; returns the victims.

    A command that has ended before its last kill starts again: finished work must not change either.
    """
    draw, victims, due, total = random.Random(seed), Counter[str](), 0.0, sum(seconds.values())
    with tqdm(total=kills, desc="kills", unit="kill") as bar:
        for stage in work:
            due += kills * seconds[stage.name] / total
            process = run(stage, log)
            while victims.total() < round(due):
                time.sleep(draw.uniform(0.1, 0.6 * seconds[stage.name]))
                if process.poll() is None:
                    victim = draw.choice(family(process.pid))
                    victims[f"{stage.name}: {role(victim)}"] += 1
                    os.kill(victim, signal.SIGKILL)
                    bar.update()
                    time.sleep(0.5)
                if process.poll() is not None:
                    process = run(stage, log)
            if process.wait() and run(stage, log).wait():  # the last kill may have hit it
                raise SystemExit(f"{stage.name} fails: {last_line(log)}")
    return victims


def contents(folder: Path) -> Iterator[tuple[str, Any]]:
    """(name, what is compared) of each file that the work leaves."""
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = path.relative_to(folder).as_posix()
        if path.name == "metrics.jsonl":
            yield name, [untimed(json.loads(line)) for line in path.read_text().splitlines()]
        elif path.suffix == ".parquet":
            yield name, pq.read_table(path).to_pylist()
        elif not name.endswith(SETTLED):
            yield name, hashlib.sha256(path.read_bytes()).hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, help="how many")
    parser.add_argument("--seed", type=int, default=1, help="of moments and victims")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_inputs(folder)
        whole, killed = folder / "whole", folder / "killed"
        seconds = undisturbed(stages(folder, whole), folder / "whole.log")
        print("undisturbed:", ", ".join(f"{stage} {took:.1f} s" for stage, took in seconds.items()), flush=True)
        victims = disturbed(stages(folder, killed), seconds, args.kills, args.seed, folder / "killed.log")
        for victim, count in sorted(victims.items()):
            print(f"killed {count:>3} x {victim}")
        left, right = dict(contents(whole)), dict(contents(killed))
        different = [name for name in sorted(left.keys() | right.keys()) if left.get(name) != right.get(name)]
        compared = f"{len(left.keys() | right.keys())} files compared, different: {different or 'none'}"
        print(f"{victims.total()} kills, {compared}")
        sys.exit(bool(different))


if __name__ == "__main__":
    main()
