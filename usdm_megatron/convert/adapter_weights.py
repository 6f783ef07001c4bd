"""The tensors of an adapter by PEFT's names: which there are, and those of a checkpoint, of any layout."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from usdm_megatron.architecture import HFArchitecture
from usdm_megatron.checkpoint.adapter_facts import AdapterFacts, read_adapter_facts
from usdm_megatron.checkpoint.facts import CheckpointFacts, read_facts
from usdm_megatron.checkpoint.tensor_reader import TensorReader
from usdm_megatron.convert.weight_types import TypeName, type_of_torch
from usdm_megatron.errors import CheckpointError
from usdm_megatron.lora_spec import LoraSpec
from usdm_megatron.model.lora.names import (
    LORA_A,
    LORA_B,
    TOKEN_ROWS,
    AdapterEntry,
    adapter_entries,
    entry_shape,
    is_adapter_key,
)
from usdm_megatron.vocab import Vocabulary


@dataclass(frozen=True)
class AdapterPlace:
    """One tensor of an adapter: its entry in the table, its layer, its shape there."""

    entry: AdapterEntry
    layer: int | None
    shape: tuple[int, ...]


def adapter_places(spec: LoraSpec, model: HFArchitecture, vocabulary: Vocabulary) -> dict[str, AdapterPlace]:
    """Every tensor that an adapter of `model` consists of, by PEFT's name, layer by layer."""
    new_ids = vocabulary.size - vocabulary.text_size
    entries = adapter_entries(spec.targets, model, train_new_embeddings=spec.train_new_embeddings)
    layers: tuple[int | None, ...] = (*range(model.layers), None)
    return {
        entry.peft_name(layer): AdapterPlace(entry, layer, entry_shape(entry, model, spec.r, new_ids))
        for layer in layers
        for entry in entries
        if entry.per_layer == (layer is not None)
    }


@dataclass(frozen=True)
class AdapterWeights:
    """The adapter in one verified checkpoint."""

    facts: CheckpointFacts
    adapter: AdapterFacts
    places: dict[str, AdapterPlace]
    weight_type: TypeName
    reader: TensorReader

    def read(self, peft_name: str) -> torch.Tensor:
        """One tensor, as stored; from any thread."""
        place = self.places[peft_name]
        return self.reader.read(place.entry.core_key, place.layer)

    def applied_to(self, hf_name: str, weight: torch.Tensor) -> torch.Tensor:
        """What a weight of the base becomes: itself, its new rows put in, or `W + (alpha / r) · B·A`.

        In fp32 and not rounded where the adapter adds to it: whoever stores it rounds, once. May
        write to `weight`.
        """
        parts = self._parts_by_weight.get(hf_name)
        if parts is None:
            return weight
        if TOKEN_ROWS in parts:
            rows = self.read(parts[TOKEN_ROWS])
            merged = weight if weight.dtype == rows.dtype else weight.float()
            first = self.facts.vocabulary.text_size
            merged[first : first + len(rows)] = rows
            return merged
        a, b = (self.read(parts[part]).float() for part in (LORA_A, LORA_B))
        return (b @ a).mul_(self.adapter.spec.scale).add_(weight)

    @cached_property
    def _parts_by_weight(self) -> Mapping[str, dict[str, str]]:
        """PEFT's names by HF weight and part."""
        found: dict[str, dict[str, str]] = defaultdict(dict)
        for name, place in self.places.items():
            found[place.entry.hf_weight(place.layer)][place.entry.part] = name
        return dict(found)


def open_adapter(directory: Path) -> AdapterWeights:
    """Check that a (verified) checkpoint holds exactly the adapter that it says; reads none of it.

    Raises `CheckpointError` naming each tensor that is missing, too many, or of another shape.
    """
    adapter = read_adapter_facts(directory)
    if adapter is None:
        raise CheckpointError(f"{directory} holds no adapter")
    facts = read_facts(directory)
    model = facts.architecture
    places = adapter_places(adapter.spec, model, facts.vocabulary)
    reader = TensorReader(directory)
    expected = {
        place.entry.core_key: (model.layers, *place.shape) if place.entry.per_layer else place.shape
        for place in places.values()
    }
    found = {key: tensor for key, tensor in reader.tensors.items() if is_adapter_key(key)}
    problems = [f"{directory} does not hold {key}" for key in expected if key not in found]
    problems += [
        f"{directory} holds {key}, which adapter.json does not have" for key in found if key not in expected
    ]
    problems += [
        f"{directory}: {key} has shape {list(found[key].shape)}, expected {list(shape)}"
        for key, shape in expected.items()
        if key in found and found[key].shape != shape
    ]
    types = {tensor.dtype for tensor in found.values()}
    if not problems and len(types) != 1:
        problems.append(f"{directory}: the adapter's tensors have different types: {sorted(map(str, types))}")
    if problems:
        raise CheckpointError(*problems)
    return AdapterWeights(facts, adapter, places, type_of_torch(types.pop()), reader)
