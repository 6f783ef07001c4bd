"""LoRA checkpoint, of any layout → PEFT directory, as `peft.PeftModel.from_pretrained` loads it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from usdm_megatron.architecture import identity_differences, model_identity
from usdm_megatron.checkpoint.adapter_facts import AdapterFacts, BaseIdentity
from usdm_megatron.checkpoint.integrity import INTEGRITY_FILE
from usdm_megatron.checkpoint.resolve import RELEASE
from usdm_megatron.convert.adapter_weights import AdapterWeights, open_adapter
from usdm_megatron.convert.checkpoint_weights import chosen_checkpoint, open_weights
from usdm_megatron.convert.destination import require_space
from usdm_megatron.convert.export_target import (
    ExportSummary,
    finish_directory,
    publish,
    require_replaceable,
    write_json,
)
from usdm_megatron.convert.finite import cast_and_checked
from usdm_megatron.convert.hf_source import check_tensors, open_source
from usdm_megatron.convert.model_card import adapter_card
from usdm_megatron.convert.options import ExportOptions
from usdm_megatron.convert.peft_config import ADAPTER_CONFIG_FILE, peft_config
from usdm_megatron.convert.safetensors_writer import ShardPlan, write_shard
from usdm_megatron.convert.weight_types import TORCH_TYPES, TypeName
from usdm_megatron.errors import ConversionError
from usdm_megatron.file_reading import read_json_object

ADAPTER_WEIGHTS_FILE = "adapter_model.safetensors"
BASE_FILE = (
    "usdm_megatron.json"  # `{"base": {"sha256", "source_sha256"}}`: peft reads over it, import does not
)


@dataclass(frozen=True)
class AdapterExportPlan:
    """Everything that was decided before a weight is read."""

    weights: AdapterWeights
    weight_type: TypeName
    base_model: str | None

    @property
    def shard(self) -> ShardPlan:
        shapes = {name: place.shape for name, place in self.weights.places.items()}
        return ShardPlan(ADAPTER_WEIGHTS_FILE, shapes)

    @property
    def size_bytes(self) -> int:
        values = sum(torch.Size(shape).numel() for shape in self.shard.shapes.values())
        return values * TORCH_TYPES[self.weight_type].itemsize

    @property
    def config(self) -> dict[str, Any]:
        facts, adapter = self.weights.facts, self.weights.adapter
        return peft_config(
            adapter.spec, facts.vocabulary, tied=facts.architecture.tied, base_model=self.base_model
        )


def export_adapter(options: ExportOptions) -> ExportSummary:
    """`--adapter-only`: write the directory under a temporary name and rename it when all of it is there.

    The base is not needed. Raises `CheckpointError` or `ConversionError`.
    """
    plan = _open_plan(options)
    published = publish(options.hf_path, plan.size_bytes, lambda directory: _write_directory(plan, directory))
    return ExportSummary(
        path=options.hf_path,
        checkpoint=plan.weights.facts.directory,
        files=(ADAPTER_WEIGHTS_FILE,),
        tensors=len(plan.weights.places),
        weight_type=plan.weight_type,
        size_bytes=published.size_bytes,
        removed=published.removed,
    )


def dry_run(options: ExportOptions) -> str:
    """What `export_adapter` would do, tensor by tensor."""
    plan = _open_plan(options)
    require_space(options.hf_path, plan.size_bytes)
    lines = [
        f"{plan.weights.facts.directory}: {len(plan.weights.places)} tensors of a LoRA adapter",
        *(
            f"  {place.entry.core_key} → {name} {list(place.shape)}"
            for name, place in plan.weights.places.items()
        ),
        f"{plan.size_bytes / 1e9:.2f} GB as {plan.weight_type}; nothing was written",
    ]
    return "\n".join(lines)


def _open_plan(options: ExportOptions) -> AdapterExportPlan:
    require_replaceable(options.hf_path, ADAPTER_CONFIG_FILE, overwrite=options.overwrite)
    weights = open_adapter(chosen_checkpoint(options))
    weight_type = weights.weight_type if options.dtype == "auto" else options.dtype
    return AdapterExportPlan(weights, weight_type, _base_model(weights, options.base_model))


def _base_model(weights: AdapterWeights, said: str | None) -> str | None:
    """What `base_model_name_or_path` says: never a guess."""
    if said is not None:
        config = Path(said) / "config.json"
        if config.is_file():
            ours, theirs = model_identity(weights.facts.hf_config), model_identity(read_json_object(config))
            if differences := identity_differences(ours, theirs):
                raise ConversionError(
                    *(f"--base-model {said} is another model than the adapter's: {d}" for d in differences)
                )
            _check_weights(Path(said), weights.adapter)
        return said
    provenance = weights.facts.provenance
    source, options = provenance.get("source"), dict(provenance.get("options") or {})
    is_as_imported = Path(weights.adapter.base_directory).name == RELEASE and not options.get("extend_vocab")
    return source if is_as_imported and _is_hub_id(source) else None


def _check_weights(said: Path, adapter: AdapterFacts) -> None:
    """Hold the weights in `said` against the adapter's base, where that still lies as it did."""
    base = Path(adapter.base_directory)
    if not (base / INTEGRITY_FILE).is_file() or not BaseIdentity.of(base).is_of(adapter.base):
        return
    weights, source = open_weights(base), open_source(said)
    check_tensors(source, weights.table, weights.model)
    for name, ours in weights.in_order():
        theirs = source.read(name)
        # an export may have been rounded: the coarser type of both tells
        dtype = min(ours.dtype, theirs.dtype, key=lambda dtype: dtype.itemsize)
        if not torch.equal(ours.to(dtype), theirs.to(dtype)):
            raise ConversionError(
                f"--base-model {said} is another model than the adapter's base {base}: {name} differs; give "
                "the directory of that one's export, or its hub id"
            )


def _is_hub_id(name: object) -> bool:
    return isinstance(name, str) and "/" in name and not Path(name).exists()


def _write_directory(plan: AdapterExportPlan, directory: Path) -> None:
    """Everything of the directory; `integrity.json` last."""
    facts = plan.weights.facts
    problems: list[str] = []
    dtype = TORCH_TYPES[plan.weight_type]
    tensors = cast_and_checked(_in_order(plan.weights), dtype, facts.directory, problems)
    digest = write_shard(directory, plan.shard, plan.weight_type, tensors)
    if problems:
        raise ConversionError(*problems)
    write_json(directory / ADAPTER_CONFIG_FILE, plan.config)
    write_json(directory / BASE_FILE, {"base": plan.weights.adapter.base.to_record()})
    hub_id = plan.base_model if _is_hub_id(plan.base_model) else None
    card = adapter_card(facts, plan.weights.adapter, plan.weight_type, hub_id)
    finish_directory(directory, facts, card, {ADAPTER_WEIGHTS_FILE: digest})


def _in_order(weights: AdapterWeights) -> Iterator[tuple[str, torch.Tensor]]:
    return ((name, weights.read(name)) for name in weights.places)
