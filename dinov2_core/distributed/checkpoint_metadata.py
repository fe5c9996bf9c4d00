"""Reads the metadata of a PyTorch checkpoint, a pickle, without running code that it names."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta

_ALLOWED = {
    "pathlib": {"PosixPath"},
    "torch": {"Size"},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.metadata": {
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
}
"""Names that metadata of tensors consists of, besides torch's types of numbers."""


class MetadataUnpickler(pickle.Unpickler):
    """Unpickles the index of a checkpoint of tensors and nothing else.

    Raises:
        UnpicklingError: The pickle names anything that such an index does not need.
    """

    def find_class(self, module: str, name: str) -> Any:
        """The class or function of that name, if it is one of an index."""
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or name in _ALLOWED.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(
            f"{module}.{name} does not belong into a checkpoint's metadata"
        )


class TensorReader(FileSystemReader):
    """Reads tensors from the files of a checkpoint's directory."""

    def read_metadata(self, *_args: Any, **_kwargs: Any) -> Metadata:
        """The index, which may name files of the same directory only."""
        with (Path(self.path) / ".metadata").open("rb") as file:
            metadata = MetadataUnpickler(file).load()
        names = {info.relative_path for info in metadata.storage_data.values()}
        outside = sorted(name for name in names if Path(name).name != name)
        if outside:
            raise pickle.UnpicklingError(f"{outside[0]} is not a file of the checkpoint")
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata  # type: ignore[no-any-return]
