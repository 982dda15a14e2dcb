"""Ranks on disk: a repeated item is answered without a search, even after a restart.

One SQLite file. A row is a key (sha256 of index id, query, golds and depth), the rank and a checksum of both, so that a
rank that a bad disk has changed is not used.
"""

import hashlib
import json
import logging
import sqlite3
import threading
import time
import zlib
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path

log = logging.getLogger("retriever_server")

FILE, VERSION = "ranks.sqlite3", 1
NOT_FOUND = 0  # a rank of None on disk
AT_ONCE = 500  # keys per SELECT


def key_of(index_id: str, query: str, golds: Iterable[str], depth: int) -> bytes:
    """32 bytes. The order of the golds does not matter, because the rank is that of the best."""
    return hashlib.sha256(json.dumps([index_id, query, sorted(set(golds)), depth]).encode()).digest()


def _check(key: bytes, rank: int) -> int:
    return zlib.crc32(key + rank.to_bytes(8, "little"))


class RankCache:
    """Thread-safe. No fault of it is fatal: a damaged file is renamed and replaced, a failing one is not used.

    Example: ``cache.put([(key_of("bm25-12", "who?", ["d1"], 100), 3)])``, then ``cache.get([key])`` is ``{key: 3}``.
    """

    def __init__(self, folder: str | Path, mib: int = 256) -> None:
        """Opens ``folder``/ranks.sqlite3, which holds at most about ``mib`` MiB: the oldest rows are dropped.

        Raises:
            ValueError: ``mib`` is below 1, or the folder cannot be made.
        """
        if mib < 1:
            raise ValueError(f"--rank_cache_mib must be at least 1, got {mib}")
        self._path, self._limit = Path(folder) / FILE, mib << 20
        self._lock = threading.Lock()
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"--rank_cache {folder}: cannot make the folder ({error})") from error
        self._connection: sqlite3.Connection | None = None
        with self._lock:
            self._open()

    def _open(self) -> None:
        try:
            self._connection = self._connect()
        except sqlite3.DatabaseError as error:
            self._recover(error, "open")

    def _connect(self) -> sqlite3.Connection:
        connection = sqlite3.connect(self._path, timeout=5, isolation_level=None, check_same_thread=False)
        try:
            connection.execute("PRAGMA journal_mode=WAL")
            connection.execute("PRAGMA synchronous=NORMAL")  # a power cut may lose the last rows, never the file
            connection.execute(f"PRAGMA journal_size_limit={8 << 20}")
            version = connection.execute("PRAGMA user_version").fetchone()[0]
            if version not in (0, VERSION):
                raise sqlite3.DatabaseError(f"it is of version {version}, this program writes {VERSION}")
            columns = "key BLOB NOT NULL UNIQUE, rank INTEGER NOT NULL, check_sum INTEGER NOT NULL"
            connection.execute(f"CREATE TABLE IF NOT EXISTS ranks (number INTEGER PRIMARY KEY, {columns})")
            connection.execute(f"PRAGMA user_version={VERSION}")
        except sqlite3.Error:
            connection.close()
            raise
        return connection

    def _recover(self, error: sqlite3.Error, doing: str) -> None:
        """After an error: replaces a damaged file; keeps one that is locked or out of room."""
        if isinstance(error, sqlite3.OperationalError):
            log.warning(f"the rank cache {self._path} is not used this time, it failed to {doing} ({error})")
            return
        if self._connection is not None:
            self._connection.close()
            self._connection = None
        aside = self._path.with_name(f"{FILE}.damaged-{time.time_ns()}")
        try:
            for end in ("-wal", "-shm"):
                self._path.with_name(FILE + end).unlink(missing_ok=True)
            self._path.rename(aside)
            self._connection = self._connect()
        except (OSError, sqlite3.Error) as again:
            log.warning(
                f"the rank cache {self._path} is damaged ({error}) and not replaced ({again}): going on without it"
            )
            return
        log.warning(f"the rank cache {self._path} is damaged ({error}): it is renamed {aside.name} and replaced")

    def get(self, keys: Sequence[bytes]) -> dict[bytes, int | None]:
        """The ranks of those keys that are in the cache."""
        found: dict[bytes, int | None] = {}
        with self._lock:
            if self._connection is None:
                return found
            try:
                for start in range(0, len(keys), AT_ONCE):
                    some = keys[start : start + AT_ONCE]
                    query = f"SELECT key, rank, check_sum FROM ranks WHERE key IN ({','.join('?' * len(some))})"
                    for key, rank, check in self._connection.execute(query, some):
                        if type(rank) is int and rank >= 0 and check == _check(key, rank):
                            found[key] = None if rank == NOT_FOUND else rank
            except sqlite3.Error as error:
                self._recover(error, "read")
                return {}
        return found

    def put(self, ranks: Iterable[tuple[bytes, int | None]]) -> None:
        rows = [(key, rank or NOT_FOUND, _check(key, rank or NOT_FOUND)) for key, rank in ranks]
        with self._lock:
            if self._connection is None or not rows:
                return
            try:
                self._connection.execute("BEGIN IMMEDIATE")
                insert = "INSERT OR REPLACE INTO ranks (key, rank, check_sum) VALUES (?, ?, ?)"
                self._connection.executemany(insert, rows)
                self._make_room(self._connection)
                self._connection.execute("COMMIT")
            except sqlite3.Error as error:
                with suppress(sqlite3.Error):
                    self._connection.execute("ROLLBACK")
                self._recover(error, "write")

    def _make_room(self, connection: sqlite3.Connection) -> None:
        """Drops the oldest tenth until the pages in use fit."""

        def pragma(name: str) -> int:
            return int(connection.execute(f"PRAGMA {name}").fetchone()[0])

        while (pragma("page_count") - pragma("freelist_count")) * pragma("page_size") > self._limit:
            first, last = connection.execute("SELECT min(number), max(number) FROM ranks").fetchone()
            if first is None:
                return
            connection.execute("DELETE FROM ranks WHERE number <= ?", (first + (last - first) // 10,))

    def close(self) -> None:
        with self._lock:
            if self._connection is not None:
                self._connection.close()
                self._connection = None
