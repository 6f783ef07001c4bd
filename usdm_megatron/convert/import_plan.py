"""What an import will do, decided and checked before a weight is read.

The vocabulary is extended first and sharded later: what a new token gets depends on the seed
and its id alone, never on padding or a layout.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from usdm_megatron.architecture import HFArchitecture
from usdm_megatron.checkpoint.facts import GENERATION_CONFIG_FILE
from usdm_megatron.checkpoint.streamed import EmptyObject, StreamedTensor
from usdm_megatron.convert.foreign_bytes import escaped, read_small_json
from usdm_megatron.convert.hf_source import HFSource, check_tensors
from usdm_megatron.convert.name_table import (
    EXTRA_STATE_KEYS,
    ArchitectureTable,
    Arrangement,
    Entry,
    architecture_table,
    core_shape,
    from_hf,
)
from usdm_megatron.convert.new_rows import new_rows
from usdm_megatron.convert.options import ImportOptions, VocabularyExtension
from usdm_megatron.convert.weight_types import (
    TORCH_TYPES,
    TypeName,
    transformers_name,
    type_of_safetensors,
)
from usdm_megatron.errors import ConversionError
from usdm_megatron.tokenizer.files import has_tokenizer, ids_to_extend, read_vocabulary
from usdm_megatron.vocab import USDM_VOCABULARY, Vocabulary

_NEW_ROWS_AT_A_TIME = 512
_MOST_GENERATION_BYTES = 1 << 20
_MOST_SIGMAS = 8.0  # what a float32 standard normal never reaches
SeeTensor = Callable[[str, torch.Tensor, torch.Tensor], None]  # name, as in the source, as written


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
    generation_config: dict[str, Any] | None

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

    @property
    def size_bytes(self) -> int:
        """Of the weights as written, without the few bytes of framing."""
        return sum(
            torch.Size(tensor.shape).numel() * tensor.dtype.itemsize for tensor in streamed_tensors(self)
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
    extension = options.extension
    vocabulary = found if extension is None else _extended(source, found, extension)
    model = HFArchitecture.from_hf_config({**source.config, "vocab_size": vocabulary.size})
    if vocabulary != found:
        _check_new_rows(model, weight_type)
    return ImportPlan(
        source,
        table,
        source_model,
        model,
        vocabulary,
        vocabulary != found,
        weight_type,
        options.seed,
        _generation_config(source.directory / GENERATION_CONFIG_FILE),
    )


def streamed_tensors(plan: ImportPlan, see: SeeTensor = lambda *_: None) -> Iterator[StreamedTensor]:
    """The checkpoint's tensors, in the order of the source; each is read when it is made; `see` sees it."""
    for entry, layer in plan.table.in_order(plan.model):
        yield StreamedTensor(
            entry.core_key,
            core_shape(entry, plan.model, plan.vocabulary.padded_size),
            TORCH_TYPES[plan.weight_type],
            _maker(plan, entry, layer, see),
            layer,
            plan.model.layers,
        )


def empty_objects(plan: ImportPlan) -> list[EmptyObject]:
    """What core's linear layers ask for when they load strictly."""
    layers = plan.model.layers
    return [EmptyObject(key, layer, layers) for key in EXTRA_STATE_KEYS for layer in range(layers)]


def _maker(plan: ImportPlan, entry: Entry, layer: int | None, see: SeeTensor) -> Callable[[], torch.Tensor]:
    def make() -> torch.Tensor:
        if entry.arrangement is Arrangement.VOCABULARY:
            (name,) = entry.hf_names(layer)
            known = plan.source.read(name)
            whole = _vocabulary_tensor(plan, name, known)
            see(name, known, whole[: len(known)])
            return whole
        tensors = {}
        for name in entry.hf_names(layer):
            tensor = plan.source.read(name)
            tensors[name] = tensor.to(TORCH_TYPES[plan.weight_type])
            see(name, tensor, tensors[name])
        return from_hf(entry, tensors, plan.model, plan.vocabulary.padded_size, layer)

    return make


