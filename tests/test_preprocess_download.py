"""Downloads against a real HTTP server: broken transfers, changed files, wrong checksums, no network."""

import hashlib
import http.server
import json
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from convsearch import cli
from data_preprocess import download as module
from data_preprocess.download import download
from data_preprocess.releases import RELEASES, Release
from data_preprocess.sources import locate
from data_preprocess.topiocqa_data import NAMES

CONTENT = bytes(range(256)) * 12_000  # 3 MB: several chunks
MD5 = f"md5:{hashlib.md5(CONTENT).hexdigest()}"
SHA256 = hashlib.sha256(CONTENT).hexdigest()


class Server(http.server.ThreadingHTTPServer):
    """Serves ``content`` under any path. An entry of ``cuts`` breaks one transfer after so many bytes.

    ``seen`` notes the Range headers.
    """

    content: bytes = CONTENT
    etag: str | None = '"v1"'
    status: int = 200
    record: object = None

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.cuts: list[int] = []
        self.seen: list[str | None] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        server = self.server
        if self.path.startswith("/api"):
            return self._answer(json.dumps(server.record).encode(), 200)
        server.seen.append(self.headers.get("Range"))
        if server.status != 200:
            return self.send_error(server.status)
        match = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
        if match and self.headers.get("If-Range") == server.etag:
            start = int(match[1])
            if start >= len(server.content):
                return self.send_error(416)
            return self._answer(server.content[start:], 206)
        return self._answer(server.content, 200)

    def _answer(self, body: bytes, status: int) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        if self.server.etag:
            self.send_header("ETag", self.server.etag)
        self.end_headers()
        cut = self.server.cuts.pop(0) if self.server.cuts else len(body)
        self.wfile.write(body[:cut])


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as served:
        thread = threading.Thread(target=served.serve_forever, args=(0.01,))
        thread.start()
        yield served
        served.shutdown()
        thread.join()


def _get(release: Release, folder: Path) -> Path:
    return download(release, folder, timeout_s=5.0, first_wait_s=0.001)


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


