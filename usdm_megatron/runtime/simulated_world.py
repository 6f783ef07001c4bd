"""Any rank of any world in this process: real process groups that talk to nobody, tensors without memory.

torch's "fake" backend answers every collective at once; tensors live on the meta device. What core asks of
`torch.cuda` is answered with that device, as `runtime/cpu.py` answers it with the CPU, and for no longer
than the block lasts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.overrides import TorchFunctionMode

from usdm_megatron.layout import ParallelLayout
from usdm_megatron.runtime.process_groups import ProcessGroups, divide_world

META = torch.device("meta")
_BACKEND = "simulated"
_TIMEOUT = timedelta(minutes=1)  # nobody waits
_READS = (torch.Tensor.tolist, torch.Tensor.item)


@contextmanager
def open_simulated_groups(layout: ParallelLayout, rank: int) -> Iterator[ProcessGroups]:
    """The groups of `rank` in `layout`; inside, tensors are made on the meta device unless told otherwise.

    The process must be in no world. What is read from a tensor on the host is zero.
    """
    with ExitStack() as stack:
        _answer_for_cuda(stack)
        dist.init_process_group(
            _simulated_backend(), rank=rank, world_size=layout.world_size, store=dist.HashStore()
        )
        stack.callback(dist.destroy_process_group)
        groups = stack.enter_context(divide_world(layout, rank, META, timeout=_TIMEOUT))
        stack.enter_context(_RedirectToMeta("cuda"))
        stack.enter_context(META)
        yield groups


@contextmanager
def host_memory_on_meta() -> Iterator[None]:
    """Inside, `device="cpu"` means the meta device too: for code that gathers states on the host."""
    with _RedirectToMeta("cpu"):
        yield


class _RedirectToMeta(TorchFunctionMode):
    """Turns this kind of device into meta; `Tensor.type()` names CUDA's types, by which core tells dtypes."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self._kind = kind

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.cuda:
            return args[0]
        if func in _READS and args[0].device == META:
            return getattr(torch.zeros(args[0].shape, dtype=args[0].dtype, device="cpu"), func.__name__)()
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            return f"torch.cuda.{func(*args).rpartition('.')[2]}"
        if "device" in kwargs and self._names(kwargs["device"]):
            kwargs = {**kwargs, "device": META}
        if func is torch.Tensor.to and len(args) > 1 and self._names(args[1]):
            args = (args[0], META, *args[2:])
        return func(*args, **kwargs)

    def _names(self, device: Any) -> bool:
        if isinstance(device, str):
            return device.startswith(self._kind)
        return isinstance(device, torch.device) and device.type == self._kind


def _simulated_backend() -> str:
    """torch's fake backend under a name of its own, which serves the meta device too."""
    from torch.testing._internal.distributed import fake_pg  # noqa: F401  # registers torch's

    if _BACKEND not in dist.Backend.backend_list:
        create, extended_api = dist.Backend._plugins["FAKE"]  # its signature differs among versions of torch
        dist.Backend.register_backend(_BACKEND, create, extended_api=extended_api, devices=["cpu", "meta"])
    return _BACKEND


def _answer_for_cuda(stack: ExitStack) -> None:
    """Replace the functions of `torch.cuda` that core calls; put back when `stack` closes."""
    import megatron.core.tensor_parallel.random as core_random

    state = torch.zeros(16, dtype=torch.uint8, device="cpu")  # no random number is drawn
    answers: list[tuple[Any, str, Callable[..., Any]]] = [
        (torch.cuda, "current_device", lambda: META),
        (torch.cuda, "synchronize", lambda device=None: None),
        (torch.cuda, "manual_seed", lambda seed: None),
        (torch.cuda, "get_rng_state", lambda device=None: state),
        (torch.cuda, "set_rng_state", lambda state, device=None: None),
        (core_random, "_get_cuda_rng_state", lambda *args, **kwargs: state),
        (core_random, "_set_cuda_rng_state", lambda *args, **kwargs: None),
    ]
    for owner, name, answer in answers:
        stack.callback(setattr, owner, name, getattr(owner, name))
        setattr(owner, name, answer)
