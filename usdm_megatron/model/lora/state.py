"""The adapter of a built model: where it starts, which tensors it consists of, how they get in and out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from usdm_megatron.model.lora.adapter import AdaptedLinear
from usdm_megatron.model.lora.names import AdapterEntry, entry_of_parameter, is_adapter_key


@dataclass(frozen=True)
class AdapterTensor:
    """A trained parameter of this rank: its entry in the table, its layer (of the whole model), its shard.

    Of a tensor with a `sharded_axis` tensor parallel ranks hold consecutive parts; else all of it.
    """

    entry: AdapterEntry
    layer: int | None
    parameter: torch.nn.Parameter

    @property
    def peft_name(self) -> str:
        return self.entry.peft_name(self.layer)


def adapter_state(model: Any) -> Iterator[AdapterTensor]:
    """The adapter's parameters in one bare chunk, in the model's order."""
    for name, parameter in model.named_parameters():
        if is_adapter_key(name):
            entry, layer_here = entry_of_parameter(name)
            layer = None if layer_here is None else model.decoder.layers[layer_here].layer_number - 1
            yield AdapterTensor(entry, layer, parameter)


def freeze_base(model: torch.nn.Module) -> None:
    """Only the adapter trains: nothing else gets a gradient, a buffer or optimizer state."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_adapter_key(name))


def start_adapters(model: Any, seed: int) -> None:
    """Initial values of every A and B of a chunk, the same at any layout."""
    for layer in model.decoder.layers:
        for module in layer.modules():
            if isinstance(module, AdaptedLinear):
                module.start(layer.layer_number - 1, seed)  # core counts from 1


def adapter_part(sharded_state: dict[str, Any]) -> dict[str, Any]:
    """What a checkpoint of the adapter holds, out of a chunk's `sharded_state_dict()`."""
    return {name: value for name, value in sharded_state.items() if is_adapter_key(name)}


def base_part(sharded_state: dict[str, Any]) -> dict[str, Any]:
    """What the frozen model's checkpoint holds, out of a chunk's `sharded_state_dict()`."""
    return {name: value for name, value in sharded_state.items() if not is_adapter_key(name)}


def load_base(model: Any, tensors: dict[str, Any]) -> None:
    """Take the loaded `base_part`; new rows start from it."""
    _load_part(model, tensors, adapter=False)
    model.start_new_rows()


def load_adapter(model: Any, tensors: dict[str, Any]) -> None:
    """Take the loaded `adapter_part`."""
    _load_part(model, tensors, adapter=True)


def _load_part(model: Any, tensors: dict[str, Any], *, adapter: bool) -> None:
    outcome = model.load_state_dict(tensors, strict=False)
    missing = [name for name in outcome.missing_keys if is_adapter_key(name) == adapter]
    if missing or outcome.unexpected_keys:
        raise RuntimeError(f"missing {missing}, unexpected {outcome.unexpected_keys}")
