"""Waiting for Ray's workers: always with a time limit; a dead worker ends the wait at once."""

import time
from collections.abc import Iterator, Sequence
from typing import Any

from convsearch.cli import Unavailable

PATIENCE_S = 20.0  # after one worker has failed: how long Ray may take to report that another one died


class WorkerLost(Unavailable):
    """A worker process, or its node, is gone or does not answer."""


def get_all(refs: Sequence[Any], what: str, timeout_s: float) -> list[Any]:
    """The results of all calls, in their order.

    Raises:
        WorkerLost: a worker died, or did not answer within ``timeout_s``.
        Exception: what the call itself raised.
    """
    import ray

    pending, found, deadline = list(refs), {}, time.monotonic() + timeout_s
    while pending:
        ready, pending = ray.wait(pending, num_returns=1, timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            raise WorkerLost(f"{what}: {len(pending)} of {len(refs)} workers have not answered within {timeout_s:g} s")
        found[ready[0]] = get_one(ready[0], what, pending)
    return [found[ref] for ref in refs]


def get_one(ref: Any, what: str, others: Sequence[Any] = ()) -> Any:
    """The result of a call that is ready. If it failed because another worker died, raises WorkerLost for that one."""
    import ray
    from ray.exceptions import RayError, RayTaskError

    try:
        return ray.get(ref, timeout=60)
    except RayTaskError as error:
        cause = error.cause if isinstance(error.cause, Exception) else error
        if isinstance(cause, RayError):  # the call itself needed a worker that died
            raise WorkerLost(f"{what}: {_sentence(cause)}") from error
        if isinstance(cause, ValueError | OSError) and not isinstance(cause, ConnectionError):
            raise cause from error
        lost = _lost(others)
        if lost is None and "by peer" in str(cause):  # gloo's words for the end of another process
            lost = _sentence(cause)
        if lost is not None:
            raise WorkerLost(f"{what}: {lost}") from error
        raise
    except RayError as error:
        raise WorkerLost(f"{what}: {_sentence(error)}") from error


def streamed(generators: Sequence[Any], what: str, timeout_s: float) -> Iterator[tuple[int, Any]]:
    """(number of the call, item) of several streaming calls; ``timeout_s``: longest time between two items."""
    import ray
    from ray.exceptions import RayError

    live = dict(enumerate(generators))
    while live:
        ready, _ = ray.wait(list(live.values()), num_returns=1, timeout=timeout_s)
        if not ready:
            raise WorkerLost(f"{what}: nothing has arrived within {timeout_s:g} s")
        call = next(number for number, generator in live.items() if generator is ready[0])
        try:
            ref = next(ready[0])
        except StopIteration:
            del live[call]
            continue
        except RayError as error:
            raise WorkerLost(f"{what}: {_sentence(error)}") from error
        yield call, get_one(ref, what)


def _lost(refs: Sequence[Any]) -> str | None:
    """Ray's words about the first of these calls whose worker is dead; None if no worker is."""
    import ray
    from ray.exceptions import RayError, RayTaskError

    pending, deadline = list(refs), time.monotonic() + PATIENCE_S
    while pending and time.monotonic() < deadline:
        ready, pending = ray.wait(pending, num_returns=1, timeout=max(0.0, deadline - time.monotonic()))
        for ref in ready:
            try:
                ray.get(ref, timeout=60)
            except RayTaskError:
                continue
            except RayError as error:
                return _sentence(error)
    return None


def _sentence(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
