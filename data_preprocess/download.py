"""Fetches the public releases; checks them, resumes broken transfers, and says what to fetch by hand.

    python -m data_preprocess.download topiocqa --output data/raw/topiocqa

A broken transfer continues where it stopped (HTTP Range, guarded by the file's ETag). The table of releases has the
checksums that the publishers or ir_datasets give; Zenodo's are read from its record; else the computed SHA-256 is
printed and written beside the file.
"""

import argparse
import hashlib
import http.client
import json
import ssl
import sys
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from convsearch import cli
from convsearch.files import atomic_write, sole_writer
from data_preprocess.releases import RELEASES, Release

TIMEOUT_S = 60.0
ATTEMPTS = 5
FIRST_WAIT_S = 1.0
_CHUNK_BYTES = 1 << 20
_NETWORK_ERRORS = (urllib.error.URLError, http.client.HTTPException, ssl.SSLError, TimeoutError, ConnectionError)


@dataclass(frozen=True, slots=True)
class Part:
    """An unfinished download: ``<target>.part``, and in ``<target>.part.etag`` the version of the file."""

    path: Path

    @classmethod
    def of(cls, target: Path) -> "Part":
        return cls(target.with_name(f"{target.name}.part"))

    @property
    def etag_path(self) -> Path:
        return self.path.with_name(f"{self.path.name}.etag")

    def range_headers(self) -> dict[str, str]:
        """The headers of a request for the rest; empty if the part is missing or its version is not known."""
        if not self.path.exists() or not self.etag_path.exists():
            return {}
        size, etag = self.path.stat().st_size, self.etag_path.read_text(encoding="utf-8")
        return {"Range": f"bytes={size}-", "If-Range": etag} if size and etag else {}

    def clear(self) -> None:
        self.path.unlink(missing_ok=True)
        self.etag_path.unlink(missing_ok=True)


def _transfer(url: str, part: Part, timeout_s: float) -> None:
    """One attempt: appends to the part what the server sends. Raises the network's error if the transfer breaks."""
    headers = {"User-Agent": "convsearch-data-preprocess", **part.range_headers()}
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=timeout_s) as response:
        resumed = response.status == 206
        start = part.path.stat().st_size if resumed else 0
        length = response.headers.get("Content-Length")
        part.etag_path.parent.mkdir(parents=True, exist_ok=True)
        part.etag_path.write_text(response.headers.get("ETag") or "", encoding="utf-8")
        total = start + int(length) if length is not None else None
        with (
            open(part.path, "ab" if resumed else "wb") as file,
            tqdm(total=total, initial=start, desc=part.path.stem, unit="B", unit_scale=True, mininterval=1.0) as bar,
        ):
            while chunk := response.read(_CHUNK_BYTES):
                file.write(chunk)
                bar.update(len(chunk))
        if total is not None and part.path.stat().st_size < total:
            raise http.client.IncompleteRead(b"", total - part.path.stat().st_size)


def _fetch(url: str, target: Path, timeout_s: float, first_wait_s: float) -> None:
    """Transfers the file into its part, with bounded retries.

    Raises:
        Unavailable: the server does not answer, or refuses; names what to fetch by hand.
    """
    part, wait_s = Part.of(target), first_wait_s
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return _transfer(url, part, timeout_s)
        except urllib.error.HTTPError as error:
            if error.code == 416 and part.path.exists():  # nothing is left to fetch; If-Range guards the version
                return None
            final, problem = error.code < 500 and error.code != 429, f"{error.code} {error.reason}"
        except _NETWORK_ERRORS as error:
            final, problem = False, str(getattr(error, "reason", None) or str(error) or type(error).__name__)
        if final or attempt == ATTEMPTS:
            raise cli.Unavailable(f"cannot fetch {url} ({problem}): fetch it by hand and put it at {target}")
        following = f"attempt {attempt + 1} of {ATTEMPTS} in {wait_s:g} s"
        print(f"{target.name}: the transfer broke off; {following}", file=sys.stderr)
        time.sleep(wait_s)
        wait_s *= 2
    raise AssertionError("every attempt returns or raises")


def checksums_of(path: Path, algorithms: set[str]) -> dict[str, str]:
    """{algorithm: hexadecimal digest}, in one pass."""
    digests = {name: hashlib.new(name) for name in algorithms}
    size, title = path.stat().st_size, f"checking {path.name}"
    with open(path, "rb") as file, tqdm(total=size, desc=title, unit="B", unit_scale=True, mininterval=1.0) as bar:
        while chunk := file.read(_CHUNK_BYTES):
            for digest in digests.values():
                digest.update(chunk)
            bar.update(len(chunk))
    return {name: digest.hexdigest() for name, digest in digests.items()}


