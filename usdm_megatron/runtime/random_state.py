"""The random state of a rank as one byte tensor, so that a checkpoint needs no pickle for it."""

from __future__ import annotations

import torch
from torch import Tensor


def get_random_state() -> Tensor:
    """uint8 `[bytes]` on CPU: torch's generator, the device's, core's trackers by name."""
    return torch.cat(_states())


def set_random_state(state: Tensor) -> None:
    """Put back what `get_random_state` returned on a rank of the same layout and device."""
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    sizes = [part.numel() for part in _states()]
    if sum(sizes) != state.numel():
        raise ValueError(f"a random state of {state.numel()} bytes does not fit this device's {sum(sizes)}")
    host, device, *tracked = torch.split(state.cpu(), sizes)
    torch.set_rng_state(host.clone())
    torch.cuda.set_rng_state(device.clone())
    tracker = get_cuda_rng_tracker()
    names = sorted(tracker.get_states())
    tracker.set_states({name: part.clone() for name, part in zip(names, tracked, strict=True)})


def _states() -> list[Tensor]:
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    tracked = get_cuda_rng_tracker().get_states()
    return [
        torch.get_rng_state(),
        torch.cuda.get_rng_state().cpu(),
        *(tracked[name].cpu() for name in sorted(tracked)),
    ]
