"""A long GRPO run on a tiny model whose retrieval server is killed again and again: do memory and descriptors grow?

    .venv/bin/python tests/faults/long_run.py [--minutes 120] [--kill_minutes 10]

Every ten seconds it reads anonymous memory, open descriptors and threads of the trainer and of the server, and fits a
line to each after the first fifth of the time (for the server: of its longest life). It prints the slope per hour with
its standard error. Ends with status 1 if a slope is above zero by more than three standard errors and adds more than 2%
(memory) or one (descriptors, threads) in an hour, or if the trainer ends by itself.
"""

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import helpers_trainers as helpers  # noqa: E402
from scipy.stats import linregress  # noqa: E402

Reading = tuple[float, float, float, float]  # hours, MiB of anonymous memory, descriptors, threads
SIGNS = ("anonymous memory, MiB", "descriptors", "threads")
PORT = 8123


def read(pid: int, start: float) -> Reading:
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":" in line)
    memory = float(status["RssAnon"].split()[0]) / 1024
    descriptors = len(os.listdir(f"/proc/{pid}/fd"))
    return (time.monotonic() - start) / 3600, memory, float(descriptors), float(status["Threads"])


def serve(index: Path, log: Path) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-m", "retriever_server", "--index_path", str(index), "--port", str(PORT)]
    with log.open("ab") as file:
        return subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=file)


def judge(name: str, readings: Sequence[Reading]) -> bool:
    """Prints the slopes; whether one is too large."""
    late = [reading for reading in readings if reading[0] >= readings[0][0] + (readings[-1][0] - readings[0][0]) / 5]
    grows = False
    for column, sign in enumerate(SIGNS, start=1):
        values = [reading[column] for reading in late]
        line = linregress([reading[0] for reading in late], values)
        allowed = max(1.0, 0.02 * values[0]) if column == 1 else 1.0
        bad = line.slope > 3 * line.stderr and line.slope > allowed
        grows |= bad
        verdict = "GROWS" if bad else "flat"
        print(
            f"{name:<8} {sign:<22} {values[0]:>8.1f} -> {values[-1]:>8.1f}  "
            f"slope {line.slope:+8.2f} ± {line.stderr:.2f} per hour  {verdict}  ({len(late)} readings)"
        )
    return grows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=120, help="length of the run")
    parser.add_argument("--kill_minutes", type=float, default=10, help="minutes between two kills of the server")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        narrow, model = folder / "narrow", folder / "model"
        narrow.mkdir()
        helpers.build_tokenizer(narrow, helpers.training_texts())
        helpers.build_model(narrow, spread=0.02)
        helpers.teach_form(narrow, model)
        index = helpers.build_index(folder)
        rows = helpers.write_parquet(folder / "train.parquet", helpers.grpo_rows(list(helpers.GOLDS)))
        arguments = helpers.grpo_overrides(
            model, rows, folder / "run", f"http://127.0.0.1:{PORT}", total_training_steps=10**6, trainer__save_freq=500
        )
        server = serve(index, folder / "server.log")
        with (folder / "trainer.log").open("ab") as log:
            command = [sys.executable, "-m", "convsearch.grpo", *arguments]
            trainer = subprocess.Popen(command, cwd=ROOT, env=helpers.environment(), stdout=log, stderr=log)
        start, killed, lives = time.monotonic(), time.monotonic(), [list[Reading]()]
        of_trainer: list[Reading] = []
        time.sleep(20)
        while time.monotonic() - start < 60 * args.minutes:
            if trainer.poll() is not None:
                sys.exit(f"the trainer ended by itself: {(folder / 'trainer.log').read_text()[-2000:]}")
            of_trainer.append(read(trainer.pid, start))
            lives[-1].append(read(server.pid, start))
            if time.monotonic() - killed > 60 * args.kill_minutes:
                server.send_signal(signal.SIGKILL)
                server.wait()
                server, killed = serve(index, folder / "server.log"), time.monotonic()
                lives.append([])
            time.sleep(10)
        trainer.terminate()
        status = trainer.wait(120)
        server.terminate()
        server.wait()
        steps = len((folder / "run" / "metrics.jsonl").read_text().splitlines())
        print(
            f"{args.minutes:g} minutes, {steps} steps, {len(lives) - 1} kills of the server; trainer's status {status}"
        )
        grows = [judge("trainer", of_trainer), judge("server", max(lives, key=len))]
        sys.exit(any(grows) or status != 143)


if __name__ == "__main__":
    main()
