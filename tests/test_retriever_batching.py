"""The queue: what is merged, who is next, who is refused, and that one request's fault is nobody else's."""

import asyncio
import threading
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retriever_server.serving.batching import Batcher, BatchSettings, Key, Overloaded

KEY = Key("rank", "x", 100)


class Silent:
    """An observer that ignores all."""

    def batch(self, key: Key, items: int, search_s: float) -> None: ...

    def waited(self, seconds: float) -> None: ...

    def cancelled(self, items: int) -> None: ...


class Recorder(Silent):
    """A searcher that doubles numbers, and remembers its calls; those of a closed gate wait until it is opened."""

    def __init__(self) -> None:
        self.calls: list[list[int]] = []
        self.begun, self.gate = threading.Event(), threading.Event()
        self.gate.set()
        self.dropped = 0

    def __call__(self, items: Sequence[int]) -> list[int]:
        self.calls.append(list(items))
        self.begun.set()
        assert self.gate.wait(10)
        return [2 * item for item in items]

    def cancelled(self, items: int) -> None:
        self.dropped += items


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def held(batcher: Batcher, searcher: Recorder) -> "asyncio.Task[list[Any]]":
    """Keeps the only worker busy with item 0 until the gate opens."""
    searcher.gate.clear()
    task = asyncio.create_task(batcher.run("holder", KEY, searcher, [0]))
    await asyncio.to_thread(searcher.begun.wait, 10)
    return task


def test_requests_of_one_kind_share_a_call() -> None:
    async def main() -> None:
        batcher = Batcher(BatchSettings(threads=1, max_wait_s=0.05), Silent())
        other = Key("rank", "x", 10)
        results = await asyncio.gather(
            batcher.run("a", KEY, searcher, [1, 2]),
            batcher.run("b", KEY, searcher, [3]),
            batcher.run("c", other, searcher, [4]),
        )
        assert results == [[2, 4], [6], [8]]
        assert await batcher.run("a", KEY, searcher, []) == []

    searcher = Recorder()
    asyncio.run(main())
    assert searcher.calls == [[1, 2, 3], [4]]


def test_a_long_request_is_cut_and_put_together_again() -> None:
    async def main() -> None:
        batcher = Batcher(BatchSettings(threads=1, max_batch=4), Silent())
        assert await batcher.run("a", KEY, searcher, range(10)) == [2 * item for item in range(10)]

    searcher = Recorder()
    asyncio.run(main())
    assert searcher.calls == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


def test_clients_share_each_batch_and_nobody_waits_for_a_long_request() -> None:
    async def main() -> None:
        batcher = Batcher(BatchSettings(threads=1, max_batch=4, max_wait_s=0), searcher)
        first = await held(batcher, searcher)
        long = asyncio.create_task(batcher.run("long", KEY, searcher, range(100, 110)))
        await settle()
        short = asyncio.create_task(batcher.run("short", KEY, searcher, [1, 2, 3]))
        one_more = asyncio.create_task(
            batcher.run("short", KEY, searcher, [4])
        )  # the same client: no second place in the line
        await settle()
        assert batcher.waiting == 14
        searcher.gate.set()
        await asyncio.gather(first, long, short, one_more)
        assert (batcher.waiting, batcher.running) == (0, 0)

    searcher = Recorder()
    asyncio.run(main())
    assert searcher.calls == [[0], [100, 101, 1, 2], [4, 102, 103, 3], [104, 105, 106, 107], [108, 109]]


def test_kinds_take_turns() -> None:
    async def main() -> None:
        batcher = Batcher(BatchSettings(threads=1, max_batch=2, max_wait_s=0), searcher)
        first = await held(batcher, searcher)
        tasks = [asyncio.create_task(batcher.run("a", KEY, searcher, [1, 2, 3, 4]))]
        await settle()
        tasks.append(asyncio.create_task(batcher.run("b", Key("search", "y", 5), searcher, [10, 20])))
        await settle()
        searcher.gate.set()
        await asyncio.gather(first, *tasks)

    searcher = Recorder()
    asyncio.run(main())
    assert searcher.calls == [[0], [1, 2], [10, 20], [3, 4]]


def test_an_item_that_is_refused_fails_alone() -> None:
    def picky(items: Sequence[int]) -> list[int]:
        if 3 in items or 6 in items:
            raise ValueError(f"not {3 if 3 in items else 6}")
        return list(items)

    async def main() -> list[Any]:
        return await Batcher(BatchSettings(), Silent()).run("a", KEY, picky, range(8))

    results = asyncio.run(main())
    assert [str(result) for result in results] == ["0", "1", "2", "not 3", "4", "5", "not 6", "7"]
    assert [type(result) for result in results].count(ValueError) == 2


