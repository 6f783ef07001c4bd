"""Hugging Face directory → torch_dist checkpoint: one tensor in memory at a time, nothing builds a model."""

from __future__ import annotations

import shutil
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from usdm_megatron.architecture import HFArchitecture
from usdm_megatron.checkpoint.commit import remove_stale_temporaries, temporary_path
from usdm_megatron.checkpoint.facts import (
    GENERATION_CONFIG_FILE,
    megatron_common,
    write_facts,
    write_json,
)
from usdm_megatron.checkpoint.integrity import files_below
from usdm_megatron.checkpoint.resolve import RELEASE, list_steps
from usdm_megatron.checkpoint.streamed import save_streamed
from usdm_megatron.convert.destination import claimed, require_plain, require_space
from usdm_megatron.convert.finite import non_finite_problems
from usdm_megatron.convert.hf_source import INDEX_FILE, HFSource, open_source
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

_VERSIONS = (
    "usdm-megatron",
    "torch",
    "megatron-core",
    "safetensors",
    "numpy",
    "transformers",
    "tokenizers",
)


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
    has_tokenizer: bool
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
    with claimed(options.save):
        removed = remove_stale_temporaries(options.save)
        require_space(options.save, plan.size_bytes)
        with (
            WeightHasher(plan.source.directory, _hashed_files(plan.source)) as hasher,
            # beside the checkpoint, under a name that the next run cleans up after a kill
            _prepared_tokenizer(plan, temporary_path(options.save / RELEASE)) as tokenizer_dir,
        ):
            saved = _write(plan, options, tokenizer_dir, hasher)
    return ImportSummary(
        path=saved,
        model=plan.model,
        vocabulary=plan.vocabulary,
        new_rows=len(plan.new_ids),
        weight_type=plan.weight_type,
        size_bytes=sum((saved / name).stat().st_size for name in files_below(saved)),
        source_tensors=len(plan.table.hf_shapes(plan.source_model)),
        has_tokenizer=tokenizer_dir is not None,
        removed=tuple(removed),
    )


def dry_run(options: ImportOptions) -> str:
    """What `run_import` would do, tensor by tensor."""
    plan = open_plan(options)
    require_space(options.save, plan.size_bytes)
    with tempfile.TemporaryDirectory() as scratch, _prepared_tokenizer(plan, Path(scratch) / "tokenizer"):
        return describe_import(plan)


def _write(
    plan: ImportPlan, options: ImportOptions, tokenizer_dir: Path | None, hasher: WeightHasher
) -> Path:
    weights = WeightCheck(plan.source)
    with byte_progress("importing", plan.size_bytes) as progress:

        def finish(directory: Path) -> None:
            hashes = hasher.result()  # first: a damaged file explains its NaN
            weights.raise_problems()
            write_facts(
                directory,
                hf_config=plan.hf_config,
                vocabulary=plan.vocabulary,
                provenance=_provenance(plan, options, hashes),
                tokenizer_dir=tokenizer_dir,
                generation_config=plan.generation_config,
            )

        return save_streamed(
            options.save,
            RELEASE,
            list(streamed_tensors(plan, weights.see)),
            empty_objects(plan),
            megatron_common(plan.hf_config, plan.vocabulary, 0, plan.weight_type),
            finish,
            workers=options.workers,
            replace=options.overwrite,
            on_bytes=progress,
        )


class WeightCheck:
    """Sees every tensor on its way and remembers those that are not finite: all are reported, at the end."""

    def __init__(self, source: HFSource) -> None:
        self._source = source
        self._problems: list[str] = []
        self._lock = threading.Lock()

    def see(self, name: str, tensor: torch.Tensor, written: torch.Tensor) -> None:
        """`tensor` of the source as it is `written`; from any thread."""
        file = self._source.directory / self._source.tensors[name].file
        problems = non_finite_problems(f"{file}: {name}", tensor, written)
        with self._lock:
            self._problems += problems

    def raise_problems(self) -> None:
        if self._problems:
            raise ConversionError(*sorted(self._problems))


@contextmanager
def _prepared_tokenizer(plan: ImportPlan, target: Path) -> Iterator[Path | None]:
    """The checkpoint's tokenizer in `target`, extended and checked; None when the source has none."""
    source = plan.source.directory
    if not tokenizer_files.has_tokenizer(source):
        yield None
        return
    try:
        if plan.extends:
            tokenizer_files.extend_tokenizer(source, target, plan.vocabulary, plan.model.max_positions)
        else:
            tokenizer_files.copy_tokenizer(source, target)
        config = target / "config.json"  # where transformers may find the tokenizer's class, as in an export
        known = {key: value for key, value in plan.hf_config.items() if key != "auto_map"}
        write_json(config, {**known, "model_type": plan.table.model_type})
        tokenizer_files.check_tokenizer(target, plan.vocabulary, known_as=source)
        config.unlink()
        yield target
    finally:
        shutil.rmtree(target, ignore_errors=True)


def check_destination(options: ImportOptions) -> None:
    """Refuse a place to write to that holds a converted model, unless `--overwrite`, or a run."""
    release = options.save / RELEASE
    require_plain(release, "--save")
    if release.exists() and not options.overwrite:
        raise ConversionError(f"{release} exists; pass --overwrite to replace it, or choose another --save")
    if steps := list_steps(options.save):
        raise ConversionError(
            f"--save {options.save} is a run with checkpoints of its own (newest: step {steps[-1]}); "
            "choose another"
        )


def _hashed_files(source: HFSource) -> list[str]:
    small = ("config.json", GENERATION_CONFIG_FILE, INDEX_FILE, *tokenizer_files.TOKENIZER_FILES)
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
