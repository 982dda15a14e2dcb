"""One writer a folder and an output file: the second command ends at once and names the first."""

import errno
import fcntl
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import helpers_trainers as helpers
import pytest

from convsearch import distill, export, grpo, infer, sft
from convsearch.files import sole_writer
from data_preprocess import demo
from retriever_server import index

CODE = """
import sys, time
from convsearch.files import sole_writer
with sole_writer(sys.argv[1], inside=sys.argv[2] == "inside"):
    print("held", flush=True)
    time.sleep(600)
"""


@contextmanager
def held(output: Path, *, inside: bool) -> Iterator["subprocess.Popen[str]"]:
    """Another process writes the output for the block."""
    command = [sys.executable, "-c", CODE, str(output), "inside" if inside else "beside"]
    process = subprocess.Popen(command, cwd=helpers.ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.wait()


def test_the_second_writer_is_refused_until_the_first_is_gone(tmp_path: Path) -> None:
    output = tmp_path / "deep" / "out.jsonl"
    with held(output, inside=False) as process:
        with pytest.raises(ValueError, match=rf"{output} is being written by process {process.pid} on \S+ since 20"):
            sole_writer(output).__enter__()
        process.send_signal(signal.SIGKILL)
        process.wait()
        with sole_writer(output):
            assert (output.parent / ".out.jsonl.lock").is_file()
    assert list(output.parent.iterdir()) == []  # nothing stays behind


def test_many_writers_take_turns(tmp_path: Path) -> None:
    """A lock's file is removed and made again all the time; never do two hold it."""
    inside, turns, refused = 0, 0, set[str]()

    def write() -> None:
        nonlocal inside, turns
        for _ in range(300):
            try:
                with sole_writer(tmp_path / "out"):
                    inside += 1
                    assert inside == 1
                    turns += 1
                    inside -= 1
            except ValueError as error:
                refused.add(re.sub(r"process .* since.*:", "process", str(error)))

    threads = [threading.Thread(target=write) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert turns > 0
    assert inside == 0
    assert all("is being written by " in error for error in refused)


def test_a_file_system_without_locks_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def flock(*_: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", flock)
    with sole_writer(tmp_path / "out"):
        pass
    assert f"warning: the file system of {tmp_path / 'out'} has no locks" in capsys.readouterr().err


def test_every_command_that_writes_takes_the_lock(
    form_llama: Path, toy_parquet: Path, toy_index: Path, tmp_path: Path
) -> None:
    pairs = [(f"q{n}", helpers.question(*pair), helpers.answer(*pair)) for n, pair in enumerate(helpers.GOLDS)]
    answers = helpers.write_parquet(tmp_path / "rows.parquet", helpers.sft_rows(pairs))
    rows = helpers.write_jsonl(tmp_path / "rows.json", helpers.conversation_rows(list(helpers.GOLDS)))
    out, model = tmp_path / "out", ["--model_name_or_path", form_llama, "--input_path", rows]
    embedded = f"embedded:{toy_index}"
    collection = toy_index.parent / "collection.jsonl"
    commands: list[tuple[Callable[[], None], list[object], bool]] = [
        (infer.main, [*model, "--output_path", out], False),
        (distill.main, [*model, "--output_dir", out, "--retriever_url", embedded], True),
        (sft.main, list(helpers.sft_overrides(form_llama, answers, out)), True),
        (grpo.main, list(helpers.grpo_overrides(form_llama, toy_parquet, out, embedded)), True),
        (export.main, [form_llama, "--output", out], False),
        (index.main, ["bm25", "--collection", collection, "--output", out], False),
        (demo.main, ["--output", out], True),
    ]
    for main, arguments, inside in commands:
        with held(out, inside=inside) as process:
            error = helpers.one_sentence(*helpers.call(main, arguments))
            assert f"{out} is being written by process {process.pid} on " in error
            assert "wait until it ends, stop it, or name another output" in error
            left = [path.name for path in out.rglob("*") if path.name != ".lock"] if out.is_dir() else []
            assert left == [], (main.__module__, left)
