"""Hugging Face directory → torch_dist checkpoint, without building a model.

The vocabulary is extended first and sharded later: what a new token gets depends on the seed
and its id alone, never on padding or a layout.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from usdm_megatron.architecture import HFArchitecture
from usdm_megatron.checkpoint.commit import remove_stale_temporaries
from usdm_megatron.checkpoint.facts import megatron_common, write_facts
from usdm_megatron.checkpoint.integrity import file_hashes
from usdm_megatron.checkpoint.resolve import RELEASE, list_steps
from usdm_megatron.checkpoint.store import save_checkpoint, single_process_group
from usdm_megatron.convert.hf_source import HFSource, check_tensors, locate, open_source
from usdm_megatron.convert.name_table import (
    EXTRA_STATE_KEYS,
    ArchitectureTable,
    Arrangement,
    architecture_table,
    from_hf,
)
from usdm_megatron.convert.new_rows import new_rows
from usdm_megatron.convert.options import ImportOptions
from usdm_megatron.convert.weight_types import (
    TORCH_TYPES,
    TypeName,
    transformers_name,
    type_of_safetensors,
)
from usdm_megatron.errors import ConversionError
from usdm_megatron.tokenizer import files as tokenizer_files
from usdm_megatron.vocab import USDM_VOCABULARY, Vocabulary


@dataclass(frozen=True)
class ImportPlan:
    """Everything that was decided before a weight is read."""

    source: HFSource
    table: ArchitectureTable
    source_model: HFArchitecture  # as in the source
    model: HFArchitecture  # with the extended vocabulary
    vocabulary: Vocabulary
    extends: bool
    weight_type: TypeName
    seed: int

    @property
    def new_ids(self) -> range:
        return range(self.source_model.vocab_size, self.model.vocab_size)

    @property
    def hf_config(self) -> dict[str, Any]:
        """The source's config with the vocabulary and type of the checkpoint."""
        config = {**self.source.config, "vocab_size": self.model.vocab_size}
        for key in ("dtype", "torch_dtype"):  # 5.x and 4.x
            if key in config:
                config[key] = transformers_name(self.weight_type)
        config.setdefault("torch_dtype", transformers_name(self.weight_type))
        return config


@dataclass(frozen=True)
class ImportSummary:
    """What an import wrote."""

    path: Path
    model: HFArchitecture
    vocabulary: Vocabulary
    new_rows: int
    weight_type: TypeName
    size_bytes: int


def run_import(options: ImportOptions) -> ImportSummary:
    """Convert; nothing appears under the final name unless all of it is there.

    Raises `ConversionError` for a source that cannot be converted and `CheckpointError` for a
    destination that cannot be written, before any weight is read where that is possible.
    """
    _check_destination(options)
    source = open_source(locate(options.hf_path, options.hf_revision, options.hf_cache_dir))
    plan = plan_import(source, options)
    with tempfile.TemporaryDirectory() as scratch, single_process_group():
        tokenizer_dir = _prepare_tokenizer(plan, Path(scratch) / "tokenizer")
        remove_stale_temporaries(options.save)
        saved = save_checkpoint(
            options.save,
            RELEASE,
            {"model": sharded_model(plan)},
            megatron_common(plan.hf_config, plan.vocabulary, 0, plan.weight_type),
            lambda directory: write_facts(
                directory,
                hf_config=plan.hf_config,
                vocabulary=plan.vocabulary,
                provenance=_provenance(plan, options),
                tokenizer_dir=tokenizer_dir,
            ),
            replace=options.overwrite,
        )
    return ImportSummary(
        saved.path, plan.model, plan.vocabulary, len(plan.new_ids), plan.weight_type, saved.size_bytes
    )


def plan_import(source: HFSource, options: ImportOptions) -> ImportPlan:
    """Decide the vocabulary and type, and check every tensor's name and shape; reads no weights."""
    table = architecture_table(source.config)
    source_model = HFArchitecture.from_hf_config(source.config)
    check_tensors(source, table, source_model)
    names = table.hf_shapes(source_model)
    weight_type = (
        type_of_safetensors({source.tensors[name].dtype for name in names})
        if options.dtype == "auto"
        else options.dtype
    )
    found = _source_vocabulary(source, source_model)
    vocabulary = _extended(source, found) if options.extend_vocab == "usdm" else found
    model = HFArchitecture.from_hf_config({**source.config, "vocab_size": vocabulary.size})
    return ImportPlan(
        source, table, source_model, model, vocabulary, vocabulary != found, weight_type, options.seed
    )


def sharded_model(plan: ImportPlan) -> dict[str, Any]:
    """The model's part of the checkpoint: core's keys, stacked over layers, in the checkpoint's type."""
    from megatron.core.dist_checkpointing import ShardedObject, ShardedTensor

    layers = plan.model.layers
    state: dict[str, Any] = {}
    for key, layer, tensor in core_tensors(plan):
        offsets = () if layer is None else ((0, layer, layers),)
        state[_unique(key, layer)] = ShardedTensor.from_rank_offsets(
            key, tensor, *offsets, prepend_axis_num=len(offsets)
        )
    for key in EXTRA_STATE_KEYS:
        for layer in range(layers):
            state[_unique(key, layer)] = ShardedObject(key, None, (layers,), (layer,))
    return state


