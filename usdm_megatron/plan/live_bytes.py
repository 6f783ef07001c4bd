"""Bytes that are alive on the meta device, operator by operator, and whom a rank talks to meanwhile."""

from __future__ import annotations

import weakref
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import (  # type: ignore[attr-defined]  # its stub forgets the second
    ProcessGroup,
    _create_work_from_future,
)
from torch.futures import Future
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts each storage on the meta device from the operator that makes it until it is freed.

    `now` and `peak` are what a caching allocator would call allocated, without its rounding. Collectives on
    meta tensors, for which the fake backend has no kernels, are answered here; `peers` are the global ranks
    of point-to-point messages.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.sent_to: set[int] = set()
        self.received_from: set[int] = set()
        self._sizes: dict[int, int] = {}
        self._watched: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def start_peak(self) -> None:
        """Forget the peak so far."""
        self.peak = self.now

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.namespace == "c10d" and any(map(_is_meta, tree_leaves(args))):
            return self._communicate(func, args)
        result = func(*args, **(kwargs or {}))
        for leaf in result if isinstance(result, (tuple, list)) else (result,):
            if _is_meta(leaf):
                self._count(leaf.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self._watched:
            self._watched[key] = weakref.ref(storage, lambda _: self._forget(key))
        self.now += size - self._sizes.get(key, 0)  # a storage may be resized
        self._sizes[key] = size
        self.peak = max(self.peak, self.now)

    def _forget(self, key: int) -> None:
        del self._watched[key]
        self.now -= self._sizes.pop(key)

    def _communicate(self, func: Any, args: tuple[Any, ...]) -> Any:
        """Every tensor is where it would be afterwards: collectives write into what they are given."""
        operation = func._schema.name.removeprefix("c10d::")
        if operation in ("send", "recv_"):
            group = ProcessGroup.unbox(args[1])
            peers = self.sent_to if operation == "send" else self.received_from
            peers.add(dist.get_global_rank(group, args[2]))
        done: Future[None] = Future()
        done.set_result(None)
        work = _create_work_from_future(done).boxed()
        values = [work if "Work" in str(value.type) else args[0] for value in func._schema.returns]
        return values[0] if len(values) == 1 else tuple(values)


def _is_meta(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.device.type == "meta"
