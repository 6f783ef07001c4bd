"""PEFT directory → LoRA checkpoint over a base that is converted already, to train on from or to merge."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from usdm_megatron.checkpoint.adapter_facts import AdapterFacts, BaseIdentity
from usdm_megatron.checkpoint.commit import remove_stale_temporaries
from usdm_megatron.checkpoint.facts import CheckpointFacts, megatron_common, read_facts, write_facts
from usdm_megatron.checkpoint.integrity import INTEGRITY_FILE, files_below
from usdm_megatron.checkpoint.resolve import RELEASE, resolve_checkpoint
from usdm_megatron.checkpoint.streamed import StreamedTensor, save_streamed
from usdm_megatron.convert.adapter_weights import AdapterPlace, adapter_places
from usdm_megatron.convert.destination import claimed, require_space
from usdm_megatron.convert.foreign_bytes import escaped, first_problems, is_file, named, read_small_json
from usdm_megatron.convert.hf_source import READABLE_TYPES, HFSource
from usdm_megatron.convert.import_hf import ImportSummary, WeightCheck, check_destination
from usdm_megatron.convert.options import ImportOptions
from usdm_megatron.convert.peft_config import ADAPTER_CONFIG_FILE, spec_of
from usdm_megatron.convert.peft_export import ADAPTER_WEIGHTS_FILE, BASE_FILE
from usdm_megatron.convert.safetensors_header import read_header
from usdm_megatron.convert.source_hashes import WeightHasher
from usdm_megatron.convert.weight_types import TORCH_TYPES, TypeName, type_of_safetensors
from usdm_megatron.errors import ConversionError
from usdm_megatron.model.lora.names import highest_rank

_MOST_CONFIG_BYTES = 4 << 20  # a hundred thousand trained ids take 2 MB
_MOST_BASE_BYTES = 4 << 10
_WHOLE_EMBEDDINGS = tuple(
    f".{module}.{weight}"
    for module in ("embed_tokens", "lm_head")
    for weight in ("weight", "base_layer.weight")
)
_PICKLED = "adapter_model.bin"


@dataclass(frozen=True)
class AdapterImportPlan:
    """Everything that was decided before a weight is read."""

    source: HFSource
    base: CheckpointFacts
    adapter: AdapterFacts
    places: dict[str, AdapterPlace]
    weight_type: TypeName

    @property
    def size_bytes(self) -> int:
        """Of the weights as written, without the few bytes of framing."""
        values = sum(torch.Size(place.shape).numel() for place in self.places.values())
        return values * TORCH_TYPES[self.weight_type].itemsize

    @property
    def trained_rows(self) -> int:
        vocabulary = self.base.vocabulary
        return vocabulary.size - vocabulary.text_size if self.adapter.spec.train_new_embeddings else 0


def import_adapter(options: ImportOptions) -> ImportSummary:
    """Convert; nothing appears under the final name unless all of it is there.

    Raises `ConversionError` for an adapter that this package does not compute or that does not fit the
    base, `CheckpointError` for a damaged base or a destination that cannot be written.
    """
    plan = _open_plan(options)
    with claimed(options.save):
        removed = remove_stale_temporaries(options.save)
        require_space(options.save, plan.size_bytes)
        saved = _write(plan, options)
    return ImportSummary(
        path=saved,
        model=plan.base.architecture,
        vocabulary=plan.base.vocabulary,
        new_rows=plan.trained_rows,
        weight_type=plan.weight_type,
        size_bytes=sum((saved / name).stat().st_size for name in files_below(saved)),
        source_tensors=len(plan.places),
        has_tokenizer=plan.base.tokenizer_dir is not None,
        removed=tuple(removed),
    )


def dry_run(options: ImportOptions) -> str:
    """What `import_adapter` would do, tensor by tensor."""
    plan = _open_plan(options)
    require_space(options.save, plan.size_bytes)
    lines = [
        f"{plan.source.directory}: {len(plan.places)} tensors, over {plan.adapter.base_directory}",
        *(f"  {name} {list(place.shape)} → {place.entry.core_key}" for name, place in plan.places.items()),
        f"{plan.size_bytes / 1e9:.2f} GB as {plan.weight_type}; nothing was written",
    ]
    return "\n".join(lines)


def _open_plan(options: ImportOptions) -> AdapterImportPlan:
    assert options.adapter is not None and options.load is not None, "ImportOptions has checked it"
    check_destination(options)
    source = _open_source(options.adapter)
    base = read_facts(resolve_checkpoint(options.load, fallback=False).path)
    config_path = source.directory / ADAPTER_CONFIG_FILE
    spec = spec_of(source.config, config_path, base.vocabulary, tied=base.architecture.tied)
    if spec.r > (highest := highest_rank(spec.targets, base.architecture)):
        raise ConversionError(
            f"{config_path}: r is {escaped(spec.r)}; the projections that it adapts have no change of a rank "
            f"above {highest}, their smaller side; merge this adapter with peft, and import the model"
        )
    adapter = AdapterFacts.over(base.directory, spec)
    _check_base(source.directory, adapter)
    places = adapter_places(spec, base.architecture, base.vocabulary)
    if problems := first_problems(_tensor_problems(source, places)):
        raise ConversionError(*problems)
    found_types = {tensor.dtype for tensor in source.tensors.values()}
    weight_type = type_of_safetensors(found_types) if options.dtype == "auto" else options.dtype
    return AdapterImportPlan(source, base, adapter, places, weight_type)


def _open_source(directory: Path) -> HFSource:
    if not directory.is_dir():
        raise ConversionError(f"--adapter {directory} is not a directory")
    config = read_small_json(directory / ADAPTER_CONFIG_FILE, _MOST_CONFIG_BYTES)
    weights = directory / ADAPTER_WEIGHTS_FILE
    if not is_file(weights):
        if is_file(directory / _PICKLED):
            raise ConversionError(
                f"{directory} holds {_PICKLED} and no {ADAPTER_WEIGHTS_FILE}; .bin files are pickles, which "
                "can run code when opened. Load the adapter with peft where you trust it, and "
                "save_pretrained() it again"
            )
        raise ConversionError(f"{weights} is missing")
    return HFSource(directory, config, read_header(weights))


def _check_base(directory: Path, adapter: AdapterFacts) -> None:
    """Refuse a base that our own export says is another; what others wrote does not say."""
    path = directory / BASE_FILE
    if not is_file(path):
        print(
            f"{directory} does not say which weights it was trained over (no {BASE_FILE}): that they are "
            f"those of {adapter.base_directory} is not checked beyond their shapes",
            file=sys.stderr,
        )
        return
    try:
        expected = BaseIdentity.from_record(read_small_json(path, _MOST_BASE_BYTES)["base"])
    except (KeyError, TypeError, AttributeError) as error:
        raise ConversionError(
            f"{path} is malformed: {error!r}; export the adapter again, or remove the file to go without it"
        ) from error
    if not adapter.base.is_of(expected):
        raise ConversionError(
            f"--load {adapter.base_directory} is another model than the adapter's base: the sha256 of its "
            f"{INTEGRITY_FILE} is {adapter.base.sha256[:12]}…, {path} says {expected.sha256[:12]}…, nor was "
            "it converted from the same files; give the checkpoint that the adapter was trained over, or, if "
            f"this is the same model by another way, remove {BASE_FILE} and {INTEGRITY_FILE} from {directory}"
        )


def _tensor_problems(source: HFSource, places: dict[str, AdapterPlace]) -> Iterator[str]:
    """Whatever differs from exactly the tensors that the configuration and the base ask for."""
    path = source.directory / ADAPTER_WEIGHTS_FILE
    for name in places:
        if name not in source.tensors:
            yield f"{path}: tensor {name} is missing"
    for name, tensor in source.tensors.items():
        where = f"{path}: tensor {named(name)}"
        if name not in places:
            yield f"{where} {_why_not(name)}"
        elif tensor.shape != places[name].shape:
            yield (
                f"{where} has shape {escaped(list(tensor.shape))}, expected {list(places[name].shape)} by "
                f"{ADAPTER_CONFIG_FILE} and the base"
            )
        elif tensor.dtype not in READABLE_TYPES:
            yield f"{where} is of type {tensor.dtype}, not {', '.join(READABLE_TYPES)}"


def _why_not(name: str) -> str:
    if name.endswith(_WHOLE_EMBEDDINGS):
        return (
            "is a whole embedding, which peft saves beside the adapter when it may have changed "
            "(save_embedding_layers); merge this adapter with peft (merge_and_unload), and import the model"
        )
    return "is none of a LoRA adapter with these targets over this base"


def _write(plan: AdapterImportPlan, options: ImportOptions) -> Path:
    base, source = plan.base, plan.source
    weights = WeightCheck(source)
    dtype = TORCH_TYPES[plan.weight_type]

    def make(name: str) -> torch.Tensor:
        tensor = source.read(name)
        written = tensor.to(dtype)
        weights.see(name, tensor, written)
        return written

    def finish(directory: Path) -> None:
        hashes = hasher.result()  # first: a damaged file explains its NaN
        weights.raise_problems()
        plan.adapter.write(directory)
        write_facts(
            directory,
            hf_config=base.hf_config,
            vocabulary=base.vocabulary,
            provenance=_provenance(plan, hashes),
            tokenizer_dir=base.tokenizer_dir,
            generation_config=base.generation_config,
        )

    names = [ADAPTER_CONFIG_FILE, ADAPTER_WEIGHTS_FILE, BASE_FILE]
    present = [name for name in names if is_file(source.directory / name)]
    with WeightHasher(source.directory, present) as hasher:
        return save_streamed(
            options.save,
            RELEASE,
            [
                StreamedTensor(
                    place.entry.core_key,
                    place.shape,
                    dtype,
                    partial(make, name),
                    place.layer,
                    base.architecture.layers,
                )
                for name, place in plan.places.items()
            ],
            (),
            megatron_common(base.hf_config, base.vocabulary, 0, plan.weight_type),
            finish,
            workers=options.workers,
            replace=options.overwrite,
        )


def _provenance(plan: AdapterImportPlan, hashes: dict[str, str]) -> dict[str, Any]:
    """The base's, and the adapter's."""
    source = {"source": plan.source.directory.resolve().name, "files": hashes}
    return {**plan.base.provenance, "adapter": source}
