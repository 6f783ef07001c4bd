"""Safetensors files written one tensor at a time; the library's `save_file` wants all of a file in memory.

Format: 8 bytes with the header's length, the header (JSON, padded with spaces to a multiple of 8), the
tensors without gaps (https://github.com/huggingface/safetensors#format).
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from usdm_megatron.checkpoint.distcp_writer import HashingStream
from usdm_megatron.convert.weight_types import TORCH_TYPES, TypeName, safetensors_name

INDEX_FILE = "model.safetensors.index.json"


@dataclass(frozen=True)
class ShardPlan:
    """One file: its name, and the names and shapes of its tensors in order."""

    file: str
    shapes: dict[str, tuple[int, ...]]


def plan_shards(
    shapes: Mapping[str, tuple[int, ...]], weight_type: TypeName, max_bytes: int
) -> list[ShardPlan]:
    """Tensors to files, in order; one that is larger than `max_bytes` gets a file of its own."""
    shards: list[dict[str, tuple[int, ...]]] = []
    filled = 0
    for name, shape in shapes.items():
        size = _size_bytes(shape, weight_type)
        if not shards or filled + size > max_bytes:
            shards.append({})
            filled = 0
        shards[-1][name] = shape
        filled += size
    if len(shards) == 1:
        return [ShardPlan("model.safetensors", shards[0])]
    return [
        ShardPlan(f"model-{number:05d}-of-{len(shards):05d}.safetensors", shard)
        for number, shard in enumerate(shards, start=1)
    ]


def index_of(shards: Iterable[ShardPlan], weight_type: TypeName) -> dict[str, object]:
    """The content of `model.safetensors.index.json`."""
    files = {name: shard.file for shard in shards for name in shard.shapes}
    total = sum(_size_bytes(shape, weight_type) for shard in shards for shape in shard.shapes.values())
    return {"metadata": {"total_size": total}, "weight_map": files}


def write_shard(
    directory: Path,
    plan: ShardPlan,
    weight_type: TypeName,
    tensors: Iterable[tuple[str, torch.Tensor]],
    on_bytes: Callable[[int], None] | None = None,
    stopped: threading.Event | None = None,
) -> str:
    """Write and sync one file; `tensors` come in the plan's order and type. Returns its sha256."""
    dtype = TORCH_TYPES[weight_type]
    with HashingStream(directory / plan.file, on_bytes, stopped) as stream:
        stream.write(_header(plan, weight_type))
        wanted = iter(plan.shapes.items())
        for name, tensor in tensors:
            expected = next(wanted)
            assert (name, tuple(tensor.shape)) == expected, f"{name} {tensor.shape} is not {expected}"
            assert tensor.dtype == dtype, f"{name} is {tensor.dtype}, not {dtype}"
            data = tensor.contiguous().view(-1).view(torch.uint8)
            stream.write(data.numpy())
        assert next(wanted, None) is None, "a tensor is missing"
        return stream.sync()


def _header(plan: ShardPlan, weight_type: TypeName) -> bytes:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    begin = 0
    for name, shape in plan.shapes.items():
        end = begin + _size_bytes(shape, weight_type)
        header[name] = {
            "dtype": safetensors_name(weight_type),
            "shape": list(shape),
            "data_offsets": [begin, end],
        }
        begin = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _size_bytes(shape: tuple[int, ...], weight_type: TypeName) -> int:
    return torch.Size(shape).numel() * TORCH_TYPES[weight_type].itemsize
