"""torch_dist checkpoint, of any layout → Hugging Face directory: one tensor in memory at a time.

A LoRA checkpoint becomes a model with `--merge-lora`; the adapter alone is `peft_export`'s.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from usdm_megatron.checkpoint.adapter_facts import find_base
from usdm_megatron.checkpoint.background_verification import verified_meanwhile
from usdm_megatron.checkpoint.facts import GENERATION_CONFIG_FILE, CheckpointFacts
from usdm_megatron.checkpoint.integrity import ByteProgress
from usdm_megatron.checkpoint.resolve import NamedCheckpoint, name_checkpoint
from usdm_megatron.checkpoint.threads import run_in_threads
from usdm_megatron.convert.adapter_weights import AdapterWeights, open_adapter
from usdm_megatron.convert.checkpoint_weights import (
    CheckpointWeights,
    chosen_checkpoint,
    open_weights,
    require_kind,
)
from usdm_megatron.convert.destination import require_space
from usdm_megatron.convert.export_target import (
    ExportSummary,
    finish_directory,
    publish,
    require_replaceable,
    write_json,
)
from usdm_megatron.convert.finite import cast_and_checked
from usdm_megatron.convert.mapping import describe_export
from usdm_megatron.convert.merge_lora import open_merged
from usdm_megatron.convert.model_card import model_card
from usdm_megatron.convert.name_table import ArchitectureTable
from usdm_megatron.convert.options import ExportOptions
from usdm_megatron.convert.progress import byte_display
from usdm_megatron.convert.safetensors_writer import (
    INDEX_FILE,
    ShardPlan,
    index_of,
    plan_shards,
    write_shard,
)
from usdm_megatron.convert.weight_types import TORCH_TYPES, TypeName, transformers_name
from usdm_megatron.errors import ConversionError

CONFIG_FILE = "config.json"


@dataclass(frozen=True)
class ExportPlan:
    """Everything that was decided before a weight is read."""

    weights: CheckpointWeights
    weight_type: TypeName
    shards: list[ShardPlan]

    @property
    def size_bytes(self) -> int:
        """Of the weights as written."""
        shapes = [shape for shard in self.shards for shape in shard.shapes.values()]
        return sum(torch.Size(shape).numel() for shape in shapes) * TORCH_TYPES[self.weight_type].itemsize


def run_export(options: ExportOptions) -> ExportSummary:
    """Write the Hugging Face directory under a temporary name and rename it when all of it is there.

    A damaged checkpoint is refused, never replaced by an older one: its weights are hashed while they are
    read. Peak memory is what a cast, a merge or a rearrangement makes of `options.workers` tensors; as they
    are, they stay in their file. Raises `CheckpointError` or `ConversionError`.
    """
    with byte_display() as progress:
        source = _choose(options, progress)
        plan = _open_plan(source, options)

        def write(directory: Path) -> None:
            written = _write_weights(plan, source.model, directory, options.workers, progress)
            _write_rest(plan, directory, written)

        published = publish(options.hf_path, plan.size_bytes, write)
    return ExportSummary(
        path=options.hf_path,
        checkpoint=plan.weights.facts.directory,
        files=tuple(shard.file for shard in plan.shards),
        tensors=sum(len(shard.shapes) for shard in plan.shards),
        weight_type=plan.weight_type,
        size_bytes=published.size_bytes,
        removed=published.removed,
    )


def dry_run(options: ExportOptions) -> str:
    """What `run_export` would do, tensor by tensor."""
    with byte_display() as progress:
        source = _choose(options, progress)
        source.model.verify(progress)
    plan = _open_plan(source, options)
    require_space(options.hf_path, plan.size_bytes)
    weights = plan.weights
    lines = [
        f"{weights.facts.directory}: {weights.table.export_as}, {weights.model.layers} layers",
        *describe_export(weights.table, weights.model, weights.facts.vocabulary.padded_size),
        *(f"{shard.file}: {len(shard.shapes)} tensors" for shard in plan.shards),
        f"{plan.size_bytes / 1e9:.2f} GB as {plan.weight_type}; nothing was written",
    ]
    return "\n".join(lines)


def exported_config(
    facts: CheckpointFacts, table: ArchitectureTable, weight_type: TypeName
) -> dict[str, Any]:
    """`config.json`, such that transformers 4.x and 5.x both read it right."""
    config = dict(facts.hf_config)
    for private in ("auto_map", "_name_or_path"):  # code of the source's, and where it lay
        config.pop(private, None)
    # 4.x does not know rope_parameters and would take 10,000
    config["rope_theta"] = facts.architecture.rope_theta
    for key in ("dtype", "torch_dtype"):
        if key in config:
            config[key] = transformers_name(weight_type)
    return {
        **config,
        "architectures": [table.export_as],
        "model_type": table.model_type,
        "vocab_size": facts.vocabulary.size,
        "use_cache": True,
    }


def exported_generation_config(facts: CheckpointFacts, config: dict[str, Any]) -> dict[str, Any]:
    """`generation_config.json`: the source's, with the ids of this vocabulary."""
    record = facts.generation_config or {"_from_model_config": True}
    vocabulary = facts.vocabulary
    ids = {
        "bos_token_id": vocabulary.bos_id,
        "eos_token_id": record.get("eos_token_id", config.get("eos_token_id", vocabulary.eos_id)),
    }
    if vocabulary.has_speech:
        ids["pad_token_id"] = vocabulary.pad_id
    return {**record, **ids}


