"""Checkpoints that other trainers have written with torch.distributed.checkpoint's default storage, read without running what they may carry.

Their index, ``.metadata``, is a pickle. Here it is read by an unpickler that knows the few names which DCP itself writes and refuses any other before it is
called; the tensors are read by torch with ``weights_only``.
"""

import pickle
from pathlib import Path
from typing import IO, Any

import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata

_METADATA = "torch.distributed.checkpoint.metadata"
_KNOWN = {
    ("pathlib", "PosixPath"),
    ("collections", "OrderedDict"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    *(
        (_METADATA, name)
        for name in (
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorProperties",
            "TensorStorageMetadata",
            "_MEM_FORMAT_ENCODING",
        )
    ),
}


class _Index(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if (module, name) not in _KNOWN and not is_dtype:
            raise ValueError(f"it names {module}.{name}, which torch.distributed.checkpoint does not write")
        return super().find_class(module, name)


def _read_index(file: IO[bytes], path: Path) -> Metadata:
    try:
        metadata = _Index(file).load()
    except (ValueError, pickle.UnpicklingError, EOFError, AttributeError, TypeError, IndexError) as error:
        raise ValueError(f"{path} is damaged or no index of torch.distributed.checkpoint: {error}") from None
    if not isinstance(metadata, Metadata):
        raise ValueError(f"{path} is no index of torch.distributed.checkpoint: it holds a {type(metadata).__name__}")
    return metadata


class TorchDcpReader(FileSystemReader):
    """DCP's reader of its default storage, with the index read as above."""

    def __init__(self, folder: Path):
        super().__init__(folder)
        self.folder = folder

    def read_metadata(self, *arguments: Any, **named: Any) -> Metadata:
        path = self.folder / ".metadata"
        with path.open("rb") as file:
            metadata = _read_index(file, path)
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


def weights_of(folder: Path) -> dict[str, tuple[str, tuple[int, ...], torch.dtype]]:
    """The model's tensors: Hugging Face name -> (name in the checkpoint, shape, type).

    The model may stand at the top or under any prefix (``model.``, ``app.model.``): the one before ``model.embed_tokens.weight``.

    Raises:
        ValueError: no such tensor, or more than one.
    """
    entries = TorchDcpReader(folder).read_metadata().state_dict_metadata
    anchor = "model.embed_tokens.weight"
    found = [name for name in entries if name == anchor or name.endswith(f".{anchor}")]
    roots = sorted(
        {name.removesuffix(anchor) for name in found}
        - {name.removesuffix(anchor) for name in found if "exp_avg" in name}
    )
    if len(roots) != 1:
        raise ValueError(f"{folder} holds {len(roots)} models by the name {anchor}: one is needed")
    return {
        name.removeprefix(roots[0]): (name, tuple(entry.size), entry.properties.dtype)
        for name, entry in entries.items()
        if isinstance(entry, TensorStorageMetadata)
        and name.startswith((f"{roots[0]}model.", f"{roots[0]}lm_head."))
        and "exp_avg" not in name
    }
