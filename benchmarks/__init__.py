"""Speed against other implementations. Each script's last line has its ratio."""

import argparse
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

Result = TypeVar("Result")


def script_parser(name: str, description: str | None) -> argparse.ArgumentParser:
    """The parser of ``python -m benchmarks.<name>``."""
    form = argparse.ArgumentDefaultsHelpFormatter
    return argparse.ArgumentParser(prog=f"python -m benchmarks.{name}", description=description, formatter_class=form)


def add_source(parser: argparse.ArgumentParser) -> None:
    source = "collection.jsonl whose sentences make the texts; by default the embedded summaries"
    parser.add_argument("--source", type=Path, help=source)


def add_threads(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help=what)


def timed(call: Callable[[], Result]) -> tuple[Result, float]:
    """(result, seconds)."""
    start = time.perf_counter()
    return call(), time.perf_counter() - start
