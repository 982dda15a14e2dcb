"""Speed against other implementations. Each script's last line has its ratio."""

import argparse
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

Result = TypeVar("Result")


def add_source(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--source", type=Path, help="collection.jsonl with sentences for the texts (else: the demo's)")


def add_work(parser: argparse.ArgumentParser) -> None:
    folder = "folder that keeps collections and indexes for the next run"
    parser.add_argument("--work", type=Path, default=Path("data/benchmarks"), help=folder)


def add_threads(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help=what)


def timed(call: Callable[[], Result]) -> tuple[Result, float]:
    """(result, seconds)."""
    start = time.perf_counter()
    return call(), time.perf_counter() - start


def alternate(
    calls: Mapping[str, Callable[[], Any]], rounds: int, wait: Callable[[], None] = lambda: None
) -> tuple[dict[str, list[float]], dict[str, Any]]:
    """(seconds of each round, last answer) of each call, made in turns after one round that is not timed.

    Args:
        wait: waits for the device before the clock is read.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    answers: dict[str, Any] = {}
    for number in range(rounds + 1):
        for name, call in calls.items():
            wait()
            start = time.perf_counter()
            answers[name] = call()
            wait()
            seconds[name] += [time.perf_counter() - start] if number else []
    return seconds, answers