def test_a_file_is_fetched_checked_and_reused(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    release = Release("sub/data.bin", f"{server.url}/data.bin", len(CONTENT), MD5)
    path = _get(release, tmp_path)
    assert path.read_bytes() == CONTENT
    assert (tmp_path / "sub" / "data.bin.sha256").read_text() == f"{SHA256}  data.bin\n"
    assert capsys.readouterr().out == f"fetched {path}: 3,072,000 bytes, sha256 {SHA256} (md5 as published)\n"
    assert _get(release, tmp_path) == path
    assert capsys.readouterr().out == f"reused {path} (sha256 {SHA256})\n"
    assert server.seen == [None]
    assert _names(tmp_path) == ["data.bin", "data.bin.sha256"]


def test_a_broken_transfer_resumes(server: Server, tmp_path: Path) -> None:
    server.cuts = [1_500_000, 500_000]
    assert _get(Release("data.bin", f"{server.url}/data.bin", None, MD5), tmp_path).read_bytes() == CONTENT
    assert server.seen == [None, "bytes=1500000-", "bytes=2000000-"]


def test_a_later_run_resumes_a_dead_one(server: Server, tmp_path: Path) -> None:
    server.cuts = [100_000] * module.ATTEMPTS
    release = Release("data.bin", f"{server.url}/data.bin", len(CONTENT), MD5)
    with pytest.raises(cli.Unavailable, match="cannot fetch"):
        _get(release, tmp_path)
    assert (tmp_path / "data.bin.part").stat().st_size == 100_000 * module.ATTEMPTS
    server.seen.clear()
    assert _get(release, tmp_path).read_bytes() == CONTENT
    assert server.seen == [f"bytes={100_000 * module.ATTEMPTS}-"]


def test_a_part_of_an_older_version_is_discarded(server: Server, tmp_path: Path) -> None:
    server.cuts = [100_000] * module.ATTEMPTS
    release = Release("data.bin", f"{server.url}/data.bin")
    with pytest.raises(cli.Unavailable):
        _get(release, tmp_path)
    server.content, server.etag, server.cuts = CONTENT[::-1], '"v2"', []
    assert _get(release, tmp_path).read_bytes() == CONTENT[::-1]


def test_a_server_without_etag_starts_again(server: Server, tmp_path: Path) -> None:
    server.etag, server.cuts = None, [1_500_000]
    assert _get(Release("data.bin", f"{server.url}/data.bin"), tmp_path).read_bytes() == CONTENT
    assert server.seen == [None, None]


def test_a_whole_part_needs_no_transfer(server: Server, tmp_path: Path) -> None:
    (tmp_path / "data.bin.part").write_bytes(CONTENT)
    (tmp_path / "data.bin.part.etag").write_text('"v1"')
    assert _get(Release("data.bin", f"{server.url}/data.bin", None, MD5), tmp_path).read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("size", "checksum", "message"),
    [
        (None, "md5:0123", r"its md5 is [0-9a-f]{32}, published is 0123: removed; run the same command again"),
        (None, "sha256:0123", r"its sha256 is [0-9a-f]{64}, published is 0123: removed"),
        (5, None, r"got 3,072,000 bytes, published are 5: removed"),
    ],
)
def test_a_wrong_file_is_removed(
    size: int | None, checksum: str | None, message: str, server: Server, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        _get(Release("data.bin", f"{server.url}/data.bin", size, checksum), tmp_path)
    assert _names(tmp_path) == []


def test_a_file_put_there_by_hand_is_checked_and_never_removed(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    release = Release("data.bin", f"{server.url}/data.bin", None, MD5)
    (tmp_path / "data.bin").write_bytes(b"something else")
    with pytest.raises(ValueError, match="is not the published file; remove it"):
        _get(release, tmp_path)
    assert (tmp_path / "data.bin").read_bytes() == b"something else"
    (tmp_path / "data.bin").write_bytes(CONTENT)
    _get(release, tmp_path)
    assert capsys.readouterr().out.startswith("checked ")
    assert server.seen == []


def test_zenodos_record_gives_the_checksum(server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    release = Release(
        "data.bin", f"{server.url}/records/7/files/deep/data.bin?download=1", record_url=f"{server.url}/api/records/7"
    )
    server.record = {
        "files": [{"key": "other.bin", "checksum": "md5:0"}, {"key": "deep/data.bin", "checksum": "md5:1"}]
    }
    with pytest.raises(ValueError, match=r"its md5 is .*, published is 1"):
        _get(release, tmp_path)
    server.record = {"files": []}
    _get(release, tmp_path)
    assert f"sha256 {SHA256} (no published checksum to check against; note this one)" in capsys.readouterr().out


def test_a_refusal_is_final_and_a_server_error_is_retried(server: Server, tmp_path: Path) -> None:
    release = Release("data.bin", f"{server.url}/data.bin")
    server.status = 404
    with pytest.raises(
        cli.Unavailable,
        match=r"cannot fetch http://.*/data\.bin \(404 Not Found\): fetch it by hand and put it at .*data\.bin$",
    ):
        _get(release, tmp_path)
    assert len(server.seen) == 1
    server.status = 503
    with pytest.raises(cli.Unavailable, match="503"):
        _get(release, tmp_path)
    assert len(server.seen) == 1 + module.ATTEMPTS


def test_no_network_is_one_sentence_with_url_and_path(tmp_path: Path) -> None:
    with socket.socket() as taken:  # bound, not listening: connections are refused
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/data.bin"
        code = (
            "from pathlib import Path; from convsearch import cli; from data_preprocess import download as d; "
            "from data_preprocess.releases import Release; d.ATTEMPTS = 1; "
            f"cli.run(lambda: d.download(Release('data.bin', {url!r}), Path({str(tmp_path)!r})) and None)"
        )
        result = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[1]
        )
    assert result.returncode == 2
    assert (
        result.stderr == f"error: cannot fetch {url} ([Errno 111] Connection refused): "
        f"fetch it by hand and put it at {tmp_path / 'data.bin'}\n"
    )


def test_the_table_is_sound_and_its_paths_are_found_again(tmp_path: Path) -> None:
    paths = [f"{name}/{release.path}" for name, releases in RELEASES.items() for release in releases]
    assert len(paths) == len(set(paths)) == 33
    assert all(release.url.startswith("https://") for releases in RELEASES.values() for release in releases)
    for release in RELEASES["topiocqa"]:
        (tmp_path / release.path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / release.path).write_text("[]")
    assert locate(tmp_path, {}, NAMES).keys() == NAMES.keys()
    assert module.list_releases().count("\n") == 32