@dataclass(frozen=True)
class _Source:
    """What the flags choose."""

    model: NamedCheckpoint  # its facts were verified, its weights not yet
    adapter: AdapterWeights | None  # to be merged into it


def _choose(options: ExportOptions, progress: ByteProgress) -> _Source:
    require_replaceable(options.hf_path, CONFIG_FILE, overwrite=options.overwrite)
    if options.merge_lora:
        adapter = open_adapter(chosen_checkpoint(options, progress))
        model = find_base(adapter.adapter, options.pretrained_checkpoint)
    else:
        adapter, model = None, name_checkpoint(options.load, options.ckpt_step)
    model.verify_facts(progress)
    return _Source(model, adapter)


def _open_plan(source: _Source, options: ExportOptions) -> ExportPlan:
    directory = source.model.path
    weights: CheckpointWeights
    if source.adapter is not None:
        weights = open_merged(source.adapter, directory)
    else:
        require_kind(directory, options)
        weights = open_weights(directory)
    weight_type = weights.weight_type if options.dtype == "auto" else options.dtype
    shards = plan_shards(weights.table.hf_shapes(weights.model), weight_type, options.max_shard_bytes)
    return ExportPlan(weights, weight_type, shards)


@dataclass(frozen=True)
class _WrittenShard:
    """One file, and what is wrong with its tensors."""

    file: str
    sha256: str
    problems: list[str]


def _write_weights(
    plan: ExportPlan, model: NamedCheckpoint, directory: Path, workers: int, progress: ByteProgress
) -> list[_WrittenShard]:
    """All shards; what they are made of is verified when this returns."""
    with (
        verified_meanwhile(model, progress) as stop_if_damaged,
        progress("exporting", plan.size_bytes) as show,
    ):

        def on_bytes(count: int) -> None:
            stop_if_damaged()
            show(count)

        tasks = [partial(_write_shard, plan, shard, directory, on_bytes) for shard in plan.shards]
        return run_in_threads(tasks, workers)


def _write_rest(plan: ExportPlan, directory: Path, written: Sequence[_WrittenShard]) -> None:
    """Everything of the directory but the weights; `integrity.json` last."""
    weights = plan.weights
    if problems := [problem for shard in written for problem in shard.problems]:
        raise ConversionError(*problems)
    hashes = {shard.file: shard.sha256 for shard in written}
    if len(plan.shards) > 1:
        write_json(directory / INDEX_FILE, index_of(plan.shards, plan.weight_type))
    config = exported_config(weights.facts, weights.table, plan.weight_type)
    write_json(directory / CONFIG_FILE, config)
    write_json(directory / GENERATION_CONFIG_FILE, exported_generation_config(weights.facts, config))
    card = model_card(weights.facts, weights.table, plan.weight_type)
    finish_directory(directory, weights.facts, card, hashes)


def _write_shard(
    plan: ExportPlan,
    shard: ShardPlan,
    directory: Path,
    on_bytes: Callable[[int], None],
    stopped: threading.Event,
) -> _WrittenShard:
    source, dtype = plan.weights.facts.directory, TORCH_TYPES[plan.weight_type]
    problems: list[str] = []
    tensors = cast_and_checked(_of_shard(plan.weights, shard), dtype, source, problems)
    digest = write_shard(directory, shard, plan.weight_type, tensors, on_bytes, stopped)
    return _WrittenShard(shard.file, digest, problems)


def _of_shard(weights: CheckpointWeights, shard: ShardPlan) -> Iterator[tuple[str, torch.Tensor]]:
    """A shard's tensors in order. What a core tensor holds of another shard is read again there."""
    for entry, layer in weights.table.in_order(weights.model):
        if any(name in shard.shapes for name in entry.hf_names(layer)):
            of_entry = weights.of_entry(entry, layer)
            yield from ((name, tensor) for name, tensor in of_entry.items() if name in shard.shapes)
            del of_entry  # before the next one is read
