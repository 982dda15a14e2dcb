"""Merges the work of many requests into batches for the searchers: bounded, fair to all clients, dropped on disconnect.

All of it runs in one event loop; only the searcher calls run in worker threads. An item is one query (with its golds).
A job is the items of one request that may share a batch: those of one ``Key``.
"""

import asyncio
import logging
import math
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

log = logging.getLogger("retriever_server")

Item = Any  # a query and its golds, or a query
Call = Callable[[Sequence[Item]], Sequence[Any]]
LONGEST_RETRY_S = 30


class Key(NamedTuple):
    """Items of equal keys may share a searcher call. ``Key("rank", "bm25-1236646c201c", 100)``."""

    kind: str  # "rank" or "search"
    index_id: str
    depth: int


class Overloaded(Exception):
    """The queue is full. The text is for the client, who may ask again after ``retry_after_s``."""

    def __init__(self, message: str, retry_after_s: int) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class Observer(Protocol):
    """What the batcher reports."""

    def batch(self, key: Key, items: int, search_s: float) -> None: ...

    def waited(self, seconds: float) -> None: ...

    def cancelled(self, items: int) -> None: ...


@dataclass(eq=False, slots=True)
class _Job:
    client: str
    key: Key
    call: Call
    items: Sequence[Item]
    answer: "asyncio.Future[list[Any]]"
    arrived: float = field(default_factory=time.monotonic)
    taken: int = 0  # items that have gone into batches
    open: int = 0  # items that have no result yet
    results: list[Any] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class BatchSettings:
    threads: int = 2  # searcher calls at a time; a searcher spreads its batch over cores itself
    max_batch: int = 512  # items per searcher call
    max_wait_s: float = 0.002  # how long an item waits for others to share its call
    max_queue: int = 20_000  # items in the server without an answer
    max_queue_s: float = 30.0  # the time they may take, as measured; below the timeout of clients

    def __post_init__(self) -> None:
        for name in ("threads", "max_batch", "max_queue"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} must be at least 1, got {getattr(self, name)}")
        if self.max_wait_s < 0:
            raise ValueError(f"--max_wait_ms must not be negative, got {self.max_wait_s * 1000:g}")
        if self.max_queue_s <= 0:
            raise ValueError(f"--max_queue_s must be above 0, got {self.max_queue_s:g}")


