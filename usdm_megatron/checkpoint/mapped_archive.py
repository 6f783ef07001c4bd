"""One item of a `.distcp` file, mapped instead of read: it is what `torch.save` wrote, a zip archive.

torch copies the values into memory of its own (and DCP from there into the tensor that was asked for);
at the size of a model that is gigabytes of fresh pages, which cost more than hashing the same bytes.

The archive (torch 2.6 and 2.13, `serialization.py: _save`): `data.pkl` describes the tensor, `data/0` is its
storage, `byteorder` says `little`; nothing is compressed.
"""

from __future__ import annotations

import io
import mmap
import pickle  # nosec B403 - restricted below to what describes a tensor
import struct
import sys
import zipfile
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from usdm_megatron.file_reading import map_privately

if TYPE_CHECKING:
    from typing import BinaryIO

    import torch

# Where values begin, from the start of the file, as this package writes it; torch aligns them in the archive.
ALIGNMENT_BYTES = 64
# By the classes that torch names types by in a pickle; they themselves warn that they are deprecated.
_TYPES = {
    "BFloat16Storage": "bfloat16",
    "HalfStorage": "float16",
    "FloatStorage": "float32",
    "DoubleStorage": "float64",
    "ByteStorage": "uint8",
    "CharStorage": "int8",
    "ShortStorage": "int16",
    "IntStorage": "int32",
    "LongStorage": "int64",
    "BoolStorage": "bool",
    "ComplexFloatStorage": "complex64",
    "ComplexDoubleStorage": "complex128",
}
_LOCAL_HEADER = struct.Struct("<26xHH")  # of a file in a zip archive: how long its name and the rest are


def map_tensor(path: Path, offset: int, length: int) -> torch.Tensor:
    """The tensor in the `length` bytes at `offset` of a file, on CPU, as stored.

    Its pages are given back with the tensor. What is written to it stays in this process. Raises
    `OSError`, and `ValueError` or whatever pickle and zipfile do on bytes that are no such archive.
    """
    import torch

    archive = map_privately(path, offset, length)
    files = _files(archive)
    stored = _described(archive, files)
    if stored.is_empty:
        return torch.empty_strided(stored.shape, stored.stride, dtype=stored.dtype)
    begin, size_bytes = files[f"data/{stored.key}"]
    values = torch.frombuffer(archive, dtype=torch.uint8, offset=begin, count=size_bytes)
    if values.data_ptr() % stored.dtype.itemsize:  # others, and earlier versions, do not align archives
        values = values.clone()
    return values.view(stored.dtype).as_strided(stored.shape, stored.stride, stored.offset)


def _files(archive: mmap.mmap) -> dict[str, tuple[int, int]]:
    """Where in the mapping each file of the archive begins, and its size in bytes; by name below its root."""
    with zipfile.ZipFile(cast("BinaryIO", archive)) as found:
        files = found.infolist()
    places = {}
    for file in files:
        if file.compress_type != zipfile.ZIP_STORED:
            raise ValueError(f"holds {file.filename!r} compressed, which torch does not write")
        name, extra = _LOCAL_HEADER.unpack_from(archive, file.header_offset)
        begin = file.header_offset + _LOCAL_HEADER.size + name + extra
        places[PurePosixPath(*PurePosixPath(file.filename).parts[1:]).as_posix()] = (begin, file.file_size)
    return places


@dataclass(frozen=True)
class _Stored:
    """A tensor as the archive describes it."""

    key: str  # of its storage
    dtype: torch.dtype
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def is_empty(self) -> bool:
        return 0 in self.shape


def _described(archive: mmap.mmap, files: dict[str, tuple[int, int]]) -> _Stored:
    begin, size = files.get("byteorder", (0, 0))
    if size and archive[begin : begin + size] != sys.byteorder.encode():
        raise ValueError("was written on a machine of the other byte order, which is not supported")
    begin, size = files["data.pkl"]
    stored = _Unpickler(io.BytesIO(archive[begin : begin + size])).load()
    if not isinstance(stored, _Stored):
        raise ValueError(f"holds a {type(stored).__name__} and no tensor")
    return stored


class _Storage(NamedTuple):
    key: str
    dtype: torch.dtype


def _rebuild_tensor_v2(
    storage: _Storage, offset: int, shape: Any, stride: Any, _grad: bool, _hooks: Any, bits: Any = None
) -> _Stored:
    """What `torch._utils` has under this name, without the values."""
    if bits:
        raise ValueError("holds a conjugated or negated view, which no checkpoint needs")
    return _Stored(storage.key, storage.dtype, offset, tuple(shape), tuple(stride))


class _Unpickler(pickle.Unpickler):
    """Knows what `torch.save` writes for a tensor, and runs nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        import torch

        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _rebuild_tensor_v2
        if (module, name) == ("collections", "OrderedDict"):  # of hooks
            return OrderedDict
        if module == "torch" and name in _TYPES:
            return getattr(torch, _TYPES[name])
        raise pickle.UnpicklingError(f"refers to {module}.{name}")

    def persistent_load(self, saved: Any) -> _Storage:
        _, dtype, key, _location, _numel = saved
        return _Storage(str(key), dtype)
