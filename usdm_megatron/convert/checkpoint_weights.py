"""The weights of a checkpoint, of any layout, by Hugging Face names; one core tensor in memory at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from usdm_megatron.architecture import HFArchitecture
from usdm_megatron.checkpoint.adapter_facts import read_adapter_facts
from usdm_megatron.checkpoint.facts import CheckpointFacts, read_facts
from usdm_megatron.checkpoint.integrity import ByteProgress
from usdm_megatron.checkpoint.resolve import resolve_checkpoint
from usdm_megatron.checkpoint.tensor_reader import TensorReader
from usdm_megatron.convert.name_table import ArchitectureTable, Entry, architecture_table, core_shape, to_hf
from usdm_megatron.convert.options import ExportOptions
from usdm_megatron.convert.progress import byte_progress
from usdm_megatron.convert.weight_types import TORCH_TYPES, TypeName, type_of_torch
from usdm_megatron.errors import CheckpointError, ConversionError


@dataclass(frozen=True)
class CheckpointWeights:
    """The weights of one checkpoint, as good as its files: verifying those is its user's."""

    facts: CheckpointFacts
    table: ArchitectureTable
    model: HFArchitecture
    weight_type: TypeName
    reader: TensorReader

    @property
    def size_bytes(self) -> int:
        """Of the HF tensors, in the checkpoint's type."""
        shapes = self.table.hf_shapes(self.model).values()
        return sum(torch.Size(shape).numel() for shape in shapes) * TORCH_TYPES[self.weight_type].itemsize

    def of_entry(self, entry: Entry, layer: int | None) -> dict[str, torch.Tensor]:
        """The HF tensors that one core tensor (of one layer) holds; from any thread."""
        return to_hf(entry, self.reader.read(entry.core_key, layer), self.model, layer)

    def in_order(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every HF tensor by name, in the model's order, read when it is its turn."""
        for entry, layer in self.table.in_order(self.model):
            yield from self.of_entry(entry, layer).items()

    def of_layer(self, layer: int | None) -> dict[str, torch.Tensor]:
        """HF tensors of one layer, or (None) of what is outside the layers."""
        return {
            name: tensor
            for entry, at in self.table.in_order(self.model)
            if at == layer
            for name, tensor in self.of_entry(entry, at).items()
        }


def chosen_checkpoint(options: ExportOptions, progress: ByteProgress = byte_progress) -> Path:
    """The (verified) checkpoint directory to export, of the kind that the flags ask for.

    Raises `CheckpointError` for a damaged checkpoint, `ConversionError` when the flags do not go with it.
    """
    resolved = resolve_checkpoint(options.load, options.ckpt_step, fallback=False, progress=progress)
    require_kind(resolved.path, options)
    return resolved.path


def require_kind(directory: Path, options: ExportOptions) -> None:
    """Refuse (`ConversionError`) an adapter where the flags ask for a model, and the other way round."""
    if read_adapter_facts(directory) is None:
        for name in ("adapter_only", "merge_lora"):
            if getattr(options, name):
                raise ConversionError(
                    f"{directory} holds a whole model and no adapter; drop --{name.replace('_', '-')}"
                )
    elif not (options.adapter_only or options.merge_lora):
        raise ConversionError(
            f"{directory} holds a LoRA adapter without its base; say --adapter-only for a PEFT adapter, or "
            "--merge-lora for a model with the adapter added"
        )


def open_weights(directory: Path) -> CheckpointWeights:
    """Check that a checkpoint holds exactly this architecture's weights; reads none of them.

    Raises `CheckpointError` naming each tensor that is missing or of another shape.
    """
    if read_adapter_facts(directory) is not None:
        raise CheckpointError(
            f"{directory} holds a LoRA adapter without its base; export it with --merge-lora first"
        )
    facts = read_facts(directory)
    model = facts.architecture
    table = architecture_table(facts.hf_config)
    reader = TensorReader(directory)
    problems = []
    types = set()
    for entry in table.entries_of(model):
        shape = core_shape(entry, model, facts.vocabulary.padded_size)
        expected = (model.layers, *shape) if entry.per_layer else shape
        found = reader.tensors.get(entry.core_key)
        if found is None:
            problems.append(f"{directory} does not hold {entry.core_key}")
        elif found.shape != expected:
            problems.append(
                f"{directory}: {entry.core_key} has shape {list(found.shape)}, expected {list(expected)}"
            )
        else:
            types.add(found.dtype)
    if not problems and len(types) != 1:
        problems.append(f"{directory}: the weights have different types: {sorted(map(str, types))}")
    if problems:
        raise CheckpointError(*problems)
    return CheckpointWeights(facts, table, model, type_of_torch(types.pop()), reader)
