"""A Hugging Face model directory to read: config, safetensors, tokenizer files.

Weights come from safetensors only. Names in an index file must be base names: a file outside
the directory is never opened, unless a symbolic link in it says so (the hub's cache consists of those).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from usdm_megatron.architecture import HFArchitecture
from usdm_megatron.convert.foreign_bytes import escaped, first_problems, is_file, named, read_small_json
from usdm_megatron.convert.name_table import ArchitectureTable
from usdm_megatron.convert.safetensors_header import SourceTensor, read_header
from usdm_megatron.errors import ConversionError
from usdm_megatron.file_reading import map_privately

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_MOST_CONFIG_BYTES = 4 << 20
_MOST_INDEX_BYTES = 16 << 20  # a hundred thousand tensors take 9 MB
_TORCH_TYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}
READABLE_TYPES = tuple(_TORCH_TYPES)


@dataclass(frozen=True)
class HFSource:
    """A readable model directory; the headers were read, the weights were not."""

    directory: Path
    config: dict[str, Any]
    tensors: dict[str, SourceTensor]

    @property
    def weight_files(self) -> tuple[str, ...]:
        return tuple(sorted({tensor.file for tensor in self.tensors.values()}))

    def read(self, name: str) -> torch.Tensor:
        """One floating point tensor, mapped from its file; safe in any thread.

        Its pages are given back with the tensor. What is written to it stays in this process. Raises
        `ConversionError` when the file is no longer what it was.
        """
        tensor = self.tensors[name]
        path = self.directory / tensor.file
        dtype = _TORCH_TYPES[tensor.dtype]
        if not tensor.size_bytes:
            return torch.empty(tensor.shape, dtype=dtype)
        try:
            mapping = map_privately(path, tensor.begin, tensor.size_bytes)
        except (OSError, ValueError) as error:
            raise ConversionError(f"{path} changed while it was read: {error}") from error
        data = torch.frombuffer(mapping, dtype=torch.uint8, offset=mapping.tell(), count=tensor.size_bytes)
        if tensor.begin % dtype.itemsize:  # upstream aligns tensors, the format does not ask for it
            data = data.clone()
        return data.view(dtype).view(tensor.shape)


def open_source(directory: Path) -> HFSource:
    """Read `config.json` and the headers of the safetensors files.

    Raises `ConversionError` with everything that is missing or malformed.
    """
    if not directory.is_dir():
        raise ConversionError(f"--hf-path {directory} is not a directory")
    config = read_small_json(directory / "config.json", _MOST_CONFIG_BYTES)
    if is_file(directory / SINGLE_FILE):  # transformers prefers it to the index, too
        return HFSource(directory, config, _read_headers(directory, [SINGLE_FILE]))
    if is_file(directory / INDEX_FILE):
        return HFSource(directory, config, _read_indexed(directory))
    pickled = sorted(path.name for path in directory.glob("*.bin"))
    if pickled:
        raise ConversionError(
            f"{directory} holds {pickled[0]} and no safetensors; .bin files are pickles, which can run code "
            "when opened. Load the model with transformers where you trust it, and save_pretrained() it again"
        )
    raise ConversionError(f"{directory} holds neither {SINGLE_FILE} nor {INDEX_FILE}")


def check_tensors(source: HFSource, table: ArchitectureTable, model: HFArchitecture) -> None:
    """Refuse a source whose tensors are not exactly this architecture's; all problems at once."""
    if model.layers > len(source.tensors):  # before that many names are made
        raise ConversionError(
            f"{source.directory}: config.json says num_hidden_layers = {model.layers:,}, but the weights "
            f"hold {len(source.tensors):,} tensors in all"
        )
    problems = first_problems(_tensor_problems(source, table, model))
    if problems:
        raise ConversionError(*problems)


def _tensor_problems(source: HFSource, table: ArchitectureTable, model: HFArchitecture) -> Iterator[str]:
    expected = table.hf_shapes(model)
    for name in expected:
        if name not in source.tensors:
            yield f"{source.directory}: tensor {name} is missing"
    for name, tensor in source.tensors.items():
        where = f"{source.directory / tensor.file}: tensor {named(name)}"
        if name not in expected:
            if not table.ignores(name, model) and not _is_tied_copy(source, name, model):
                yield f"{where} does not belong to this architecture"
        elif tensor.shape != expected[name]:
            yield f"{where} has shape {escaped(list(tensor.shape))}, expected {list(expected[name])}"
        elif tensor.dtype not in READABLE_TYPES:
            yield (
                f"{where} is of type {tensor.dtype}, not {', '.join(READABLE_TYPES)}; a quantized model is "
                "converted from its unquantized original"
            )


def _is_tied_copy(source: HFSource, name: str, model: HFArchitecture) -> bool:
    """With tied embeddings some writers store `lm_head.weight` all the same; equal bytes are no problem."""
    embedding = source.tensors.get("model.embed_tokens.weight")
    if not model.tied or name != "lm_head.weight" or embedding is None:
        return False
    copy = source.tensors[name]
    if (copy.shape, copy.dtype) != (embedding.shape, embedding.dtype) or copy.dtype not in _TORCH_TYPES:
        return False
    ours, theirs = (source.read(each).view(torch.uint8) for each in (name, "model.embed_tokens.weight"))
    return torch.equal(ours, theirs)


def _read_indexed(directory: Path) -> dict[str, SourceTensor]:
    """The tensors of all files that the index names; it may leave out some of a file's tensors."""
    index = directory / INDEX_FILE
    weight_map = read_small_json(index, _MOST_INDEX_BYTES).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ConversionError(f"{index}: weight_map must be an object of tensor name → file name")
    problems = first_problems(
        f"{index}: tensor {named(name)} is in {escaped(file)}; a file name is a string"
        for name, file in weight_map.items()
        if not isinstance(file, str)
    )
    names = sorted({file for file in weight_map.values() if isinstance(file, str)})
    problems += first_problems(_file_problems(directory, names))
    if problems:
        raise ConversionError(*problems)
    tensors = _read_headers(directory, names)
    problems = first_problems(
        f"{directory / file} does not hold tensor {named(name)}; {INDEX_FILE} says so"
        for name, file in weight_map.items()
        if name not in tensors or tensors[name].file != file
    )
    if problems:
        raise ConversionError(*problems)
    return tensors


def _file_problems(directory: Path, names: list[str]) -> Iterator[str]:
    index = directory / INDEX_FILE
    for name in names:
        if Path(name).name != name or "\\" in name or name == "..":
            yield f"{index} names {escaped(name)}; only files in the same directory are read"
        elif not name.endswith(".safetensors"):
            yield f"{index} names {escaped(name)}; only safetensors files are read"
        elif not is_file(directory / name):
            yield f"{directory / named(name)} is missing; {INDEX_FILE} names it"


def _read_headers(directory: Path, names: list[str]) -> dict[str, SourceTensor]:
    tensors: dict[str, SourceTensor] = {}
    problems: list[str] = []
    for name in names:
        try:
            found = read_header(directory / name)
        except ConversionError as error:
            problems += error.problems
            continue
        problems += (
            f"{directory}: tensor {named(twice)} is in {tensors[twice].file} and in {name}"
            for twice in sorted(tensors.keys() & found.keys())
        )
        tensors.update(found)
    if problems:
        raise ConversionError(*first_problems(problems))
    return tensors
