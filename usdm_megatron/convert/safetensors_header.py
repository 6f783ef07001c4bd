"""The header of a safetensors file, checked before anything trusts it.

Format (huggingface/safetensors 0.8, README): 8 bytes little-endian header size, a JSON object
`name → {dtype, shape, data_offsets}` padded with spaces, then the tensors end to end.
The rules are upstream's; the reader is our own, so that every problem has a name and a file, and
memory is bounded by what the file really holds.
"""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from usdm_megatron.convert.foreign_bytes import MOST_PROBLEMS, escaped, first_problems, named
from usdm_megatron.errors import ConversionError

_SIZE_BYTES = 8
_MOST_HEADER_BYTES = 16 << 20  # 100,000 tensors take 12 MB; upstream's 100 MB would parse into 2.5 GB
_LARGEST_SIZE = 2**63 - 1
_MOST_DIMENSIONS = 64
_LFS_POINTER = b"version https://git-lfs"

_BITS = {
    **dict.fromkeys(("F4",), 4),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 16),
    **dict.fromkeys(("I32", "U32", "F32"), 32),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 64),
}


@dataclass(frozen=True)
class SourceTensor:
    """One tensor of the source: its file, shape, type (safetensors' name: `BF16`) and place."""

    file: str
    shape: tuple[int, ...]
    dtype: str
    begin: int  # of its first byte in the file
    size_bytes: int


def read_header(path: Path) -> dict[str, SourceTensor]:
    """The tensors of a safetensors file by name, in the order of their bytes.

    Raises `ConversionError` with everything that is wrong with the file.
    """
    try:
        with path.open("rb", buffering=0) as file:
            found_bytes = os.fstat(file.fileno()).st_size
            text = _header_text(file, path, found_bytes)
    except OSError as error:
        raise ConversionError(f"{path} cannot be read: {error.strerror}") from error
    data_begin = _SIZE_BYTES + len(text)
    tensors: dict[str, SourceTensor] = {}
    problems = [] if text.startswith(b"{") else ["its header does not begin with {"]
    entries = _parse(text, path)
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        problems.append("__metadata__ must be an object of strings")
    for name, entry in entries.items():
        tensor = _tensor(path.name, entry, data_begin)
        if isinstance(tensor, SourceTensor):
            tensors[name] = tensor
        else:
            problems.append(f"tensor {named(name)}: {tensor}")
        if len(problems) > MOST_PROBLEMS:
            break
    if not problems:  # otherwise a malformed entry would look like a hole
        tensors = dict(sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].size_bytes)))
        problems = first_problems(_layout_problems(tensors, data_begin, found_bytes))
    if problems:
        raise ConversionError(*first_problems(f"{path}: {problem}" for problem in problems))
    return tensors


def _header_text(file: BinaryIO, path: Path, found_bytes: int) -> bytes:
    begin = file.read(len(_LFS_POINTER))
    if begin == _LFS_POINTER:
        raise ConversionError(f"{path} is a Git LFS pointer, not the weights; run `git lfs pull` there")
    if found_bytes < _SIZE_BYTES:
        raise ConversionError(
            f"{path}: truncated: expected at least {_SIZE_BYTES} bytes, found {found_bytes}; "
            "download or copy it again"
        )
    header_bytes = int.from_bytes(begin[:_SIZE_BYTES], "little")
    if header_bytes > _MOST_HEADER_BYTES:
        raise ConversionError(
            f"{path} is no safetensors file: its first 8 bytes announce a header of {header_bytes:,} bytes, "
            f"and at most {_MOST_HEADER_BYTES:,} are read; download it again"
        )
    if header_bytes > found_bytes - _SIZE_BYTES:
        raise ConversionError(
            f"{path}: truncated: expected at least {_SIZE_BYTES + header_bytes:,} bytes for its header, "
            f"found {found_bytes:,}; download or copy it again"
        )
    file.seek(_SIZE_BYTES)
    text = file.read(header_bytes)
    if len(text) < header_bytes:
        raise ConversionError(f"{path} became shorter while it was read")
    return text


def _parse(text: bytes, path: Path) -> dict[str, Any]:
    try:
        entries = json.loads(
            text.decode("utf-8"), object_pairs_hook=_without_duplicates, parse_constant=_no_constant
        )
    except RecursionError as error:
        raise ConversionError(f"{path} cannot be read: its header is nested too deeply") from error
    except ValueError as error:
        raise ConversionError(f"{path} cannot be read: its header is malformed: {error}") from error
    if not isinstance(entries, dict):
        raise ConversionError(f"{path} cannot be read: its header must be a JSON object")
    return entries


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) < len(pairs):
        twice = [name for name, count in Counter(name for name, _ in pairs).items() if count > 1]
        raise ValueError(f"{', '.join(map(named, twice[:MOST_PROBLEMS]))} described more than once")
    return members


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


def _tensor(file: str, entry: object, data_begin: int) -> SourceTensor | str:
    """The tensor that an entry describes, or what is wrong with it."""
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        return f"{escaped(entry)} must be an object of dtype, shape and data_offsets"
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _BITS:
        return f"dtype {escaped(dtype)} is unknown; known are {', '.join(_BITS)}"
    if not _are_sizes(shape) or len(shape) > _MOST_DIMENSIONS:
        return f"shape {escaped(shape)} must be a list of at most {_MOST_DIMENSIONS} sizes below 2**63"
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        return f"data_offsets {escaped(offsets)} must be [begin, end] with 0 <= begin <= end < 2**63"
    begin, end = offsets
    # Sizes of 0 left out: no reader may overflow, whatever the order in which it multiplies.
    if math.prod(size for size in shape if size) > _LARGEST_SIZE // _BITS[dtype]:
        return f"shape {escaped(shape)} has more elements than an address space"
    bits = math.prod(shape) * _BITS[dtype]
    if bits != (end - begin) * 8:
        return f"{dtype} {escaped(shape)} takes {bits / 8:,g} bytes, data_offsets hold {end - begin:,}"
    return SourceTensor(file, tuple(shape), dtype, data_begin + begin, end - begin)


def _are_sizes(values: object) -> bool:
    return isinstance(values, list) and all(
        type(value) is int and 0 <= value <= _LARGEST_SIZE
        for value in values  # a bool is no size
    )


def _layout_problems(tensors: dict[str, SourceTensor], data_begin: int, found_bytes: int) -> Iterator[str]:
    """Tensors, sorted by their place, must lie end to end up to the end of the file."""
    end = data_begin
    for name, tensor in tensors.items():
        if tensor.begin < end:
            yield f"tensor {named(name)} overlaps the one before it by {end - tensor.begin:,} bytes"
        elif tensor.begin > end:
            yield f"{tensor.begin - end:,} bytes before tensor {named(name)} belong to no tensor"
        end = max(end, tensor.begin + tensor.size_bytes)
    if found_bytes < end:
        yield f"truncated: expected {end:,} bytes, found {found_bytes:,}; download or copy it again"
    elif found_bytes > end:
        yield f"{found_bytes - end:,} bytes behind the last tensor belong to none (expected {end:,} bytes)"
