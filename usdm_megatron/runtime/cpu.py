"""The one room that lets megatron-core 0.16.1 run without CUDA.

Core names the device "cuda" in a few dozen places (schedules, p2p, buffers,
optimizer). `enter_cpu_redirect` answers all of them with the CPU: patched
`torch.cuda` state functions, and a function mode for literals. Entered once per
process, before core is used; nothing else in the product asks which device it is on.
Cost of the mode: about 1 µs an operator call (`benchmarks/redirect.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_CPU = torch.device("cpu")
_entered: _CudaMeansCpu | None = None


class _CudaMeansCpu(TorchFunctionMode):
    """Turns `device="cuda"` into CPU, `.cuda()` into identity, and lets `.type()` answer cuda names."""

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
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            # the distributed optimizer tells parameters apart by these strings
            return func(*args).replace("torch.", "torch.cuda.", 1)
        if "device" in kwargs and _names_cuda(kwargs["device"]):
            kwargs = {**kwargs, "device": _CPU}
        if func is torch.Tensor.to and len(args) > 1 and _names_cuda(args[1]):
            args = (args[0], _CPU, *args[2:])
        return func(*args, **kwargs)


def enter_cpu_redirect() -> None:
    """Make core's CUDA calls mean CPU for the rest of this process; a second call does nothing.

    Raises `RuntimeError` where CUDA is there: the redirect would hide it.
    """
    global _entered
    if _entered is not None:
        return
    if torch.cuda.is_available():
        raise RuntimeError("the CPU redirect is for machines without CUDA")
    _patch_cuda_state()
    _entered = _CudaMeansCpu()
    _entered.__enter__()


def _patch_cuda_state() -> None:
    import megatron.core.tensor_parallel.random as core_random

    torch.cuda.current_device = lambda: _CPU  # type: ignore[assignment,return-value]
    torch.cuda.synchronize = lambda device=None: None
    torch.cuda.manual_seed = torch.manual_seed  # type: ignore[assignment]
    torch.cuda.get_rng_state = lambda device=None: torch.get_rng_state()
    torch.cuda.set_rng_state = lambda state, device=None: torch.set_rng_state(state)  # type: ignore[assignment]
    core_random._get_cuda_rng_state = lambda device="cuda", clone=False, graph_safe=False: (
        torch.get_rng_state()
    )
    core_random._set_cuda_rng_state = lambda state, device=-1, graph_safe=False: torch.set_rng_state(state)


def _names_cuda(device: Any) -> bool:
    if isinstance(device, str):
        return device.startswith("cuda")
    return isinstance(device, torch.device) and device.type == "cuda"
