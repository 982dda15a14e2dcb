"""The rank cache: survives restarts, keeps its size, and no damage to it is fatal or believed."""

import logging
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from retriever_server.serving.rank_cache import FILE, RankCache, key_of


def test_keys_tell_everything_apart_that_changes_a_rank() -> None:
    key = key_of("bm25-1", "who?", ["d1", "d2"], 100)
    assert len(key) == 32
    assert key == key_of("bm25-1", "who?", ("d2", "d1", "d2"), 100)
    others = [
        key_of("bm25-2", "who?", ["d1", "d2"], 100),
        key_of("bm25-1", "who", ["d1", "d2"], 100),
        key_of("bm25-1", "who?", ["d1"], 100),
        key_of("bm25-1", "who?", ["d1,d2"], 100),
        key_of("bm25-1", "who?", ["d1", "d2"], 10),
        key_of("bm25-1", "who?\ud800", ["d1", "d2"], 100),
    ]
    assert len({key, *others}) == 7


def rows(folder: Path) -> int:
    with closing(sqlite3.connect(folder / FILE)) as connection:
        return int(connection.execute("SELECT count(*) FROM ranks").fetchone()[0])


def test_ranks_survive_a_restart(tmp_path: Path) -> None:
    keys = [key_of("x", str(number), ["d"], 100) for number in range(1200)]
    cache = RankCache(tmp_path / "new" / "cache")
    cache.put([(key, number or None) for number, key in enumerate(keys)])
    cache.put([(keys[5], 7)])
    cache.close()
    cache = RankCache(tmp_path / "new" / "cache")
    expected = {key: number or None for number, key in enumerate(keys)} | {keys[5]: 7}
    assert cache.get(keys) == expected
    assert cache.get([b"other", keys[3]]) == {keys[3]: 3}
    cache.close()
    assert rows(tmp_path / "new" / "cache") == 1200
    assert cache.get(keys) == {}  # closed: nothing, and no error
    cache.put([(keys[0], 1)])


def test_the_oldest_make_room(tmp_path: Path) -> None:
    cache = RankCache(tmp_path, mib=1)
    keys = [key_of("x", str(number), ["d"], 100) for number in range(30_000)]
    for start in range(0, len(keys), 3000):
        cache.put([(key, 1) for key in keys[start : start + 3000]])
    assert 3000 <= rows(tmp_path) < 20_000
    assert cache.get(keys[-100:]) == dict.fromkeys(keys[-100:], 1)
    assert cache.get(keys[:100]) == {}
    cache.close()
    assert (tmp_path / FILE).stat().st_size < 2 << 20  # a batch may go over the limit before the oldest are dropped


def test_a_rank_that_the_disk_changed_is_no_answer(tmp_path: Path) -> None:
    cache, keys = RankCache(tmp_path), [key_of("x", query, ["d"], 9) for query in ("a", "b")]
    cache.put([(key, 5) for key in keys])
    cache.close()
    with sqlite3.connect(tmp_path / FILE) as connection:
        connection.execute("UPDATE ranks SET rank = 1 WHERE key = ?", (keys[0],))
    connection.close()
    assert RankCache(tmp_path).get(keys) == {keys[1]: 5}


@pytest.mark.parametrize("how", ["garbage", "cut", "version"])
def test_a_damaged_file_is_set_aside(tmp_path: Path, caplog: pytest.LogCaptureFixture, how: str) -> None:
    cache, key = RankCache(tmp_path), key_of("x", "a", ["d"], 9)
    cache.put([(key_of("x", str(number), ["d"], 9), 5) for number in range(2000)])
    cache.close()
    file = tmp_path / FILE
    if how == "garbage":
        file.write_bytes(b"this is no database" * 1000)
    elif how == "cut":
        file.write_bytes(file.read_bytes()[:5000])
    else:
        with sqlite3.connect(file) as connection:
            connection.execute("PRAGMA user_version=99")
        connection.close()
    before = file.read_bytes()
    with caplog.at_level(logging.WARNING):
        cache = RankCache(tmp_path)
        assert cache.get([key]) == {}
        cache.put([(key, 3)])
        cache.put([(key, 4)])  # where damage only shows in writing, the first is lost with the file
        assert cache.get([key]) == {key: 4}
    assert "is damaged" in caplog.text
    assert "it is renamed ranks.sqlite3.damaged-" in caplog.text
    aside = list(tmp_path.glob("*.damaged-*"))
    assert len(aside) == 1
    if how != "cut":
        assert aside[0].read_bytes() == before


def test_a_locked_file_is_done_without(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache, key = RankCache(tmp_path), key_of("x", "a", ["d"], 9)
    assert cache._connection is not None
    cache._connection.execute("PRAGMA busy_timeout=10")
    other = sqlite3.connect(tmp_path / FILE, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    cache.put([(key, 3)])
    assert "failed to write (database is locked)" in caplog.text
    other.execute("ROLLBACK")
    other.close()
    cache.put([(key, 3)])
    assert cache.get([key]) == {key: 3}
    assert not list(tmp_path.glob("*.damaged-*"))


def test_what_cannot_be_a_cache(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"--rank_cache .*file: cannot make the folder"):
        RankCache(tmp_path / "file")
    with pytest.raises(ValueError, match="--rank_cache_mib must be at least 1, got 0"):
        RankCache(tmp_path, mib=0)
