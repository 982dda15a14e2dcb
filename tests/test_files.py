"""Files are complete or absent, whatever happens during the write; an error names file and line of faulty JSON."""

import gzip
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from convsearch.files import atomic_write, read_jsonl, write_jsonl

ROOT = Path(__file__).resolve().parents[1]


def written(path: Path, text: str | bytes) -> Path:
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def records(path: Path) -> list[tuple[int, dict[str, Any]]]:
    return list(read_jsonl(path))


def python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs ``code`` in a process of its own."""
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, cwd=ROOT)


# --- writing ----------------------------------------------------------------------------------------------------------


def test_the_file_appears_when_the_block_ends(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "out.txt"  # folders are made
    with atomic_write(path) as file:
        file.write("Où est né Dvořák?\n")
        file.flush()
        assert not path.exists()
        assert [left.name for left in path.parent.iterdir()] == [f"out.txt.tmp-{os.getpid()}"]
    assert path.read_bytes() == "Où est né Dvořák?\n".encode()
    assert list(path.parent.iterdir()) == [path]


def test_an_open_reader_reads_the_old_file_to_its_end(tmp_path: Path) -> None:
    path = written(tmp_path / "out.txt", "old and long")
    with open(path) as reader:
        with atomic_write(path) as file:
            file.write("new")
        assert reader.read() == "old and long"
    assert path.read_text() == "new"


@pytest.mark.parametrize(
    "fault", [RuntimeError("no"), KeyboardInterrupt(), SystemExit(3), OSError(28, "No space left on device")]
)
def test_a_failed_block_keeps_the_old_file(tmp_path: Path, fault: BaseException) -> None:
    path = written(tmp_path / "out.bin", "old")

    def write() -> None:
        with atomic_write(path, "wb") as file:
            file.write(b"new")
            raise fault

    with pytest.raises(type(fault)):
        write()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_killed_writer_keeps_the_old_file(tmp_path: Path) -> None:
    path = written(tmp_path / "out.txt", "old")
    code = """
import os, signal, sys
from convsearch.files import atomic_write
with atomic_write(sys.argv[1]) as file:
    file.write("new" * 100_000)
    os.kill(os.getpid(), signal.SIGKILL)
"""
    assert python(code, str(path)).returncode == -signal.SIGKILL
    assert path.read_text() == "old"
    with atomic_write(path) as file:  # and what it left lying about stops nobody
        file.write("newer")
    assert path.read_text() == "newer"


def test_a_full_disk_is_an_error_with_the_file_name(tmp_path: Path) -> None:
    """A real refusal by the system: a file may not grow beyond 64 KiB in this process."""
    path = written(tmp_path / "out.txt", "old")
    code = """
import resource, signal, sys
from convsearch.cli import run
from convsearch.files import write_jsonl
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))
run(lambda: write_jsonl(sys.argv[1], ({"n": n, "text": "x" * 1000} for n in range(1000))))
"""
    done = python(code, str(path))
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: File too large ({path})")
    assert done.stderr.count("\n") == 1
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_failed_generator_writes_nothing(tmp_path: Path) -> None:
    def rows() -> Any:
        yield {"a": 1}
        raise ValueError("the second row is bad")

    with pytest.raises(ValueError, match="the second row is bad"):
        write_jsonl(tmp_path / "out.jsonl", rows())
    assert list(tmp_path.iterdir()) == []


# --- JSON lines -------------------------------------------------------------------------------------------------------

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=10),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.lists(st.dictionaries(st.text(max_size=5), values, max_size=3), max_size=4))
def test_written_records_are_read_back(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    path = tmp_path / "rows.jsonl"
    assert write_jsonl(path, iter(rows)) == len(rows)
    assert records(path) == list(enumerate(rows, 1))
    assert path.read_bytes().count(b"\n") == len(rows)  # line separators of Unicode stay inside their line


def test_text_stays_readable(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    write_jsonl(path, [{"q": "Dvořák 東京"}])
    assert path.read_text(encoding="utf-8") == '{"q": "Dvořák 東京"}\n'


def test_blank_lines_are_skipped_and_counted(tmp_path: Path) -> None:
    path = written(tmp_path / "rows.jsonl", '\n{"a": 1}\r\n  \n\n{"a": 2}')
    assert records(path) == [(2, {"a": 1}), (5, {"a": 2})]


def test_a_byte_order_mark_is_accepted(tmp_path: Path) -> None:
    assert records(written(tmp_path / "rows.jsonl", b'\xef\xbb\xbf{"a": 1}\n')) == [(1, {"a": 1})]


def test_gzipped_lines(tmp_path: Path) -> None:
    lines = "".join(json.dumps({"n": n, "text": "x" * 50}) + "\n" for n in range(2000))
    path = written(tmp_path / "rows.jsonl.gz", gzip.compress(lines.encode()))
    assert [record["n"] for _, record in read_jsonl(path)] == list(range(2000))


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ('{"a": 1}\n{"a": \n', r"rows\.jsonl:2: not a line of JSON \(Expecting value.*\)"),
        ('{"a": 1}\n\n{"a": 1} {"b": 2}\n', r"rows\.jsonl:3: not a line of JSON \(Extra data.*\)"),
        ("who wrote Hamlet?\n", r"rows\.jsonl:1: not a line of JSON .*"),
        (b'{"a": "\xff"}\n', r"rows\.jsonl:1: not a line of JSON \('utf-8' codec can't decode.*\)"),
        ('{"a": 1}\n[1, 2]\n', r"rows\.jsonl:2: expected a JSON object, got list"),
        ("[\n", r"rows\.jsonl:1: not a line of JSON .*"),
        ("null\n", r"rows\.jsonl:1: expected a JSON object, got NoneType"),
    ],
)
def test_a_faulty_line_is_named(tmp_path: Path, text: str | bytes, fault: str) -> None:
    path = written(tmp_path / "rows.jsonl", text)
    with pytest.raises(ValueError, match=f"^{path.parent}/{fault}$"):
        records(path)


def test_lines_before_a_faulty_one_are_read(tmp_path: Path) -> None:
    reader = read_jsonl(written(tmp_path / "rows.jsonl", '{"a": 1}\nx\n'))
    assert next(reader) == (1, {"a": 1})
    with pytest.raises(ValueError, match=r":2: "):
        next(reader)


@pytest.mark.parametrize("damage", ["cut off", "overwritten", "not gzipped"])
def test_a_damaged_gzip_file_is_one_sentence(tmp_path: Path, damage: str) -> None:
    whole = bytearray(
        gzip.compress(b"".join(b'{"n": %d, "r": "%s"}\n' % (n, os.urandom(8).hex().encode()) for n in range(3000)))
    )
    if damage == "overwritten":
        whole[len(whole) // 2 :] = bytes(len(whole) - len(whole) // 2)
    content = {"cut off": bytes(whole[:-5000]), "overwritten": bytes(whole), "not gzipped": b'{"n": 1}\n'}[damage]
    path = written(tmp_path / "rows.jsonl.gz", content)
    with pytest.raises(
        ValueError, match=rf"^{path}:\d+: (the gzipped file is damaged or cut off|not a line of JSON) \(.*\)"
    ):
        records(path)


def test_a_missing_file_raises_file_not_found(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        records(tmp_path / "rows.jsonl")
