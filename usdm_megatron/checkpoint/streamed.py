"""Write a checkpoint whose tensors are made one at a time, when it is their turn: nothing holds the model.

One process, no process group, no megatron.core; the files are those that core's own planner would write
for the same tensors on one rank.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import (
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)

from usdm_megatron.checkpoint.commit import commit_checkpoint
from usdm_megatron.checkpoint.common_file import write_common, write_format
from usdm_megatron.checkpoint.distcp_writer import DistcpWriter
from usdm_megatron.checkpoint.resolve import CheckpointName


@dataclass(frozen=True)
class StreamedTensor:
    """A tensor of a checkpoint, or with `layer` (of `layers`) that layer of one that is stacked.

    `make()` gives it in `shape` and `dtype` when it is to be written, in a worker's thread.
    """

    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], torch.Tensor]
    layer: int | None = None
    layers: int = 1


@dataclass(frozen=True)
class EmptyObject:
    """What a module without extra state has under `{key}._extra_state`: None, one a layer."""

    key: str
    layer: int
    layers: int


def save_streamed(
    root: Path,
    name: CheckpointName,
    tensors: Sequence[StreamedTensor],
    objects: Iterable[EmptyObject],
    common: Mapping[str, Any],
    extra_files: Callable[[Path], None],
    *,
    workers: int = 1,
    replace: bool = False,
    on_bytes: Callable[[int], None] | None = None,
) -> Path:
    """Write one checkpoint by the commit protocol, in `workers` files and threads; returns its directory.

    `extra_files(directory)` is called when the tensors are written. The bytes depend on the tensors
    and `workers` alone. Raises `CheckpointError`, and the `UserError` of a `make` as it is.
    """

    def write(directory: Path) -> dict[str, str]:
        write_common(directory, dict(common))
        write_format(directory)
        writer = DistcpWriter(directory, workers=workers, on_bytes=on_bytes)
        _write_tensors(writer, _StreamPlanner(tensors, objects))
        extra_files(directory)
        return writer.hashes

    return commit_checkpoint(root, name, write, replace=replace)


def _write_tensors(writer: DistcpWriter, planner: SavePlanner) -> None:
    """`dcp.save` on one process, without its collectives, which would wrap what a `make` raises."""
    writer.set_up_storage_writer(is_coordinator=True)
    local = writer.prepare_local_plan(planner.create_local_plan())
    plans, metadata = planner.create_global_plan([local])
    (plan,) = writer.prepare_global_plan(plans)
    written = writer.write_data(planner.finish_plan(plan), planner).wait()
    writer.finish(metadata, [written])


class _StreamPlanner(SavePlanner):
    """Knows names and shapes; `resolve_data` makes the tensor when the writer asks for it."""

    def __init__(self, tensors: Iterable[StreamedTensor], objects: Iterable[EmptyObject]) -> None:
        self._tensors = {_tensor_index(tensor): tensor for tensor in tensors}
        self._objects = [_object_index(item) for item in objects]

    def set_up_planner(self, *_: Any, **__: Any) -> None:
        """There is no state dict to look at."""

    def create_local_plan(self) -> SavePlan:
        tensors = [_write_item(index, tensor) for index, tensor in self._tensors.items()]
        return SavePlan([*tensors, *(WriteItem(index, WriteItemType.BYTE_IO) for index in self._objects)])

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        return create_default_global_save_plan(all_plans)

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        return new_plan

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor | io.BytesIO:
        if write_item.type == WriteItemType.BYTE_IO:
            data = io.BytesIO()
            torch.save([None], data)  # core's form of an object without content
            return data
        source = self._tensors[MetadataIndex(write_item.index.fqn, write_item.index.offset)]
        tensor = source.make()
        assert tensor.shape == source.shape and tensor.dtype == source.dtype, source.key
        return tensor if source.layer is None else tensor[None]


def _tensor_index(tensor: StreamedTensor) -> MetadataIndex:
    return MetadataIndex(tensor.key, _chunk(tensor).offsets)


def _object_index(item: EmptyObject) -> MetadataIndex:
    return MetadataIndex(f"{item.key}/shard_{item.layer}_{item.layers}")  # core's `ShardedObject.unique_key`


def _write_item(index: MetadataIndex, tensor: StreamedTensor) -> WriteItem:
    whole = tensor.shape if tensor.layer is None else (tensor.layers, *tensor.shape)
    data = TensorWriteData(_chunk(tensor), TensorProperties(dtype=tensor.dtype), torch.Size(whole))
    return WriteItem(index, WriteItemType.SHARD, tensor_data=data)


def _chunk(tensor: StreamedTensor) -> ChunkStorageMetadata:
    zeros = [0] * len(tensor.shape)
    if tensor.layer is None:
        return ChunkStorageMetadata(torch.Size(zeros), torch.Size(tensor.shape))
    return ChunkStorageMetadata(torch.Size([tensor.layer, *zeros]), torch.Size([1, *tensor.shape]))
