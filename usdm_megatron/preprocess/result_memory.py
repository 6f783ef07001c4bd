"""What workers hand back, in memory that they share with the parent: a pipe would copy arrays five times."""

from __future__ import annotations

import mmap
import os
import pickle  # nosec B403: of results of our own workers, as multiprocessing does
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import reduction
from typing import Any

SLOT_BYTES = 64 << 20  # of address space: memory is taken where something is written
_ALIGNMENT_BYTES = 64


@dataclass(frozen=True)
class StoredResult:
    """A result whose arrays lie in the memory, if they fit into a slot."""

    pickled: bytes
    places: tuple[slice, ...] = ()


class ResultMemory:
    """`slots` places for the arrays of a result each; nothing of it has a name that could be left behind.

    Pickled only to processes that are being started.
    """

    def __init__(self, slots: int, slot_bytes: int = SLOT_BYTES, descriptor: int | None = None) -> None:
        self.slots = slots
        self._slot_bytes = slot_bytes
        self._descriptor = _nameless_file(slots * slot_bytes) if descriptor is None else descriptor
        self._map = mmap.mmap(self._descriptor, slots * slot_bytes)

    def __reduce__(self) -> tuple[Callable[..., ResultMemory], tuple[Any, ...]]:
        return _in_a_worker, (self.slots, self._slot_bytes, reduction.DupFd(self._descriptor))

    def close(self) -> None:
        """No more workers can be started; what is mapped stays."""
        os.close(self._descriptor)

    def store(self, slot: int, result: object) -> StoredResult:
        """Put the arrays of `result` into a slot, whose last result nobody needs any more."""
        arrays: list[pickle.PickleBuffer] = []
        pickled = pickle.dumps(result, protocol=5, buffer_callback=arrays.append)
        places = []
        at, end = slot * self._slot_bytes, (slot + 1) * self._slot_bytes
        for array in arrays:
            content = array.raw()
            if at + len(content) > end:
                return StoredResult(pickle.dumps(result, protocol=5))
            places.append(slice(at, at + len(content)))
            self._map[places[-1]] = content
            at += -(-len(content) // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
        return StoredResult(pickled, tuple(places))

    def load(self, stored: StoredResult) -> Any:
        """The result; its arrays are views that hold until the slot is used again."""
        view = memoryview(self._map)
        return pickle.loads(stored.pickled, buffers=[view[place] for place in stored.places])  # nosec B301


def _in_a_worker(slots: int, slot_bytes: int, duplicate: Any) -> ResultMemory:
    memory = ResultMemory(slots, slot_bytes, duplicate.detach())
    memory.close()
    return memory


def _in_a_worker(slots: int, slot_bytes: int, duplicate: Any) -> ResultMemory:
    return ResultMemory(slots, slot_bytes, duplicate.detach())


def _nameless_file(size_bytes: int) -> int:
    """Descriptor of a file in memory, or else on disk, that takes space where it is written alone."""
    if hasattr(os, "memfd_create"):
        descriptor = os.memfd_create("preprocessing-results")
    else:
        with tempfile.TemporaryFile() as file:
            descriptor = os.dup(file.fileno())
    os.truncate(descriptor, size_bytes)
    return descriptor
