"""torch_dist checkpoint, of any layout → Hugging Face directory, without building a model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from usdm_megatron.architecture import HFArchitecture
from usdm_megatron.checkpoint.commit import publish_directory, sync_tree, temporary_path
from usdm_megatron.checkpoint.facts import CheckpointFacts, read_facts
from usdm_megatron.checkpoint.resolve import resolve_checkpoint
from usdm_megatron.checkpoint.store import load_full_tensors, single_process_group, stored_tensors
from usdm_megatron.convert.name_table import ArchitectureTable, architecture_table, core_shape, to_hf
from usdm_megatron.convert.options import ExportOptions
from usdm_megatron.convert.weight_types import TORCH_TYPES, TypeName, transformers_name, type_of_torch
from usdm_megatron.errors import CheckpointError, ConversionError
from usdm_megatron.tokenizer.files import check_tokenizer, copy_tokenizer

_INDEX_FILE = "model.safetensors.index.json"


@dataclass(frozen=True)
class ExportSummary:
    """What an export wrote."""

    path: Path
    checkpoint: Path
    files: tuple[str, ...]
    weight_type: TypeName
    size_bytes: int


@dataclass(frozen=True)
class CheckpointWeights:
    """The weights of one verified checkpoint, by Hugging Face names."""

    facts: CheckpointFacts
    table: ArchitectureTable
    model: HFArchitecture
    weight_type: TypeName

    def of_layer(self, layer: int | None) -> dict[str, torch.Tensor]:
        """HF tensors of one layer, or (None) of what is outside the layers; opens the checkpoint once."""
        entries = [entry for entry in self.table.entries_of(self.model) if layer in entry.layers(self.model)]
        loaded = load_full_tensors(self.facts.directory, [entry.core_key for entry in entries], layer)
        tensors: dict[str, torch.Tensor] = {}
        for entry in entries:
            tensors.update(to_hf(entry, loaded.pop(entry.core_key), self.model, layer))
        return tensors


def open_weights(directory: Path) -> CheckpointWeights:
    """Check that a (verified) checkpoint holds exactly this architecture's weights; reads none of them.

    Raises `CheckpointError` naming each tensor that is missing or of another shape.
    """
    facts = read_facts(directory)
    model = facts.architecture
    table = architecture_table(facts.hf_config)
    stored = stored_tensors(directory)
    problems = []
    types = set()
    for entry in table.entries_of(model):
        shape = core_shape(entry, model, facts.vocabulary.padded_size)
        expected = (model.layers, *shape) if entry.per_layer else shape
        found = stored.get(entry.core_key)
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
    return CheckpointWeights(facts, table, model, type_of_torch(types.pop()))


def run_export(options: ExportOptions) -> ExportSummary:
    """Write the Hugging Face directory under a temporary name and rename it when all of it is there.

    A damaged checkpoint is refused, never replaced by an older one. Raises `CheckpointError`
    or `ConversionError`.
    """
    target = options.hf_path
    if target.exists() and not options.overwrite:
        raise ConversionError(f"--hf-path {target} exists; pass --overwrite to replace it, or choose another")
    if target.exists() and not (target.is_dir() and _looks_like_model(target)):
        raise ConversionError(
            f"--hf-path {target} is no Hugging Face model; --overwrite replaces nothing else"
        )
    checkpoint = resolve_checkpoint(options.load, options.ckpt_step, fallback=False)
    weights = open_weights(checkpoint.path)
    weight_type = weights.weight_type if options.dtype == "auto" else options.dtype
    target.parent.mkdir(parents=True, exist_ok=True)
    _remove_stale(target)
    temporary = temporary_path(target)
    temporary.mkdir()
    try:
        _write_config(weights, temporary, weight_type)
        files = _write_weights(weights, temporary, weight_type, options.max_shard_bytes)
        if weights.facts.tokenizer_dir is not None:
            copy_tokenizer(weights.facts.tokenizer_dir, temporary)
            check_tokenizer(temporary, weights.facts.vocabulary)
        sync_tree(temporary)
        size = sum(path.stat().st_size for path in temporary.iterdir())
        publish_directory(temporary, target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return ExportSummary(target, checkpoint.path, files, weight_type, size)


def plan_shards(sizes: dict[str, int], max_bytes: int) -> list[list[str]]:
    """Names of the tensors of each file, in order; a tensor larger than `max_bytes` gets its own."""
    shards: list[list[str]] = []
    filled = 0
    for name, size in sizes.items():
        if not shards or filled + size > max_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def exported_config(
    facts: CheckpointFacts, table: ArchitectureTable, weight_type: TypeName
) -> dict[str, Any]:
    """`config.json`, such that transformers 4.x and 5.x both read it right."""
    config = dict(facts.hf_config)
    for private in ("auto_map", "_name_or_path"):  # code of the source's, and where it lay
        config.pop(private, None)
    theta = (config.get("rope_parameters") or {}).get("rope_theta")
    if theta is not None:
        config["rope_theta"] = theta  # 4.x does not know rope_parameters and would take 10,000
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


def _write_weights(
    weights: CheckpointWeights, directory: Path, weight_type: TypeName, max_bytes: int
) -> tuple[str, ...]:
    """Write the shards, one in memory at a time, and the index when there are several."""
    from safetensors.torch import save_file

    dtype = TORCH_TYPES[weight_type]
    shapes = weights.table.hf_shapes(weights.model)
    sizes = {name: torch.Size(shape).numel() * dtype.itemsize for name, shape in shapes.items()}
    shards = plan_shards(sizes, max_bytes)
    files = [
        f"model-{number:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else "model.safetensors"
        for number in range(1, len(shards) + 1)
    ]
    tensors = _in_order(weights, list(shapes))
    for file, names in zip(files, shards, strict=True):
        shard = {name: tensor.to(dtype) for name, tensor in (next(tensors) for _ in names)}
        save_file(shard, directory / file, metadata={"format": "pt"})
        # safetensors makes its files private to the user; these are as readable as the others
        (directory / file).chmod((directory / "config.json").stat().st_mode)
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": sum(sizes.values())},
            "weight_map": {name: file for file, names in zip(files, shards, strict=True) for name in names},
        }
        _write_json(directory / _INDEX_FILE, index)
    return tuple(files)


def _in_order(weights: CheckpointWeights, names: list[str]) -> Iterator[tuple[str, torch.Tensor]]:
    """The HF tensors in the model's order, a layer in memory at a time."""
    with single_process_group():
        outside = weights.of_layer(None)
        layer_of = {
            name: layer
            for layer in range(weights.model.layers)
            for entry in weights.table.entries_of(weights.model)
            if entry.per_layer
            for name in entry.hf_names(layer)
        }
        current: dict[str, torch.Tensor] = {}
        for name in names:
            if name in outside:
                yield name, outside.pop(name)
                continue
            if name not in current:
                current = weights.of_layer(layer_of[name])
            yield name, current.pop(name)


def _write_config(weights: CheckpointWeights, directory: Path, weight_type: TypeName) -> None:
    facts = weights.facts
    config = exported_config(facts, weights.table, weight_type)
    _write_json(directory / "config.json", config)
    generation: dict[str, Any] = {
        "_from_model_config": True,
        "bos_token_id": facts.vocabulary.bos_id,
        "eos_token_id": config.get("eos_token_id", facts.vocabulary.eos_id),
    }
    if facts.vocabulary.has_speech:
        generation["pad_token_id"] = facts.vocabulary.pad_id
    _write_json(directory / "generation_config.json", generation)


def _looks_like_model(directory: Path) -> bool:
    return (directory / "config.json").is_file() or not any(directory.iterdir())


def _remove_stale(target: Path) -> None:
    """What an interrupted export to this very name has left; others' temporaries are not ours."""
    for path in target.parent.glob(f"{target.name}.tmp-*"):
        if path.is_dir():
            shutil.rmtree(path)


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
