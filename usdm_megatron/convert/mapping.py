"""The mapping of tensors in words: what `--dry-run` prints."""

from __future__ import annotations

from collections.abc import Iterator

from usdm_megatron.architecture import HFArchitecture
from usdm_megatron.convert.import_plan import ImportPlan
from usdm_megatron.convert.name_table import ArchitectureTable, Arrangement, core_shape


def describe_import(plan: ImportPlan) -> str:
    """Every kind of tensor of the checkpoint, its shape, and what it is made of."""
    lines = [
        f"{plan.source.directory}: {plan.table.export_as}, {plan.model.layers} layers, "
        f"{len(plan.table.hf_shapes(plan.source_model))} tensors in {len(plan.source.weight_files)} file(s)",
        *_lines(plan.table, plan.source_model, plan.model, plan.vocabulary.padded_size),
    ]
    if plan.new_ids:
        lines.append(
            f"new rows: ids {plan.new_ids.start:,} to {plan.new_ids.stop - 1:,}, "
            f"N(0, {plan.model.initializer_range}²), seed {plan.seed}"
        )
    ignored = sorted(set(plan.source.tensors) - set(plan.table.hf_shapes(plan.source_model)))
    if ignored:
        lines.append(f"ignored: {', '.join(ignored)}")
    lines.append(f"{plan.size_bytes / 1e9:.2f} GB as {plan.weight_type}; nothing was written")
    return "\n".join(lines)


def describe_export(table: ArchitectureTable, model: HFArchitecture, padded_size: int) -> list[str]:
    """The same lines for the way back."""
    return list(_lines(table, model, model, padded_size))


def _lines(
    table: ArchitectureTable, hf_model: HFArchitecture, core_model: HFArchitecture, padded_size: int
) -> Iterator[str]:
    shapes = table.hf_shapes(hf_model)
    for entry in table.entries_of(core_model):
        layer = entry.layers(core_model)[0]
        core = list(core_shape(entry, core_model, padded_size))
        stacked = f" x {core_model.layers} layers" if entry.per_layer else ""
        how = "" if entry.arrangement is Arrangement.PLAIN else f", {entry.arrangement.value}"
        yield f"  {entry.core_key} {core}{stacked}{how}"
        for pattern, name in zip(entry.hf_patterns, entry.hf_names(layer), strict=True):
            yield f"      {pattern} {list(shapes[name])}"
