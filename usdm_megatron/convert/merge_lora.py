"""A LoRA checkpoint as the weights of a whole model: its base's, each with what the adapter adds."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from usdm_megatron.convert.adapter_weights import AdapterWeights
from usdm_megatron.convert.checkpoint_weights import CheckpointWeights, open_weights
from usdm_megatron.convert.name_table import Entry


@dataclass(frozen=True)
class MergedWeights(CheckpointWeights):
    """The weights of a base with an adapter added; `facts` are the adapter's, `weight_type` is the base's."""

    adapter: AdapterWeights

    def of_entry(self, entry: Entry, layer: int | None) -> dict[str, torch.Tensor]:
        tensors = super().of_entry(entry, layer)
        for name in tensors:  # one at a time: each is as large as two of the base
            tensors[name] = self.adapter.applied_to(name, tensors[name])
        return tensors


def open_merged(adapter: AdapterWeights, base: Path) -> MergedWeights:
    """An adapter over its base, the checkpoint directory that `find_base` found; reads no weights.

    Raises `CheckpointError` when the base is not what it should be.
    """
    weights = open_weights(base)
    return MergedWeights(
        adapter.facts, weights.table, weights.model, weights.weight_type, weights.reader, adapter
    )