def core_tensors(plan: ImportPlan) -> Iterator[tuple[str, int | None, torch.Tensor]]:
    """(core key, layer, tensor) of everything, one at a time, read when it is asked for."""
    for entry in plan.table.entries_of(plan.model):
        for layer in entry.layers(plan.model):
            tensors = {name: _hf_tensor(plan, name) for name in entry.hf_names(layer)}
            if entry.arrangement is Arrangement.VOCABULARY:
                tensors = {name: _with_new_rows(plan, name, tensor) for name, tensor in tensors.items()}
            yield (
                entry.core_key,
                layer,
                from_hf(entry, tensors, plan.model, plan.vocabulary.padded_size, layer),
            )


def _hf_tensor(plan: ImportPlan, name: str) -> torch.Tensor:
    return plan.source.read(name).to(TORCH_TYPES[plan.weight_type])


def _with_new_rows(plan: ImportPlan, name: str, tensor: torch.Tensor) -> torch.Tensor:
    if not plan.new_ids:
        return tensor
    rows = new_rows(name, plan.new_ids, plan.model.hidden, plan.model.initializer_range, plan.seed)
    return torch.cat([tensor, rows.to(tensor.dtype)])


def _unique(key: str, layer: int | None) -> str:
    return key if layer is None else f"{key}.{layer}"


def _source_vocabulary(source: HFSource, model: HFArchitecture) -> Vocabulary:
    bos_id, eos_id = (_special_id(source, name, default) for name, default in (("bos", 1), ("eos", 2)))
    if tokenizer_files.has_tokenizer(source.directory):
        return tokenizer_files.read_vocabulary(source.directory, model.vocab_size, bos_id, eos_id)
    if model.vocab_size == USDM_VOCABULARY.size:  # weights alone: the number gives it away
        return Vocabulary(bos_id=bos_id, eos_id=eos_id)
    return Vocabulary(text_size=model.vocab_size, unit_count=0, bos_id=bos_id, eos_id=eos_id)


def _special_id(source: HFSource, name: str, default: int) -> int:
    token_id = source.config.get(f"{name}_token_id", default)
    if isinstance(token_id, list) and token_id:  # several ways to end: the first is the tokenizer's
        token_id = token_id[0]
    if not isinstance(token_id, int) or token_id < 0:
        raise ConversionError(f"config.json: {name}_token_id = {token_id!r} must be an id")
    return token_id


def _extended(source: HFSource, found: Vocabulary) -> Vocabulary:
    """The vocabulary that `--extend-vocab usdm` asks for; what was found when it is there already."""
    if found.has_speech:
        if found.unit_count != USDM_VOCABULARY.unit_count:
            raise ConversionError(
                f"{source.directory}: partially extended: {found.unit_count:,} of "
                f"{USDM_VOCABULARY.unit_count:,} speech units are there"
            )
        return found
    if not tokenizer_files.has_tokenizer(source.directory):
        raise ConversionError(
            f"--extend-vocab usdm: {source.directory} holds no tokenizer to extend (tokenizer.json or "
            "tokenizer.model)"
        )
    return Vocabulary(text_size=found.text_size, bos_id=found.bos_id, eos_id=found.eos_id)


def _prepare_tokenizer(plan: ImportPlan, target: Path) -> Path | None:
    """The checkpoint's tokenizer directory, extended and checked; None when the source has none."""
    source = plan.source.directory
    if not tokenizer_files.has_tokenizer(source):
        return None
    if plan.extends:
        tokenizer_files.extend_tokenizer(source, target, plan.vocabulary, plan.model.max_positions)
    else:
        tokenizer_files.copy_tokenizer(source, target)
    if plan.vocabulary.has_speech:
        tokenizer_files.check_tokenizer(target, plan.vocabulary)
    return target


def _check_destination(options: ImportOptions) -> None:
    release = options.save / RELEASE
    if release.exists() and not options.overwrite:
        raise ConversionError(f"{release} exists; pass --overwrite to replace it, or choose another --save")
    if steps := list_steps(options.save):
        raise ConversionError(
            f"--save {options.save} is a run with checkpoints of its own (newest: step {steps[-1]}); "
            "choose another"
        )


def _provenance(plan: ImportPlan, options: ImportOptions) -> dict[str, Any]:
    """Where the weights come from; no time, host or path, so that equal imports are equal bytes."""
    directory = plan.source.directory
    names = [
        name for name in ("config.json", *tokenizer_files.TOKENIZER_FILES) if (directory / name).is_file()
    ]
    is_hub_id = not Path(options.hf_path).expanduser().exists()
    return {
        "source": options.hf_path if is_hub_id else directory.resolve().name,
        "revision": directory.name if is_hub_id else None,  # a snapshot's directory is its commit
        "files": file_hashes(directory, [*names, *plan.source.weight_files]),
        "options": {
            "extend_vocab": options.extend_vocab,
            "dtype": plan.weight_type,
            "seed": plan.seed if plan.new_ids else None,
        },
        "versions": {name: version(name) for name in ("torch", "megatron-core", "safetensors", "numpy")},
    }
