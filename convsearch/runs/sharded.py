"""The sharded form of a checkpoint: torch.distributed.checkpoint (DCP) with safetensors storage, one file per rank.

``shards/`` holds every parameter under its Hugging Face name and Adam's moments as ``exp_avg/<name>`` and
``exp_avg_sq/<name>``. A file records the offsets of its pieces, so that any number of ranks reads what another number
of ranks has written. The step count of the optimizer is in ``trainer.json``.
"""

import errno
import warnings
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import async_save as dcp_async_save
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

from convsearch.model import distributed

warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # DCP warns of a single process
MOMENTS = ("exp_avg", "exp_avg_sq")


class Checkpointed(Protocol):
    """What a checkpoint needs of a policy; tensors by the names of the Hugging Face model."""

    @property
    def causal_lm(self) -> Any: ...
    @property
    def optimizer(self) -> torch.optim.Optimizer | None: ...
    def named_parameters(self) -> dict[str, nn.Parameter]: ...
    def weights(self) -> dict[str, Tensor]: ...
    def optimizer_state(self) -> dict[str, Tensor]: ...
    def load_optimizer_state(self, state: dict[str, Tensor]) -> None: ...


_background = ThreadPoolExecutor(max_workers=1)
_pending: list[tuple[Path, Future[None]]] = []  # (folder, finished): at most one, because the next save waits for it


def write(folder: Path, policy: Checkpointed, finish: Callable[[], None], *, background: bool) -> None:
    """Every rank writes its shards into ``folder``; then rank 0 calls ``finish``. A collective call.

    Args:
        background: return once the tensors are copied.
    """
    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    state, group = _state_of(policy), _group()
    if not background or group is None:
        try:
            dcp_save(state, storage_writer=writer, process_group=group)
        except CheckpointException as error:
            raise _os_error(folder, error) from None
        if distributed.rank() == 0:
            finish()
        distributed.barrier()
        return
    written = dcp_async_save(state, storage_writer=writer, process_group=group)
    assert isinstance(written, Future)

    def finish_when_written() -> None:
        written.result()
        if distributed.rank() == 0:
            finish()

    _pending.append((folder, _background.submit(finish_when_written)))


def wait() -> None:
    """Waits on every rank for the checkpoint in progress, if there is one.

    Raises:
        OSError: it could not be written.
    """
    while _pending:
        folder, finished = _pending.pop()
        try:
            finished.result()
        except CheckpointException as error:
            raise _os_error(folder, error) from None
        distributed.barrier()


def read(shards: Path, policy: Checkpointed, optimizer_steps: int | None) -> None:
    """Fills the weights of the policy, and Adam's moments if it has taken ``optimizer_steps``; on any number of ranks.

    Raises:
        ValueError: names, shapes or bytes are not those of a checkpoint of this model.
    """
    if optimizer_steps is not None:
        assert policy.optimizer is not None
        for parameter in policy.optimizer.param_groups[0]["params"]:
            # Fused AdamW needs the step count on the device of the weights.
            state = {"step": torch.tensor(float(optimizer_steps), device=parameter.device)}
            zeros = {name: torch.zeros_like(parameter, memory_format=torch.preserve_format) for name in MOMENTS}
            policy.optimizer.state[parameter] = state | zeros
    load(shards, _state_of(policy), process_group=_group())


def load(folder: Path, state: dict[str, Tensor], process_group: Any = None) -> None:
    """Fills the tensors of ``state`` in place, by name, from the safetensors files of ``folder``.

    Raises:
        ValueError: see ``read``.
    """
    try:
        dcp_load(state, storage_reader=HuggingFaceStorageReader(str(folder)), process_group=process_group)
    except CheckpointException as error:
        reasons = "; ".join(sorted({str(failure[0]) for failure in error.failures.values()}))
        raise ValueError(f"checkpoint {folder} is damaged or belongs to another model: {reasons}") from None


def shapes(folder: Path) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """(shape, type) of every whole tensor in the weight files of ``folder``, by name."""
    metadata = HuggingFaceStorageReader(str(folder)).read_metadata()
    files = {index.fqn: Path(info.relative_path).name for index, info in metadata.storage_data.items()}
    return {
        name: (tuple(entry.size), entry.properties.dtype)  # type: ignore[union-attr]
        for name, entry in metadata.state_dict_metadata.items()
        if files[name].startswith(("model", "shard-"))
    }


def optimizer_steps(policy: Checkpointed) -> int | None:
    """How many steps Adam has taken; None before the first."""
    assert policy.optimizer is not None
    steps = {int(state["step"]) for state in policy.optimizer.state.values()}
    assert len(steps) <= 1, f"parameters have taken different numbers of steps: {steps}"
    return steps.pop() if steps else None


def _state_of(policy: Checkpointed) -> dict[str, Tensor]:
    assert policy.optimizer is not None
    state: dict[str, Tensor] = {}
    for name, parameter in policy.named_parameters().items():
        moments = policy.optimizer.state.get(parameter, {})
        state |= {name: parameter.detach()} | {f"{key}/{name}": moments[key] for key in MOMENTS if key in moments}
    return state


@cache
def _group() -> Any:
    """A gloo group of all ranks for checkpoints, whose messages cannot mix with the training's. None on one process."""
    return torch.distributed.new_group(backend="gloo") if distributed.world_size() > 1 else None


def _os_error(folder: Path, error: CheckpointException) -> OSError:
    """The error of the first rank that failed, as the OSError that DCP has wrapped."""
    rank, (reason, _) = min(error.failures.items(), key=lambda failure: failure[0])
    number = reason.errno if isinstance(reason, OSError) and reason.errno else errno.EIO
    return OSError(number, f"could not write the checkpoint (rank {rank}: {reason})", str(folder))
