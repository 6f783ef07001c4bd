"""One item of a `.distcp` file, mapped instead of read: it is what `torch.save` wrote, a zip archive.

torch copies the values into memory of its own (and DCP from there into the tensor that was asked for);
at the size of a model that is gigabytes of fresh pages, which cost more than hashing the same bytes.
"""

from __future__ import annotations

import mmap
import struct
import sys
import zipfile
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, cast

from usdm_megatron.file_reading import map_privately

if TYPE_CHECKING:
    from typing import BinaryIO

    import torch

# Where values begin, from the start of the file, as this package writes it; torch aligns them in the archive.
ALIGNMENT_BYTES = 64
_LOCAL_HEADER = struct.Struct("<26xHH")  # of a file in a zip archive: how long its name and the rest are


def map_tensor(path: Path, offset: int, length: int) -> torch.Tensor:
    """The tensor in the `length` bytes at `offset` of a file, on CPU, as stored.

    Its pages are given back with the tensor. What is written to it stays in this process. Raises whatever
    torch and zipfile do on bytes that are no such archive.
    """
    import torch

    archive = map_privately(path, offset, length)
    with torch.serialization.skip_data():  # its type, shape and strides alone; its memory is never touched
        stored = torch.load(cast("BinaryIO", archive), map_location="cpu", weights_only=True)
    if not isinstance(stored, torch.Tensor):
        raise ValueError(f"holds a {type(stored).__name__} and no tensor")
    if not stored.numel():
        return torch.empty_strided(stored.shape, stored.stride(), dtype=stored.dtype)
    begin, size_bytes = _values(archive)
    values = torch.frombuffer(archive, dtype=torch.uint8, offset=begin, count=size_bytes)
    if values.data_ptr() % stored.dtype.itemsize:  # others, and earlier versions, do not align archives
        values = values.clone()
    return values.view(stored.dtype).as_strided(stored.shape, stored.stride(), stored.storage_offset())


def _values(archive: mmap.mmap) -> tuple[int, int]:
    """Where in the mapping the one storage of the archive begins, and its size in bytes."""
    with zipfile.ZipFile(cast("BinaryIO", archive)) as files:
        found = files.infolist()
    storages = [file for file in found if PurePosixPath(file.filename).parent.name == "data"]
    if len(storages) != 1 or storages[0].compress_type != zipfile.ZIP_STORED:
        raise ValueError(f"holds {len(storages)} storages; one is expected, not compressed")
    for begin, size in (_extent(archive, file) for file in found if file.filename.endswith("/byteorder")):
        if archive[begin : begin + size] != sys.byteorder.encode():
            raise ValueError("was written on a machine of the other byte order, which is not supported")
    return _extent(archive, storages[0])


def _extent(archive: mmap.mmap, file: zipfile.ZipInfo) -> tuple[int, int]:
    """Where the bytes of a file that is not compressed begin, and how many there are."""
    name, extra = _LOCAL_HEADER.unpack_from(archive, file.header_offset)
    return file.header_offset + _LOCAL_HEADER.size + name + extra, file.file_size
