"""`.metadata` and the files must say the same; tensors lie where they can be mapped."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from usdm_megatron.checkpoint.distcp_writer import DistcpWriter
from usdm_megatron.checkpoint.mapped_archive import ALIGNMENT_BYTES
from usdm_megatron.checkpoint.metadata_file import METADATA_FILE, read_metadata
from usdm_megatron.checkpoint.tensor_reader import TensorReader
from usdm_megatron.errors import CheckpointError

TENSORS = {
    "a": torch.arange(35.0).reshape(5, 7),
    "b": torch.arange(13).to(torch.bfloat16),
    "c": torch.tensor(3),
    "d": torch.empty(0, 4),
}


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    dcp.save(dict(TENSORS), storage_writer=DistcpWriter(tmp_path))
    return tmp_path


def edit(directory: Path, change: Callable[[Any], None]) -> TensorReader:
    metadata = read_metadata(directory)
    change(metadata)
    (directory / METADATA_FILE).write_bytes(pickle.dumps(metadata))
    return TensorReader(directory)


def test_tensors_are_aligned_and_come_back(directory: Path) -> None:
    reader = TensorReader(directory)
    for key, tensor in TENSORS.items():
        found = reader.read(key)
        assert found.dtype == tensor.dtype and torch.equal(found, tensor), key
    places = read_metadata(directory).storage_data.values()
    assert len(places) == len(TENSORS)
    assert [place.offset % ALIGNMENT_BYTES for place in places] == [0] * len(TENSORS)


def test_core_s_own_reader_takes_them(directory: Path) -> None:
    loaded = {key: torch.zeros_like(tensor) for key, tensor in TENSORS.items()}
    dcp.load(loaded, storage_reader=dcp.FileSystemReader(directory))
    assert all(torch.equal(loaded[key], tensor) for key, tensor in TENSORS.items())


def swap_places(metadata: Any) -> None:
    a, b = (next(index for index in metadata.storage_data if index.fqn == key) for key in "ab")
    metadata.storage_data[a], metadata.storage_data[b] = metadata.storage_data[b], metadata.storage_data[a]


def claim_float(metadata: Any) -> None:
    properties = metadata.state_dict_metadata["b"].properties
    metadata.state_dict_metadata["b"].properties = replace(properties, dtype=torch.float16)


def transform(metadata: Any) -> None:
    for place in metadata.storage_data.values():
        place.transform_descriptors = ["zstd"]


def lose_a_chunk(metadata: Any) -> None:
    metadata.state_dict_metadata["a"].size = torch.Size([10, 7])


@pytest.mark.parametrize(
    ("change", "key", "match"),
    [
        (swap_places, "a", "a cannot be read: holds values of torch.bfloat16, described as torch.float32"),
        (claim_float, "b", "b cannot be read: holds values of torch.bfloat16, described as torch.float16"),
        (transform, "a", "a cannot be read: is transformed by zstd, which is not supported"),
        (lose_a_chunk, "a", "does not hold all of a"),
    ],
)
def test_what_is_not_as_described_is_refused(
    directory: Path, change: Callable[[Any], None], key: str, match: str
) -> None:
    with pytest.raises(CheckpointError, match=match):
        edit(directory, change).read(key)


def test_a_tensor_of_more_axes_is_refused(tmp_path: Path) -> None:
    dcp.save({"a": torch.zeros(5, 7, 2)}, storage_writer=DistcpWriter(tmp_path))

    def flatten(metadata: Any) -> None:
        entry = metadata.state_dict_metadata["a"]
        entry.size = torch.Size([5, 7])
        entry.chunks[0] = replace(entry.chunks[0], offsets=torch.Size([0, 0]), sizes=torch.Size([5, 7]))
        (place,) = metadata.storage_data.values()
        metadata.storage_data = {
            replace(index, offset=torch.Size([0, 0])): place for index in metadata.storage_data
        }

    with pytest.raises(CheckpointError, match=r"has shape \[5, 7, 2\], described as \[5, 7\]"):
        edit(tmp_path, flatten).read("a")


def test_what_is_no_tensor_is_refused_in_one_line_and_without_advice(directory: Path) -> None:
    """torch says: "re-running with `weights_only` set to `False` will likely succeed"."""
    (path,) = directory.glob("*.distcp")

    class Planted:
        def __reduce__(self) -> Any:
            return (print, ("ran",))

    torch.save(Planted(), directory / "other")
    content = (directory / "other").read_bytes()
    path.write_bytes(content)

    def point_there(metadata: Any) -> None:
        for index, place in metadata.storage_data.items():
            metadata.storage_data[index] = replace(place, offset=0, length=len(content))

    with pytest.raises(CheckpointError) as refused:
        edit(directory, point_there).read("a")
    (problem,) = refused.value.problems
    assert problem.startswith(f"{path}: a cannot be read: it holds more than plain values and tensors")
    assert "\n" not in problem and "weights_only" not in problem