def published_checksum(release: Release, timeout_s: float) -> str | None:
    """ "md5:..." of a file from its Zenodo record; None if the record is not available or does not name the file."""
    if release.record_url is None:
        return None
    try:
        with urllib.request.urlopen(release.record_url, timeout=timeout_s) as response:
            record = json.load(response)
    except (*_NETWORK_ERRORS, json.JSONDecodeError):
        return None
    name = release.url.split("?")[0].rpartition("/files/")[2]
    files = record.get("files", []) if isinstance(record, dict) else []
    return next((str(file["checksum"]) for file in files if file.get("key") == name and file.get("checksum")), None)


def _verify(path: Path, release: Release, timeout_s: float) -> tuple[str, str]:
    """(SHA-256, what it was checked against), of a whole file.

    Raises:
        ValueError: the size or the checksum is not the published one.
    """
    expected = release.checksum or published_checksum(release, timeout_s)
    algorithm, _, digest = (expected or "").partition(":")
    found = checksums_of(path, {"sha256", algorithm} - {""})
    size = path.stat().st_size
    if release.size_bytes is not None and size != release.size_bytes:
        raise ValueError(f"{release.url}: got {size:,} bytes, published are {release.size_bytes:,}")
    if expected and found[algorithm] != digest:
        raise ValueError(f"{release.url}: its {algorithm} is {found[algorithm]}, published is {digest}")
    checked = f"{algorithm} as published" if expected else "no published checksum to check against; note this one"
    return found["sha256"], checked


def download(
    release: Release, folder: Path, *, timeout_s: float = TIMEOUT_S, first_wait_s: float = FIRST_WAIT_S
) -> Path:
    """Fetches one file into ``folder`` or reuses the one there, and prints which. Checks a file put there by hand, too.

    Raises:
        Unavailable: no network, or the server refuses.
        ValueError: the size or the checksum is not the published one; a downloaded file is removed, one put there by
            hand stays.
    """
    target = folder / release.path
    with sole_writer(target):
        _download(release, target, timeout_s, first_wait_s)
    return target


def _download(release: Release, target: Path, timeout_s: float, first_wait_s: float) -> None:
    kept, part = target.with_name(f"{target.name}.sha256"), Part.of(target)
    by_hand = target.exists()
    if by_hand and kept.exists() and release.size_bytes in (None, target.stat().st_size):
        print(f"reused {target} (sha256 {kept.read_text(encoding='utf-8').split()[0]})")
        return
    if not by_hand:
        target.parent.mkdir(parents=True, exist_ok=True)
        _fetch(release.url, target, timeout_s, first_wait_s)
    try:
        sha256, checked = _verify(target if by_hand else part.path, release, timeout_s)
    except ValueError as error:
        if by_hand:
            problem = f"{target} is not the published file; remove it and run the same command again"
            raise ValueError(f"{error}: {problem}") from error
        part.clear()
        raise ValueError(f"{error}: removed; run the same command again") from error
    if not by_hand:
        part.path.rename(target)
    part.clear()
    with atomic_write(kept) as file:
        file.write(f"{sha256}  {target.name}\n")
    verb, size = "checked" if by_hand else "fetched", target.stat().st_size
    print(f"{verb} {target}: {size:,} bytes, sha256 {sha256} ({checked})")


def list_releases() -> str:
    """The table of all files, for people."""
    lines = []
    for name, releases in RELEASES.items():
        for release in releases:
            size = f"{release.size_bytes:>13,}" if release.size_bytes is not None else f"{'?':>13}"
            lines.append(f"{name:9} {size} bytes  {release.checksum or '-':36}  {release.url}")
    return "\n".join(lines)


def build_parser() -> argparse.ArgumentParser:
    parser = cli.command_parser("data_preprocess.download", "Fetches the public data sets.")
    parser.add_argument("dataset", nargs="?", choices=sorted(RELEASES), help="what to fetch")
    parser.add_argument("--output", type=Path, metavar="DIR", help="folder to fetch into")
    parser.add_argument("--list", action="store_true", help="print the table of files and stop")
    return parser


def main() -> None:
    parser = build_parser()
    arguments = parser.parse_args()
    if arguments.list:
        print(list_releases())
        return
    if arguments.dataset is None or arguments.output is None:
        parser.error("give a data set and --output DIR, or --list")
    for release in RELEASES[arguments.dataset]:
        download(release, arguments.output)


if __name__ == "__main__":
    cli.run(main)