def test_a_request_that_breaks_the_searcher_fails_alone() -> None:
    def brittle(items: Sequence[int]) -> list[int]:
        if 3 in items:
            raise MemoryError("3")
        return list(items)

    async def main() -> list[Any]:
        batcher = Batcher(BatchSettings(max_wait_s=0.05), Silent())
        runs = [
            batcher.run(client, KEY, brittle, items) for client, items in (("a", [1, 2]), ("b", [3, 4]), ("c", [5]))
        ]
        return await asyncio.gather(*runs, return_exceptions=True)

    good, bad, also_good = asyncio.run(main())
    assert (good, also_good) == ([1, 2], [5])
    assert isinstance(bad, MemoryError)


def test_a_cancelled_request_leaves_the_queue() -> None:
    async def main() -> None:
        batcher = Batcher(BatchSettings(threads=1, max_batch=2, max_wait_s=0), searcher)
        first = await held(batcher, searcher)
        gone = asyncio.create_task(batcher.run("a", KEY, searcher, [1, 2, 3]))
        stays = asyncio.create_task(batcher.run("b", KEY, searcher, [4]))
        await settle()
        gone.cancel()
        await settle()
        assert (gone.cancelled(), batcher.waiting) == (True, 1)
        searcher.gate.set()
        assert await stays == [8]
        await first

    searcher = Recorder()
    asyncio.run(main())
    assert searcher.calls == [[0], [4]]
    assert searcher.dropped == 3


def test_past_the_bound_requests_are_refused_at_once() -> None:
    batcher = Batcher(BatchSettings(max_queue=10), Silent())
    with batcher.admit(10):
        with (
            pytest.raises(
                Overloaded, match=r"10 items are waiting and 1 more were sent, the limit is 10.*try again later"
            ) as refused,
            batcher.admit(1),
        ):
            pass
        assert refused.value.retry_after_s == 1
    assert batcher.admitted == 0
    with batcher.admit(6), batcher.admit(4):
        assert batcher.admitted == 10


def test_those_who_were_refused_find_room_when_they_come_back() -> None:
    batcher = Batcher(BatchSettings(max_queue=10), Silent())
    with batcher.admit(8, "greedy"), pytest.raises(Overloaded), batcher.admit(4, "polite"):
        pass
    with batcher.admit(4, "greedy"):
        with pytest.raises(Overloaded), batcher.admit(4, "greedy"):  # five of the ten places are kept for the other
            pass
        with batcher.admit(6, "polite"):
            pass
    batcher._refused["greedy"] = 0.0  # it is not expected any longer
    with batcher.admit(4, "polite"), batcher.admit(6, "polite"):
        assert not batcher._refused


def test_the_bound_in_seconds_follows_the_speed_that_was_seen() -> None:
    batcher = Batcher(BatchSettings(threads=2, max_queue=1000, max_queue_s=30), Silent())
    batcher._spent_s, batcher._done = 10.0, 5.0  # 2 s an item, two at a time: an item a second
    with batcher.admit(100):  # an empty server takes what it is given
        with pytest.raises(Overloaded) as refused, batcher.admit(1):
            pass
        assert refused.value.retry_after_s == 30  # half of the 100 s, at most 30
    batcher._refused.clear()
    with batcher.admit(20):
        with batcher.admit(10):
            pass
        with pytest.raises(Overloaded) as refused, batcher.admit(11):
            pass
        assert refused.value.retry_after_s == 10


@pytest.mark.parametrize(
    "wrong", [{"threads": 0}, {"max_batch": 0}, {"max_queue": 0}, {"max_wait_s": -1.0}, {"max_queue_s": 0.0}]
)
def test_settings_out_of_range(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"--max_|--threads"):
        BatchSettings(**wrong)


@settings(max_examples=40)
@given(
    jobs=st.lists(st.tuples(st.integers(0, 3), st.integers(1, 3), st.integers(0, 9), st.booleans()), max_size=12),
    max_batch=st.integers(1, 8),
    threads=st.integers(1, 3),
)
def test_every_item_is_answered_once_and_right(
    jobs: list[tuple[int, int, int, bool]], max_batch: int, threads: int
) -> None:
    calls: list[tuple[int, list[Any]]] = []

    async def one(batcher: Batcher, number: int, client: int, depth: int, size: int, late: bool) -> None:
        def call(items: Sequence[tuple[int, int]]) -> list[tuple[int, int, int]]:
            calls.append((depth, list(items)))
            return [(depth, *item) for item in items]

        if late:
            await asyncio.sleep(0.001)
        items = [(number, place) for place in range(size)]
        assert await batcher.run(f"client {client}", Key("rank", "x", depth), call, items) == [
            (depth, *item) for item in items
        ]

    async def main() -> None:
        batcher = Batcher(BatchSettings(threads=threads, max_batch=max_batch, max_wait_s=0.0005), Silent())
        await asyncio.gather(*(one(batcher, number, *job) for number, job in enumerate(jobs)))
        assert (batcher.waiting, batcher._line) == (0, {})
        batcher.close()

    asyncio.run(main())
    assert all(0 < len(items) <= max_batch for _, items in calls)
    expected = [(depth, (number, place)) for number, (_, depth, size, _) in enumerate(jobs) for place in range(size)]
    assert sorted((depth, item) for depth, items in calls for item in items) == sorted(expected)
