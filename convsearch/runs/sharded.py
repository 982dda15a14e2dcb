"""The sharded form of a checkpoint: torch.distributed.checkpoint (DCP) with its safetensors storage, one file a rank, no pickle.

``shards/`` holds every parameter under its Hugging Face name and Adam's moments as ``exp_avg/<name>`` and ``exp_avg_sq/<name>``; a file carries the
offsets of its pieces, so that any number of ranks reads what another number has written. The optimizer's step count stands in ``trainer.json``.
"""

import errno
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import async_save as dcp_async_save
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

from convsearch.model import distributed

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(slots=True)
class _Pending:
    """A checkpoint that is being written: ``finish`` (of rank 0) has run when ``finished`` is done."""

    folder: Path
    written: "Future[Any]"
    finished: "Future[None]"


_pending: list[_Pending] = []  # at most one: the next save waits for it


def write(folder: Path, policy: Any, finish: Callable[[], None], *, background: bool) -> None:
    """Every rank writes its shards into ``folder``; then rank 0 calls ``finish``. Collective; with ``background`` returns when the copies are made."""
    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    state, group = _state_of(policy), _group()
    if not background or group is None:
        try:
            with _quiet():
                dcp_save(state, storage_writer=writer, process_group=group)
        except CheckpointException as error:
            raise _os_error(folder, error) from None
        if distributed.rank() == 0:
            finish()
        distributed.barrier()
        return
    written = dcp_async_save(state, storage_writer=writer, process_group=group)
    assert isinstance(written, Future)
    finished: Future[None] = Future()

    def then(done: "Future[Any]") -> None:
        try:
            if done.exception() is None and distributed.rank() == 0:
                finish()
        except Exception as error:  # of another thread: ``wait`` raises it in this one
            finished.set_exception(error)
        else:
            finished.set_result(None)

    written.add_done_callback(then)
    _pending.append(_Pending(folder, written, finished))


def wait() -> None:
    """Waits for the checkpoint that is being written, if there is one; on every rank.

    Raises:
        OSError: it could not be written.
    """
    while _pending:
        pending = _pending.pop()
        try:
            pending.written.result()
        except CheckpointException as error:
            raise _os_error(pending.folder, error) from None
        pending.finished.result()
        distributed.barrier()


def read(path: Path, policy: Any, optimizer_steps: int | None) -> None:
    """Fills the policy's weights, and its moments where ``optimizer_steps`` were taken; on any number of ranks.

    Raises:
        ValueError: names, shapes or bytes are not those of this model's checkpoint.
    """
    if optimizer_steps is not None:
        for parameter in policy.optimizer.param_groups[0]["params"]:
            policy.optimizer.state[parameter] = {
                "step": torch.tensor(
                    float(optimizer_steps), device=parameter.device
                ),  # fused AdamW wants it beside the weights
                **{moment: torch.zeros_like(parameter, memory_format=torch.preserve_format) for moment in MOMENTS},
            }
    load(path / "shards", _state_of(policy), process_group=_group())


def load(shards: Path, state: dict[str, Tensor], process_group: Any = None, reader: Any = None) -> None:
    """Fills the tensors of ``state`` in place, by name; ``reader``: of another storage than ours.

    Raises:
        ValueError: see ``read``.
    """
    try:
        with _quiet():
            dcp_load(state, storage_reader=reader or HuggingFaceStorageReader(str(shards)), process_group=process_group)
    except CheckpointException as error:
        reasons = {str(failure[0]) for failure in error.failures.values()}
        raise ValueError(
            f"checkpoint {shards} is damaged or one of another model: {'; '.join(sorted(reasons))}"
        ) from None


def shapes(shards: Path) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """(shape, type) of every whole tensor in the files, by name."""
    metadata = HuggingFaceStorageReader(str(shards)).read_metadata().state_dict_metadata
    return {name: (tuple(entry.size), entry.properties.dtype) for name, entry in metadata.items()}  # type: ignore[union-attr]


def optimizer_steps(policy: Any) -> int | None:
    """Steps that Adam has taken; None before the first."""
    steps = {int(state["step"]) for state in policy.optimizer.state.values()}
    assert len(steps) <= 1, f"parameters have taken different numbers of steps: {steps}"
    return steps.pop() if steps else None


def _state_of(policy: Any) -> dict[str, Tensor]:
    named = policy.named_parameters()
    moments = {
        f"{moment}/{name}": policy.optimizer.state[parameter][moment]
        for name, parameter in named.items()
        for moment in MOMENTS
        if moment in policy.optimizer.state.get(parameter, {})
    }
    return {**{name: parameter.detach() for name, parameter in named.items()}, **moments}


@cache
def _group() -> Any:
    """A gloo group of all ranks for checkpoints alone, whose messages cannot get between those of the training; None on one process."""
    return torch.distributed.new_group(backend="gloo") if distributed.world_size() > 1 else None


@contextmanager
def _quiet() -> Iterator[None]:
    """Without DCP's remark that one process is alone."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _os_error(folder: Path, error: CheckpointException) -> OSError:
    """The first rank's reason as the error that a full disk would have been without DCP around it."""
    rank, (reason, _) = min(error.failures.items(), key=lambda failure: failure[0])
    number = reason.errno if isinstance(reason, OSError) and reason.errno else errno.EIO
    return OSError(number, f"could not write the checkpoint (rank {rank}: {reason})", str(folder))