class Batcher:
    """Starts with the first job and ends with ``close``."""

    def __init__(self, settings: BatchSettings, observer: Observer) -> None:
        self.settings, self.observer = settings, observer
        self.admitted = 0  # items of admitted requests without an answer
        self.waiting = 0  # of these, items in the queue
        self.running = 0  # searcher calls
        self.inside: set[int] = set()  # threads that run one, which the end of the loop does not end
        self._refused: OrderedDict[str, float] = OrderedDict()  # client -> until when it is expected back
        self._line: OrderedDict[str, OrderedDict[Key, deque[_Job]]] = OrderedDict()
        self._pool = ThreadPoolExecutor(settings.threads, thread_name_prefix="search")
        self._timer: asyncio.TimerHandle | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._spent_s, self._done = 0.0, 0.0  # seconds and items of the last batches, recent ones weighted more

    def close(self) -> None:
        self._line.clear()
        self._pool.shutdown(wait=False, cancel_futures=True)

    @contextmanager
    def admit(self, items: int, client: str = "") -> Iterator[None]:
        """Room for a request's items while the block runs; half of it while refused clients are expected back.

        Raises:
            Overloaded: there is no room.
        """
        now = time.monotonic()
        while self._refused and next(iter(self._refused.values())) < now:
            self._refused.popitem(last=False)
        # clients that never pause would otherwise take every place
        share = 1.0 if client in self._refused or not self._refused else 0.5
        most, most_s = share * self.settings.max_queue, share * self.settings.max_queue_s
        total = self.admitted + items
        if self.admitted and (total > most or total * self._item_s() > most_s):
            retry_s = min(max(math.ceil(self.admitted * self._item_s() / 2), 1), LONGEST_RETRY_S)
            self._refused[client] = now + 2 * retry_s + 2
            self._refused.move_to_end(client)
            what = f"the server is busy: {self.admitted} items are waiting and {items} more were sent"
            limit = f"the limit is {self.settings.max_queue}, or {self.settings.max_queue_s:g} s of work"
            raise Overloaded(f"{what}, {limit}: try again later", retry_s)
        self._refused.pop(client, None)
        self.admitted += items
        try:
            yield
        finally:
            self.admitted -= items

    def _item_s(self) -> float:
        """Seconds per item, by the last batches."""
        return self._spent_s / self._done / self.settings.threads if self._done else 0.0

    async def run(self, client: str, key: Key, call: Call, items: Sequence[Item]) -> list[Any]:
        """The results of ``items``: for each what ``call`` returned, or the ValueError that it alone caused.

        Cancelling the task that waits here removes the items that have not started from the queue.

        Raises:
            Exception: any other error of ``call``.
        """
        if not items:
            return []
        answer: asyncio.Future[list[Any]] = asyncio.get_running_loop().create_future()
        job = _Job(client, key, call, items, answer, open=len(items), results=[None] * len(items))
        self._line.setdefault(client, OrderedDict()).setdefault(key, deque()).append(job)
        self.waiting += len(items)
        self._wake()
        try:
            return await answer
        except asyncio.CancelledError:
            self.observer.cancelled(self._drop(job))
            raise

    def _drop(self, job: _Job) -> int:
        """Removes the rest of a job from the queue; returns how many items that were."""
        left = len(job.items) - job.taken
        if left:
            keys = self._line[job.client]
            keys[job.key].remove(job)
            job.taken = len(job.items)
            self.waiting -= left
            self._tidy(job.client, job.key)
        return left

    def _tidy(self, client: str, key: Key) -> None:
        keys = self._line[client]
        if not keys[key]:
            del keys[key]
        if not keys:
            del self._line[client]

    def _wake(self) -> None:
        """Starts the batches that may start now, and sets a timer for the next one."""
        while self._line and self.running < self.settings.threads:
            wait_s = self._wait_s()
            if wait_s > 0:
                if self._timer is None:
                    self._timer = asyncio.get_running_loop().call_later(wait_s, self._ring)
                return
            self.running += 1
            task = asyncio.get_running_loop().create_task(self._answer(self._take()))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    def _ring(self) -> None:
        self._timer = None
        self._wake()

    def _wait_s(self) -> float:
        """How long the queue may still wait for more items."""
        if self.waiting >= self.settings.max_batch:
            return 0.0
        oldest = min(job.arrived for keys in self._line.values() for jobs in keys.values() for job in jobs)
        return oldest + self.settings.max_wait_s - time.monotonic()

    def _take(self) -> list[tuple[_Job, int, int]]:
        """The next batch, as (job, start, end): the next client's key, shared by all clients with items of that key."""
        lead = next(iter(self._line))
        key = next(iter(self._line[lead]))
        self._line.move_to_end(lead)
        self._line[lead].move_to_end(key)
        clients = [lead, *(client for client, keys in self._line.items() if client != lead and key in keys)]
        slices: list[tuple[_Job, int, int]] = []
        room = self.settings.max_batch
        while room and clients:  # one round: the same share for each; those that still have items share what is left
            share = max(1, room // len(clients))
            for client in clients:
                if room:
                    slices.append(taken := self._take_slice(client, key, min(share, room)))
                    room -= taken[2] - taken[1]
            clients = [client for client in clients if key in self._line.get(client, ())]
        self.waiting -= self.settings.max_batch - room
        return slices

    def _take_slice(self, client: str, key: Key, most: int) -> tuple[_Job, int, int]:
        """At most ``most`` items of the client's next request of this key."""
        jobs = self._line[client][key]
        job = jobs.popleft()
        start, job.taken = job.taken, min(job.taken + most, len(job.items))
        if not start:
            self.observer.waited(time.monotonic() - job.arrived)
        if job.taken < len(job.items):
            jobs.append(job)  # behind the client's other requests
        self._tidy(client, key)
        return job, start, job.taken

    async def _answer(self, slices: list[tuple[_Job, int, int]]) -> None:
        job = slices[0][0]
        items = [item for job, start, end in slices for item in job.items[start:end]]
        sizes = [end - start for _, start, end in slices]
        began = time.monotonic()
        try:
            loop = asyncio.get_running_loop()
            outcomes = await loop.run_in_executor(self._pool, self._search, job.call, items, sizes)
        finally:
            took_s = time.monotonic() - began
            self.running -= 1
            self._spent_s, self._done = 0.8 * self._spent_s + took_s, 0.8 * self._done + len(items)
            self._wake()
        self.observer.batch(job.key, len(items), took_s)
        for job, start, end in slices:
            mine, outcomes = outcomes[: end - start], outcomes[end - start :]
            job.results[start:end] = mine
            job.open -= end - start
            if job.answer.done():
                continue
            faults = (one for one in mine if isinstance(one, Exception) and not isinstance(one, ValueError))
            if (fault := next(faults, None)) is not None:
                self._drop(job)
                job.answer.set_exception(fault)
            elif not job.open:
                job.answer.set_result(job.results)

    def _search(self, call: Call, items: Sequence[Item], sizes: Sequence[int]) -> list[Any]:
        me = threading.get_ident()
        self.inside.add(me)
        try:
            return _outcomes(call, items, sizes)
        finally:
            self.inside.discard(me)


def _outcomes(call: Call, items: Sequence[Item], sizes: Sequence[int]) -> list[Any]:
    """One result or exception per item; ``sizes`` are the requests' shares, in order.

    A ValueError is the fault of one item: halving finds which. After any other fault each request is tried by itself,
    so that one client's request cannot fail those that share its batch.
    """
    try:
        return _one_by_one(call, items)
    except Exception as error:  # the requests answer 500 with it
        if len(sizes) == 1:
            return [error] * len(items)
    results: list[Any] = []
    for size in sizes:
        results += _outcomes(call, items[len(results) : len(results) + size], [size])
    return results


def _one_by_one(call: Call, items: Sequence[Item]) -> list[Any]:
    try:
        results = list(call(items))
        assert len(results) == len(items), (len(results), len(items))
        return results
    except ValueError as error:
        if len(items) == 1:
            return [error]
    half = len(items) // 2
    return _one_by_one(call, items[:half]) + _one_by_one(call, items[half:])