def _vocabulary_tensor(plan: ImportPlan, name: str, known: torch.Tensor) -> torch.Tensor:
    """Known rows, new rows, zeros; in place, because these are the largest tensors of a model."""
    tensor = torch.zeros(
        (plan.vocabulary.padded_size, plan.model.hidden), dtype=TORCH_TYPES[plan.weight_type]
    )
    tensor[: len(known)] = known
    new, std = plan.new_ids, plan.model.initializer_range
    for begin in range(new.start, new.stop, _NEW_ROWS_AT_A_TIME):
        ids = range(begin, min(begin + _NEW_ROWS_AT_A_TIME, new.stop))
        tensor[ids.start : ids.stop] = new_rows(name, ids, plan.model.hidden, std, plan.seed)
    return tensor


def _generation_config(path: Path) -> dict[str, Any] | None:
    return read_small_json(path, _MOST_GENERATION_BYTES) if os.path.lexists(path) else None


def _check_new_rows(model: HFArchitecture, weight_type: TypeName) -> None:
    std, largest = model.initializer_range, torch.finfo(TORCH_TYPES[weight_type]).max
    if _MOST_SIGMAS * std > largest:
        raise ConversionError(
            f"config.json: initializer_range = {std:g}: new rows of that standard deviation would exceed "
            f"what {weight_type} holds (±{largest:.5g}); set it to the model's, 0.02 for most"
        )


def _source_vocabulary(source: HFSource, model: HFArchitecture) -> Vocabulary:
    bos_id, eos_id = (
        _special_id(source, name, default, model.vocab_size) for name, default in (("bos", 1), ("eos", 2))
    )
    if has_tokenizer(source.directory):
        return read_vocabulary(source.directory, model.vocab_size, bos_id, eos_id)
    if model.vocab_size == USDM_VOCABULARY.size:  # weights alone: the number gives it away
        return Vocabulary(bos_id=bos_id, eos_id=eos_id)
    return Vocabulary(text_size=model.vocab_size, unit_count=0, bos_id=bos_id, eos_id=eos_id)


def _special_id(source: HFSource, name: str, default: int, vocab_size: int) -> int:
    said = source.config.get(f"{name}_token_id")
    ids = [default] if said is None else said if isinstance(said, list) and said else [said]
    for token_id in ids:
        if type(token_id) is not int or not 0 <= token_id < vocab_size:  # a bool is no id
            raise ConversionError(
                f"config.json: {name}_token_id = {escaped(token_id)} must be an id of the model, from 0 to "
                f"{vocab_size - 1} (vocab_size - 1)" + (f"; absent means {default}" if said is None else "")
            )
    return int(ids[0])  # several ways to end: the first is the tokenizer's


def _extended(source: HFSource, found: Vocabulary, extension: VocabularyExtension) -> Vocabulary:
    """The vocabulary that `--extend-vocab` asks for; what was found when it is there already."""
    if found.has_speech:
        if (found.unit_count, found.extra_tokens) != (extension.units, extension.tokens):
            raise ConversionError(
                f"{source.directory}: partially extended: {found.unit_count:,} speech units and "
                f"{len(found.extra_tokens)} extra tokens are there, --extend-vocab asks for "
                f"{extension.units:,} and {len(extension.tokens)}"
            )
        return found
    if not has_tokenizer(source.directory):
        raise ConversionError(
            f"--extend-vocab: {source.directory} holds no tokenizer to extend (tokenizer.json or "
            "tokenizer.model)"
        )
    vocabulary = replace(found, unit_count=extension.units, extra_tokens=extension.tokens)
    known = ids_to_extend(source.directory, found.text_size)
    if taken := [token for token in vocabulary.added_tokens() if token in known]:
        raise ConversionError(
            *(f"--extend-vocab: {token} is token {known[token]} of the source already" for token in taken)
        )
    return vocabulary
