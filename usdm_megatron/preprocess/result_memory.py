"""What workers hand back, in memory that they share with the parent: a pipe would copy arrays five times."""

from __future__ import annotations

import mmap
import os
import pickle  # nosec B403: of results of our own workers, as multiprocessing does
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import reduction
from pathlib import Path
from typing import Any

from usdm_megatron.data.file_writing import reported

SLOT_BYTES = 64 << 20  # of address space: memory is taken where something is written
_ALIGNMENT_BYTES = 64


@dataclass(frozen=True)
class StoredResult:
    """A result whose arrays lie in the memory, if they fit into a slot."""

    slot: int
    pickled: bytes
    places: tuple[slice, ...] = ()  # of the arrays in their slot


class ResultMemory:
    """`slots` places for the arrays of a result each; nothing of it has a name that could be left behind.

    Pickled only to processes that are being started. The parent says `free` before a slot is used (again),
    a worker stores a result in it, the parent loads it.
    """

    def __init__(self, slots: int, slot_bytes: int = SLOT_BYTES, descriptor: int | None = None) -> None:
        self.slots = slots
        self._slot_bytes = slot_bytes  # a multiple of mmap.ALLOCATIONGRANULARITY
        self._descriptor = _nameless_file(slots * slot_bytes) if descriptor is None else descriptor
        self._maps: dict[int, mmap.mmap] = {}

    def __reduce__(self) -> tuple[Callable[..., ResultMemory], tuple[Any, ...]]:
        return _in_a_worker, (self.slots, self._slot_bytes, reduction.DupFd(self._descriptor))

    def close(self) -> None:
        """No more workers or results; arrays that were loaded stay."""
        os.close(self._descriptor)

    def free(self, slot: int) -> int:
        """The slot, when nothing refers to the arrays of its last result: they would change unnoticed."""
        last = self._maps.pop(slot, None)
        try:
            if last is not None:
                last.close()
        except BufferError as error:
            raise RuntimeError("arrays of an earlier result are in use; copy what is to stay") from error
        return slot

    def store(self, slot: int, result: object) -> StoredResult:
        arrays: list[pickle.PickleBuffer] = []
        pickled = pickle.dumps(result, protocol=5, buffer_callback=arrays.append)
        places = []
        at = 0
        for content in (array.raw() for array in arrays):
            places.append(slice(at, at + len(content)))
            at = -(-places[-1].stop // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
        if not 0 < at <= self._slot_bytes:
            return StoredResult(slot, pickle.dumps(result, protocol=5))
        view = self._mapped(slot, self._slot_bytes)
        for place, array in zip(places, arrays, strict=True):
            view[place] = array.raw()
        return StoredResult(slot, pickled, tuple(places))

    def load(self, stored: StoredResult) -> Any:
        """The result; its arrays are views."""
        arrays = []
        if stored.places:
            view = memoryview(self._mapped(stored.slot, stored.places[-1].stop))
            arrays = [view[place] for place in stored.places]
        return pickle.loads(stored.pickled, buffers=arrays)  # nosec B301

    def _mapped(self, slot: int, size_bytes: int) -> mmap.mmap:
        if slot not in self._maps:
            start = slot * self._slot_bytes
            self._maps[slot] = mmap.mmap(self._descriptor, size_bytes, offset=start)
        return self._maps[slot]


def _in_a_worker(slots: int, slot_bytes: int, duplicate: Any) -> ResultMemory:
    return ResultMemory(slots, slot_bytes, duplicate.detach())


def _nameless_file(size_bytes: int) -> int:
    """Descriptor of a file in memory, or else on disk, that takes space where it is written alone."""
    if hasattr(os, "memfd_create"):
        descriptor = os.memfd_create("preprocessing-results")
    else:
        with tempfile.TemporaryFile() as file:
            descriptor = os.dup(file.fileno())
    try:
        with reported(Path("the memory that workers share")):
            os.truncate(descriptor, size_bytes)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor
