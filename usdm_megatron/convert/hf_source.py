"""A Hugging Face model directory to read: config, safetensors, tokenizer files.

Weights come from safetensors only. Names in an index file must be base names: a file outside
the directory is never opened.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from usdm_megatron.architecture import HFArchitecture
from usdm_megatron.convert.name_table import ArchitectureTable
from usdm_megatron.errors import ConversionError
from usdm_megatron.file_reading import read_json_object

if TYPE_CHECKING:
    import torch

_SINGLE_FILE = "model.safetensors"
_INDEX_FILE = "model.safetensors.index.json"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_HUB_PATTERNS = ["*.json", "*.safetensors", "tokenizer.model", "*.jinja"]


@dataclass(frozen=True)
class SourceTensor:
    """One tensor of the source: in which file, which shape and type (safetensors' name: `BF16`)."""

    file: str
    shape: tuple[int, ...]
    dtype: str


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
        """One tensor, from the memory-mapped file."""
        from safetensors import safe_open

        with safe_open(self.directory / self.tensors[name].file, framework="pt") as file:
            return file.get_tensor(name)


def open_source(directory: Path) -> HFSource:
    """Read `config.json` and the headers of the safetensors files.

    Raises `ConversionError` with everything that is missing or malformed.
    """
    if not directory.is_dir():
        raise ConversionError(f"--hf-path {directory} is not a directory")
    config = read_json_object(directory / "config.json")
    if (directory / _SINGLE_FILE).is_file():  # transformers prefers it to the index, too
        return HFSource(directory, config, _read_headers(directory, [_SINGLE_FILE]))
    if (directory / _INDEX_FILE).is_file():
        return HFSource(directory, config, _read_indexed(directory))
    pickled = sorted(path.name for path in directory.glob("*.bin"))
    if pickled:
        raise ConversionError(
            f"{directory} holds {pickled[0]} and no safetensors; .bin files are pickles, which can run code "
            "when opened. Load the model with transformers where you trust it, and save_pretrained() it again"
        )
    raise ConversionError(f"{directory} holds neither {_SINGLE_FILE} nor {_INDEX_FILE}")


def locate(hf_path: str, revision: str | None, cache_dir: Path | None) -> Path:
    """The local directory of `--hf-path`: itself, or the snapshot of a hub repository.

    Raises `ConversionError` when there is no such directory and the hub does not give one.
    """
    local = Path(hf_path).expanduser()
    if local.exists():
        if revision is not None:
            raise ConversionError(f"--hf-revision goes with a hub id; {hf_path} is a directory here")
        return local
    if not _HUB_ID.fullmatch(hf_path):
        raise ConversionError(f"--hf-path {hf_path} does not exist")
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(hf_path, revision=revision, cache_dir=cache_dir, allow_patterns=_HUB_PATTERNS)
        )
    except Exception as error:  # the hub's own, its HTTP library's and the file system's have no common base
        reason = str(error).strip().splitlines()
        raise ConversionError(
            f"--hf-path {hf_path} is no directory here, and the hub did not give it: "
            f"{type(error).__name__}: {reason[0] if reason else ''} Download it where there is a connection "
            "(`hf download`, `hf auth login` for gated models) and name the directory"
        ) from error


def check_tensors(source: HFSource, table: ArchitectureTable, model: HFArchitecture) -> None:
    """Refuse a source whose tensors are not exactly this architecture's; all problems at once."""
    expected = table.hf_shapes(model)
    problems = [
        f"{source.directory}: tensor {name} is missing" for name in expected if name not in source.tensors
    ]
    for name, tensor in source.tensors.items():
        if name not in expected:
            if not table.ignores(name, model) and not _is_tied_copy(source, name, model):
                problems.append(
                    f"{source.directory / tensor.file}: tensor {name} does not belong to this architecture"
                )
        elif tensor.shape != expected[name]:
            problems.append(
                f"{source.directory / tensor.file}: tensor {name} has shape {list(tensor.shape)}, expected "
                f"{list(expected[name])}"
            )
    if problems:
        raise ConversionError(*problems)


def _is_tied_copy(source: HFSource, name: str, model: HFArchitecture) -> bool:
    """With tied embeddings some writers store `lm_head.weight` all the same; equal values are no problem."""
    embedding = "model.embed_tokens.weight"
    if not model.tied or name != "lm_head.weight" or embedding not in source.tensors:
        return False
    return bool((source.read(name) == source.read(embedding)).all())


def _read_indexed(directory: Path) -> dict[str, SourceTensor]:
    index = directory / _INDEX_FILE
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, Mapping) or not weight_map:
        raise ConversionError(f"{index}: weight_map must be an object of tensor name → file name")
    names = sorted({str(file) for file in weight_map.values()})
    problems = []
    for name in names:
        if Path(name).name != name or "\\" in name or name in (".", ".."):
            problems.append(f"{index} names {name!r}; only files in the same directory are read")
        elif not name.endswith(".safetensors"):
            problems.append(f"{index} names {name!r}; only safetensors files are read")
        elif not (directory / name).is_file():
            problems.append(f"{directory / name} is missing; {_INDEX_FILE} names it")
    if problems:
        raise ConversionError(*problems)
    tensors = _read_headers(directory, names)
    problems = [
        f"{directory / str(file)} does not hold tensor {name}; {_INDEX_FILE} says so"
        for name, file in weight_map.items()
        if name not in tensors or tensors[name].file != file
    ]
    if problems:
        raise ConversionError(*problems)
    return tensors


def _read_headers(directory: Path, names: list[str]) -> dict[str, SourceTensor]:
    from safetensors import SafetensorError, safe_open

    tensors: dict[str, SourceTensor] = {}
    problems = []
    for name in names:
        try:
            with safe_open(directory / name, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118 - not a mapping
                    if key in tensors:
                        problems.append(f"tensor {key} is in {tensors[key].file} and in {name}")
                    part = file.get_slice(key)
                    tensors[key] = SourceTensor(name, tuple(part.get_shape()), part.get_dtype())
        except (SafetensorError, OSError) as error:
            problems.append(f"{directory / name} cannot be read as safetensors: {error}")
    if problems:
        raise ConversionError(*problems)
    return tensors
