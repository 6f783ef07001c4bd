"""Where Adam keeps masters, moments and its step count: one class for each optimizer core may build.

Core's distributed optimizer creates states at the first step, and weights loaded before it change no
master. Here both are done when asked for, whoever keeps the states.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.optimizer import DistributedOptimizer
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer
from torch import Tensor


class AdamStates:
    """torch's AdamW, or Transformer Engine's: it updates core's fp32 masters, its parameters."""

    def __init__(self, sharded: DistributedOptimizer) -> None:
        self._sharded = sharded
        self._adam: Any = sharded.optimizer

    def create(self) -> None:
        """Zero moments and no step taken, so that a checkpoint can be saved and loaded before the first."""
        for parameter in self._sharded.get_parameters():
            self._adam.state[parameter]["exp_avg"] = torch.zeros_like(parameter)
            self._adam.state[parameter]["exp_avg_sq"] = torch.zeros_like(parameter)
        self.set_steps(0)

    def set_steps(self, steps: int) -> None:
        """As after `steps` updates; every parameter counts for itself (`train/optimizer.py`)."""
        _set_steps(self._adam, steps)

    def reload_masters(self) -> None:
        """Masters take the model's values."""
        self._sharded.reload_model_params()

    def gradients(self) -> list[Tensor]:
        """This rank's reduced gradients, as the update will read them."""
        return [p.grad for p in self._sharded.get_parameters() if p.grad is not None]

    def by_parameter(self) -> Iterator[tuple[Tensor, list[Tensor]]]:
        """What Adam updates, and the masters, moments and step counts that it keeps for it."""
        for parameter, entry in self._adam.state.items():
            yield parameter, [parameter, *(value for value in entry.values() if isinstance(value, Tensor))]

    def tensors(self) -> Iterator[Tensor]:
        """Masters and moments."""
        return (tensor for _, tensors in self.by_parameter() for tensor in tensors)


class PrecisionAwareStates(AdamStates):
    """Transformer Engine's FusedAdam (>= 2.9, CUDA) over bf16 weights: it keeps the fp32 masters itself.

    Run with an optimizer of the same interface in its place, on CPU; not with itself yet.
    """

    def create(self) -> None:
        for parameter in self._sharded.get_parameters():
            self._adam.initialize_state(parameter, False)  # no remainders: checkpoints hold whole masters
        self.set_steps(0)

    def reload_masters(self) -> None:
        for parameter in self._sharded.get_parameters():  # core leaves these out (`_copy_model_params_to…`)
            self._adam.set_scaled_state(parameter, "master_param", parameter.detach().float())

    def gradients(self) -> list[Tensor]:
        parameters = self._sharded.get_parameters()
        return [p.decoupled_grad for p in parameters if getattr(p, "decoupled_grad", None) is not None]

    def by_parameter(self) -> Iterator[tuple[Tensor, list[Tensor]]]:
        for parameter, entry in self._adam.state.items():
            yield parameter, [value for value in entry.values() if isinstance(value, Tensor)]


class OffloadedStates(PrecisionAwareStates):
    """Core's `HybridDeviceOptimizer`: torch's AdamW in host memory. Not run yet: it needs CUDA."""

    def create(self) -> None:
        rates = [group["lr"] for group in self._adam.param_groups]
        for group in self._adam.param_groups:
            group["lr"] = 0.0
        self._adam.dummy_step()  # with random gradients: nothing may move
        for group, lr in zip(self._adam.param_groups, rates, strict=True):
            group["lr"] = lr
        for entry in self._adam.state.values():
            entry["exp_avg"].zero_()
            entry["exp_avg_sq"].zero_()
        self.set_steps(0)

    def set_steps(self, steps: int) -> None:
        for adam in self._adam.sub_optimizers:
            _set_steps(adam, steps)

    def reload_masters(self) -> None:
        AdamStates.reload_masters(self)


def states_of(sharded: DistributedOptimizer) -> AdamStates:
    """The states of the Adam that core has built inside `sharded`."""
    if isinstance(sharded.optimizer, HybridDeviceOptimizer):
        return OffloadedStates(sharded)
    if sharded.config.use_precision_aware_optimizer:
        return PrecisionAwareStates(sharded)
    return AdamStates(sharded)


def _set_steps(adam: Any, steps: int) -> None:
    if not isinstance(adam, torch.optim.AdamW):  # TE's FusedAdam counts in the group
        for group in adam.param_groups:
            group["step"] = steps
        return
    for group in adam.param_groups:
        for parameter in group["params"]:
            adam.state[parameter]["step"] = torch.tensor(float(steps), device=parameter.device)
