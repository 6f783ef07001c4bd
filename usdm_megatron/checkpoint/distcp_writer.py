"""Writes `__{rank}_{n}.distcp` files: one tensor in memory at a time, hashed on the way.

torch's own `FileSystemWriter` keeps the last tensor of every key until its file is done, loses the
exceptions of its threads, and leaves the hash to a second pass over what it wrote
(torch 2.13.0, `distributed/checkpoint/filesystem.py:375`). The format on disk is torch's.
"""

from __future__ import annotations

import hashlib
import io
import os
import pickle  # nosec B403 - writes alone
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any, cast

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.filesystem import DEFAULT_SUFFIX, _StorageInfo
from torch.distributed.checkpoint.metadata import StorageMeta
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from usdm_megatron.checkpoint.mapped_archive import ALIGNMENT_BYTES
from usdm_megatron.checkpoint.threads import StoppedError, run_in_threads
from usdm_megatron.errors import CheckpointError, UserError

WRITE_BACK_BYTES = 32 << 20


class HashingStream(io.RawIOBase):
    """A file that is only appended to: keeps its sha256 and has the disk begin early.

    `on_bytes(n)` is called with every n bytes written. Once `stopped` is set, writing raises `StoppedError`.
    `failure` is what the first write that failed raised: torch hides it behind an error of its own.
    """

    def __init__(
        self,
        path: Path,
        on_bytes: Callable[[int], None] | None = None,
        stopped: threading.Event | None = None,
    ) -> None:
        self.failure: Exception | None = None
        self._path = path
        self._stopped = stopped or threading.Event()
        self._file = path.open("wb", buffering=0)
        self._hash = hashlib.sha256()
        self._on_bytes = on_bytes
        self._size = 0
        self._started = 0

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        try:
            for begin in range(0, len(view), WRITE_BACK_BYTES):
                self._write_block(view[begin : begin + WRITE_BACK_BYTES])
        except Exception as error:
            if isinstance(error, OSError):
                error.filename = error.filename or str(self._path)  # a raw file's errors name none
            self.failure = self.failure or error
            raise
        return len(view)

    def tell(self) -> int:
        return self._size

    def sync(self) -> str:
        """fsync; returns the sha256 of everything written, in hex."""
        os.fsync(self._file.fileno())
        return self._hash.hexdigest()

    def close(self) -> None:
        self._file.close()
        super().close()

    def _write_block(self, block: memoryview) -> None:
        if self._stopped.is_set():
            raise StoppedError(f"{self._path}: stopped")
        self._hash.update(block)
        done = 0
        while done < len(block):  # a write to a raw file may be short
            done += self._file.write(block[done:])
        self._size += done
        if self._size - self._started >= WRITE_BACK_BYTES:
            self._start_write_back()
        if self._on_bytes is not None:
            self._on_bytes(done)

    def _start_write_back(self) -> None:
        # Linux begins to write dirty pages of the range, and drops clean ones: a conversion is bound by
        # the disk, which would idle until enough pages are dirty, and nobody reads these pages again soon.
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._file.fileno(), 0, self._size, os.POSIX_FADV_DONTNEED)
        self._started = self._size


class DistcpWriter(dcp.FileSystemWriter):
    """`FileSystemWriter` in bounded memory: `workers` files a rank, written by as many threads.

    Which tensor goes into which file depends on the plan alone, so equal saves are equal bytes.
    `hashes` has the sha256 of every file that this rank wrote.
    """

    def __init__(
        self, directory: Path, *, workers: int = 1, on_bytes: Callable[[int], None] | None = None
    ) -> None:
        super().__init__(directory)
        self.hashes: dict[str, str] = {}
        self._directory = directory
        self._workers = workers
        self._on_bytes = on_bytes

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        prefix = plan.storage_data.prefix
        files = _divide(plan.items, self._workers)
        tasks = [
            partial(self._write_file, f"{prefix}{number}{DEFAULT_SUFFIX}", items, planner)
            for number, items in enumerate(files)
        ]
        results = run_in_threads(tasks, len(tasks))
        done: Future[list[WriteResult]] = Future()
        done.set_result([result for of_file in results for result in of_file])
        return done

    def storage_meta(self) -> StorageMeta:
        # torch's has a random save_id and the temporary path: two equal saves would differ
        return StorageMeta()

    def _write_file(
        self, name: str, items: Sequence[WriteItem], planner: SavePlanner, stopped: threading.Event
    ) -> list[WriteResult]:
        results = []
        with HashingStream(self._directory / name, self._on_bytes, stopped) as stream:
            for item in items:
                data = planner.resolve_data(item)
                try:
                    results.append(_write_item(stream, item, data, name))
                except Exception:
                    if stream.failure is not None:
                        raise stream.failure from None
                    raise
                del data  # before the next one is made
            self.hashes[name] = stream.sync()
        return results


@contextmanager
def torch_failures() -> Iterator[None]:
    """torch raises a `BaseException` on all ranks when one fails; make it an error that names the rank.

    With one rank a `UserError` (of whatever made the tensors) keeps its own type.
    """
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        yield
    except CheckpointException as error:
        causes = {rank: failure[0] for rank, failure in sorted(error.failures.items())}
        first = next(iter(causes.values()))
        if len(causes) == 1 and isinstance(first, UserError):
            raise first from error
        raise CheckpointError(*(f"rank {rank}: {cause}" for rank, cause in causes.items())) from error


def _write_item(
    stream: HashingStream, item: WriteItem, data: torch.Tensor | io.BytesIO, name: str
) -> WriteResult:
    """In the format of torch's own function for it, whose parameters need names that torch 2.6 lacks."""
    if isinstance(data, torch.Tensor):
        stream.write(bytes(-stream.tell() % ALIGNMENT_BYTES))  # it can be mapped then
        offset = stream.tell()
        _save(_compact(data.detach().cpu()), cast("IO[bytes]", stream))
    else:
        offset = stream.tell()
        stream.write(data.getbuffer())
    length = stream.tell() - offset
    return WriteResult(
        index=item.index, size_in_bytes=length, storage_data=_StorageInfo(name, offset, length)
    )


def _save(tensor: torch.Tensor, stream: IO[bytes]) -> None:
    """`torch.save`, after which nothing holds the tensor.

    It derives a class from the module's `Pickler`. A class is part of a cycle, and in older torch (2.6; not
    2.13) this one reaches the tensor's storage, which would stay until the garbage collector comes by.
    """

    class Pickler(pickle.Pickler):
        pass

    torch.save(tensor, stream, pickle_module=SimpleNamespace(__name__=__name__, Pickler=Pickler))
    for derived in Pickler.__subclasses__():
        del derived.persistent_id


def _divide(items: Sequence[WriteItem], count: int) -> list[list[WriteItem]]:
    """Items over files, each to the one that is shortest so far: all files grow along the source."""
    sizes = [0] * max(1, min(count, len(items)))
    files: list[list[WriteItem]] = [[] for _ in sizes]
    for item in sorted(items, key=lambda item: item.type != WriteItemType.BYTE_IO):
        shortest = sizes.index(min(sizes))
        files[shortest].append(item)
        sizes[shortest] += _size_bytes(item)
    return files


def _size_bytes(item: WriteItem) -> int:
    data = item.tensor_data
    return 0 if data is None else data.chunk.sizes.numel() * data.properties.dtype.itemsize


def _compact(tensor: torch.Tensor) -> torch.Tensor:
    """torch.save writes the whole storage: a view of a larger one is copied first."""
    whole = tensor.untyped_storage().size() == tensor.numel() * tensor.element_size()
    return tensor if whole else tensor.clone()
