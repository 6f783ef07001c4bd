"""Three meters of a process's memory: autograd's saved tensors, live storages, the kernel's peak."""

from __future__ import annotations

import ctypes
import gc
import re
import time
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# gloo's own thread lets go of a collective's tensors a moment after the collective is over; CUDA's
# allocator knows no such moment.
_STRAGGLERS_S = 0.005


def storages(tensors: Iterable[Any]) -> dict[int, int]:
    """Bytes of each distinct storage, by its address."""
    kept = [tensor.untyped_storage() for tensor in tensors]
    return {storage._cdata: storage.nbytes() for storage in kept}


def all_tensors() -> list[torch.Tensor]:
    """Every tensor that Python knows of in this process."""
    gc.collect()
    return [thing for thing in gc.get_objects() if type(thing) in (torch.Tensor, torch.nn.Parameter)]


class SavedBytes:
    """Bytes that autograd holds for backward passes: each storage once, those of `ignored` never."""

    def __init__(self, ignored: Iterable[torch.Tensor]) -> None:
        self._ignored = storages(ignored)
        self._holders: Counter[int] = Counter()
        self.now = self.peak = 0

    @contextmanager
    def watch(self) -> Iterator[SavedBytes]:
        with torch.autograd.graph.saved_tensors_hooks(self._pack, lambda held: held.tensor):
            yield self

    def _pack(self, tensor: torch.Tensor) -> _Held:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._ignored:
            return _Held(tensor)
        if not self._holders[key]:
            self.now += size
            self.peak = max(self.peak, self.now)
        self._holders[key] += 1
        held = _Held(tensor)
        weakref.finalize(held, self._release, key, size)
        return held

    def _release(self, key: int, size: int) -> None:
        self._holders[key] -= 1
        if not self._holders[key]:
            self.now -= size


class _Held:
    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor


class LiveBytes(TorchDispatchMode):
    """Bytes of all live storages: those there at the start, and those that operators make from then on.

    What a caching allocator would report as allocated.
    """

    def __init__(self) -> None:
        super().__init__()
        self._known: set[int] = set()
        self.now = self.peak = 0
        for tensor in all_tensors():
            self._add(tensor.untyped_storage())
        self.at_start = self.now

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self._add(leaf.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        weakref.finalize(storage, self._release, key, size)
        self.now += size
        if self.now > self.peak:
            time.sleep(_STRAGGLERS_S)
            self.peak = max(self.peak, self.now)

    def _release(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def map_blocks() -> None:
    """Blocks from 32 KiB on are mapped one by one, so that what is freed is given back at once (glibc).

    Call it before large blocks are made: the heap's own free ones are used first.
    """
    assert ctypes.CDLL("libc.so.6").mallopt(-3, 32 * 1024) == 1  # M_MMAP_THRESHOLD


@contextmanager
def kernel_peak() -> Iterator[dict[str, int]]:
    """Bytes that the process's resident memory rose by inside, at most (Linux), as `result["bytes"]`.

    Meaningful only after `map_blocks`.
    """
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM = VmRSS
    start = _status("VmRSS")
    result = {"bytes": 0}
    yield result
    result["bytes"] = _status("VmHWM") - start


def _status(name: str) -> int:
    match = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert match is not None
    return int(match[1]) * 1024
