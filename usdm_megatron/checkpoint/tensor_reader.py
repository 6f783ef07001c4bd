"""Tensors of a torch_dist checkpoint, one at a time, by key and layer; no process group, no megatron.core.

Nothing here runs what a pickle says (`metadata_file.py`); damage is found by `resolve_checkpoint`.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

from usdm_megatron.checkpoint.common_file import namespace_allowed
from usdm_megatron.checkpoint.metadata_file import read_metadata
from usdm_megatron.errors import CheckpointError

if TYPE_CHECKING:
    import torch
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata
    from torch.distributed.checkpoint.planner import LoadPlanner, ReadItem


@dataclass(frozen=True)
class StoredTensor:
    """Shape and type of one tensor of a checkpoint; layers are stacked along the first axis."""

    shape: tuple[int, ...]
    dtype: torch.dtype


class TensorReader:
    """What one verified checkpoint directory holds; `read` may be called from several threads.

    Raises `CheckpointError` when there is no `.metadata`, or an unreadable one.
    """

    def __init__(self, directory: Path) -> None:
        from torch.distributed.checkpoint import FileSystemReader
        from torch.distributed.checkpoint.metadata import TensorStorageMetadata

        metadata = read_metadata(directory)
        entries = metadata.state_dict_metadata
        self._reader = FileSystemReader(directory)
        self._reader.set_up_storage_reader(metadata, is_coordinator=True)
        self.directory = directory
        self._entries: dict[str, TensorStorageMetadata] = {
            key: entry for key, entry in entries.items() if isinstance(entry, TensorStorageMetadata)
        }
        self.tensors = {
            key: StoredTensor(tuple(entry.size), entry.properties.dtype)
            for key, entry in self._entries.items()
        }
        self.objects = {key for key in entries if key not in self.tensors}

    def read(self, key: str, layer: int | None = None) -> torch.Tensor:
        """A whole tensor, or with `layer` that layer of one that is stacked over layers; on CPU, as stored.

        Raises `CheckpointError` when there is no such tensor.
        """
        import torch
        from torch.distributed.checkpoint.metadata import ChunkStorageMetadata
        from torch.distributed.checkpoint.planner import LoadPlan
        from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

        if key not in self._entries:
            raise CheckpointError(f"{self.directory} does not hold {key}")
        entry = self._entries[key]
        sizes, offsets = entry.size, torch.Size([0] * len(entry.size))
        if layer is not None:
            sizes, offsets = torch.Size([1, *sizes[1:]]), torch.Size([layer, *offsets[1:]])
        items = create_read_items_for_chunk_list(key, entry, [ChunkStorageMetadata(offsets, sizes)])
        target = torch.empty(sizes, dtype=entry.properties.dtype)
        self._reader.read_data(LoadPlan(items), cast("LoadPlanner", _Filling({key: target}))).wait()
        return target if layer is None else target[0]

    def check_objects(self) -> None:
        """Refuse objects that hold more than plain values and tensors, or cannot be read.

        torch opens them with `weights_only=False` when core loads them. Raises `CheckpointError`.
        """
        import torch

        problems = []
        for index, place in self._reader.storage_data.items():
            if index.fqn not in self.objects:
                continue
            try:
                with (self.directory / place.relative_path).open("rb") as file:
                    file.seek(place.offset)
                    content = io.BytesIO(file.read(place.length))
                with namespace_allowed():
                    torch.load(content, map_location="cpu", weights_only=True)
            except Exception as error:  # torch raises a dozen types on what it refuses
                reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
                problems.append(
                    f"{self.directory / place.relative_path}: {index.fqn} could run code when it is opened, "
                    f"or is damaged ({reason}); it was not written by this package"
                )
        if problems:
            raise CheckpointError(*problems)


class _Filling:
    """The part of torch's `LoadPlanner` that `read_data` calls: where each piece goes."""

    def __init__(self, targets: dict[str, torch.Tensor]) -> None:
        self._targets = targets

    def resolve_tensor(self, item: ReadItem) -> torch.Tensor:
        target = self._targets[item.dest_index.fqn]
        for axis, (start, length) in enumerate(zip(item.dest_offsets, item.lengths, strict=True)):
            target = target.narrow(axis, start, length)
        return target

    def commit_tensor(self, item: ReadItem, tensor: torch.Tensor) -> None:
        """The tensor was filled in place."""
