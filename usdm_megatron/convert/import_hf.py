"""Hugging Face directory → torch_dist checkpoint: one tensor in memory at a time, nothing builds a model."""

from __future__ import annotations

import tempfile
import threading
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from usdm_megatron.architecture import HFArchitecture
from usdm_megatron.checkpoint.commit import remove_stale_temporaries
from usdm_megatron.checkpoint.facts import GENERATION_CONFIG_FILE, megatron_common, write_facts
from usdm_megatron.checkpoint.integrity import files_below
from usdm_megatron.checkpoint.resolve import RELEASE, list_steps
from usdm_megatron.checkpoint.streamed import save_streamed
from usdm_megatron.convert.destination import claimed, require_space
from usdm_megatron.convert.finite import non_finite_count
from usdm_megatron.convert.foreign_bytes import read_small_json
from usdm_megatron.convert.hf_source import HFSource, open_source
from usdm_megatron.convert.hub import locate
from usdm_megatron.convert.import_plan import ImportPlan, empty_objects, plan_import, streamed_tensors
from usdm_megatron.convert.mapping import describe_import
from usdm_megatron.convert.options import ImportOptions
from usdm_megatron.convert.progress import byte_progress
from usdm_megatron.convert.source_hashes import WeightHasher
from usdm_megatron.convert.weight_types import TypeName
from usdm_megatron.errors import ConversionError
from usdm_megatron.tokenizer import files as tokenizer_files
from usdm_megatron.vocab import Vocabulary

_MOST_GENERATION_BYTES = 1 << 20
_VERSIONS = ("torch", "megatron-core", "safetensors", "numpy")


@dataclass(frozen=True)
class ImportSummary:
    """What an import wrote."""

    path: Path
    model: HFArchitecture
    vocabulary: Vocabulary
    new_rows: int
    weight_type: TypeName
    size_bytes: int
    source_tensors: int
    removed: tuple[str, ...]  # what an interrupted run had left


def open_plan(options: ImportOptions) -> ImportPlan:
    """Find the source, check it, and decide what will be written; reads no weights."""
    assert options.hf_path is not None, "an adapter is imported by peft_import"
    check_destination(options)
    directory = locate(options.hf_path, options.hf_revision, options.hf_cache_dir)
    return plan_import(open_source(directory), options)


def run_import(options: ImportOptions) -> ImportSummary:
    """Convert; nothing appears under the final name unless all of it is there.

    Peak memory is `options.workers` tensors, however many layers there are. Raises
    `ConversionError` for a source that cannot be converted and `CheckpointError` for a destination
    that cannot be written, before any weight is read where that is possible.
    """
    plan = open_plan(options)
    with tempfile.TemporaryDirectory() as scratch, claimed(options.save):
        tokenizer_dir = _prepare_tokenizer(plan, Path(scratch) / "tokenizer")
        removed = remove_stale_temporaries(options.save)
        require_space(options.save, plan.size_bytes)
        saved = _write(plan, options, tokenizer_dir)
    return ImportSummary(
        path=saved,
        model=plan.model,
        vocabulary=plan.vocabulary,
        new_rows=len(plan.new_ids),
        weight_type=plan.weight_type,
        size_bytes=sum((saved / name).stat().st_size for name in files_below(saved)),
        source_tensors=len(plan.table.hf_shapes(plan.source_model)),
        removed=tuple(removed),
    )


def dry_run(options: ImportOptions) -> str:
    """What `run_import` would do, tensor by tensor."""
    plan = open_plan(options)
    require_space(options.save, plan.size_bytes)
    return describe_import(plan)


def _write(plan: ImportPlan, options: ImportOptions, tokenizer_dir: Path | None) -> Path:
    source = plan.source
    weights = CheckedWeights(source)
    with (
        WeightHasher(source.directory, _hashed_files(source)) as hasher,
        byte_progress("importing", plan.size_bytes) as progress,
    ):

        def finish(directory: Path) -> None:
            weights.raise_problems()
            write_facts(
                directory,
                hf_config=plan.hf_config,
                vocabulary=plan.vocabulary,
                provenance=_provenance(plan, options, hasher.result()),
                tokenizer_dir=tokenizer_dir,
                generation_config=_generation_config(source),
            )

        return save_streamed(
            options.save,
            RELEASE,
            list(streamed_tensors(plan, weights.read)),
            empty_objects(plan),
            megatron_common(plan.hf_config, plan.vocabulary, 0, plan.weight_type),
            finish,
            workers=options.workers,
            replace=options.overwrite,
            on_bytes=progress,
        )


class CheckedWeights:
    """Reads the source and remembers every tensor that is not finite: all are reported, at the end."""

    def __init__(self, source: HFSource) -> None:
        self._source = source
        self._problems: list[str] = []
        self._lock = threading.Lock()

    def read(self, name: str) -> torch.Tensor:
        tensor = self._source.read(name)
        if count := non_finite_count(tensor):
            file = self._source.directory / self._source.tensors[name].file
            with self._lock:
                self._problems.append(f"{file}: {name} has {count:,} values that are NaN or infinite")
        return tensor

    def raise_problems(self) -> None:
        if self._problems:
            raise ConversionError(*sorted(self._problems))


def _generation_config(source: HFSource) -> dict[str, Any] | None:
    path = source.directory / GENERATION_CONFIG_FILE
    return read_small_json(path, _MOST_GENERATION_BYTES) if path.is_file() else None


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


def check_destination(options: ImportOptions) -> None:
    """Refuse a place to write to that holds a converted model, unless `--overwrite`, or a run."""
    release = options.save / RELEASE
    if release.exists() and not options.overwrite:
        raise ConversionError(f"{release} exists; pass --overwrite to replace it, or choose another --save")
    if steps := list_steps(options.save):
        raise ConversionError(
            f"--save {options.save} is a run with checkpoints of its own (newest: step {steps[-1]}); "
            "choose another"
        )


def _hashed_files(source: HFSource) -> list[str]:
    small = ("config.json", GENERATION_CONFIG_FILE, *tokenizer_files.TOKENIZER_FILES)
    return [*(name for name in small if (source.directory / name).is_file()), *source.weight_files]


def _provenance(plan: ImportPlan, options: ImportOptions, hashes: dict[str, str]) -> dict[str, Any]:
    """Where the weights come from; no time, host or path, so that equal imports are equal bytes."""
    directory = plan.source.directory
    hf_path = str(options.hf_path)
    is_hub_id = not Path(hf_path).expanduser().exists()
    return {
        "source": hf_path if is_hub_id else directory.resolve().name,
        "revision": directory.name if is_hub_id else None,  # a snapshot's directory is its commit
        "files": hashes,
        "options": {
            "extend_vocab": options.extend_vocab,
            "dtype": plan.weight_type,
            "seed": plan.seed if plan.new_ids else None,
        },
        "versions": {name: version(name) for name in _VERSIONS},
    }
