"""Tensors of a torch_dist checkpoint, one at a time, by key and layer; no process group, no megatron.core.

Nothing here runs what a pickle says (`metadata_file.py`). Hashes find damage (`integrity.py`); what is read
here before they have is only as good as they turn out.
"""

from __future__ import annotations

import io
import pickle  # nosec B403 - for its error
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from usdm_megatron.checkpoint.common_file import namespace_allowed
from usdm_megatron.checkpoint.mapped_archive import map_tensor
from usdm_megatron.checkpoint.metadata_file import read_metadata
from usdm_megatron.errors import CheckpointError

if TYPE_CHECKING:
    import torch
    from torch.distributed.checkpoint.filesystem import _StorageInfo
    from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata
    from torch.distributed.checkpoint.planner import ReadItem


@dataclass(frozen=True)
class StoredTensor:
    """Shape and type of one tensor of a checkpoint; layers are stacked along the first axis."""

    shape: tuple[int, ...]
    dtype: torch.dtype


class TensorReader:
    """What one checkpoint directory holds; `read` may be called from several threads.

    Raises `CheckpointError` when there is no `.metadata`, or an unreadable one.
    """

    def __init__(self, directory: Path) -> None:
        from torch.distributed.checkpoint.metadata import TensorStorageMetadata

        metadata = read_metadata(directory)
        entries = metadata.state_dict_metadata
        self._places: dict[MetadataIndex, _StorageInfo] = metadata.storage_data or {}
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

        What lies in the file in one piece is mapped, not copied. What is written to it stays in this
        process. Raises `CheckpointError` when there is no such tensor, or its bytes are damaged in a way
        that shows.
        """
        import torch
        from torch.distributed.checkpoint.metadata import ChunkStorageMetadata
        from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

        if key not in self._entries:
            raise CheckpointError(f"{self.directory} does not hold {key}")
        entry = self._entries[key]
        sizes, offsets = entry.size, torch.Size([0] * len(entry.size))
        if layer is not None:
            sizes, offsets = torch.Size([1, *sizes[1:]]), torch.Size([layer, *offsets[1:]])
        items = create_read_items_for_chunk_list(key, entry, [ChunkStorageMetadata(offsets, sizes)])
        if sum(item.lengths.numel() for item in items) != sizes.numel():
            raise CheckpointError(
                f"{self.directory} does not hold all of {key}: .metadata names too few chunks"
            )
        if len(items) == 1:
            tensor = self._piece(items[0])
        else:
            tensor = torch.empty(sizes, dtype=entry.properties.dtype)
            for item in items:
                _narrowed(tensor, item.dest_offsets, item.lengths).copy_(self._piece(item))
        return tensor if layer is None else tensor[0]

    def _piece(self, item: ReadItem) -> torch.Tensor:
        """The part of one stored chunk that `item` asks for."""
        place = self._places[item.storage_index]
        path = self.directory / place.relative_path
        key, entry = item.storage_index.fqn, self._entries[item.storage_index.fqn]
        try:
            if transforms := getattr(place, "transform_descriptors", None):  # torch 2.6 has none
                raise ValueError(f"is transformed by {transforms[0]}, which is not supported")
            chunk = map_tensor(path, place.offset, place.length)
            if chunk.dtype != entry.properties.dtype:
                raise ValueError(f"holds values of {chunk.dtype}, described as {entry.properties.dtype}")
            piece = _narrowed(chunk, item.storage_offsets, item.lengths)
            if piece.shape != item.lengths:
                raise ValueError(f"has shape {list(piece.shape)}, described as {list(item.lengths)}")
            return piece
        except Exception as error:  # torch raises a dozen types on bytes that it did not write
            raise CheckpointError(f"{path}: {key} cannot be read: {_reason(error)}") from error

    def check_objects(self) -> None:
        """Refuse objects that hold more than plain values and tensors, or cannot be read.

        torch opens them with `weights_only=False` when core loads them. Raises `CheckpointError`.
        """
        import torch

        problems = []
        for index, place in self._places.items():
            if index.fqn not in self.objects:
                continue
            try:
                with (self.directory / place.relative_path).open("rb") as file:
                    file.seek(place.offset)
                    content = io.BytesIO(file.read(place.length))
                with namespace_allowed():
                    torch.load(content, map_location="cpu", weights_only=True)
            except Exception as error:  # torch raises a dozen types on what it refuses
                problems.append(
                    f"{self.directory / place.relative_path}: {index.fqn} could run code when it is opened, "
                    f"or is damaged ({_reason(error)}); it was not written by this package"
                )
        if problems:
            raise CheckpointError(*problems)


def _reason(error: Exception) -> str:
    """In one line, and without torch's advice to load with `weights_only=False`."""
    if isinstance(error, pickle.UnpicklingError):
        return "it holds more than plain values and tensors, or bytes that are no pickle"
    return str(error).strip().partition("\n")[0] or type(error).__name__


def _narrowed(tensor: torch.Tensor, offsets: Sequence[int], lengths: Sequence[int]) -> torch.Tensor:
    for axis, (start, length) in enumerate(zip(offsets, lengths, strict=True)):
        tensor = tensor.narrow(axis, start, length)
    return tensor
