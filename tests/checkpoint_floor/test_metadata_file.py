"""A checkpoint of a stranger's runs no code: its hashes match, because whoever writes a file hashes it."""

from __future__ import annotations

import io
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.metadata import MetadataIndex

from tests import tiny
from usdm_megatron.checkpoint import streamed
from usdm_megatron.checkpoint.integrity import write_integrity
from usdm_megatron.checkpoint.metadata_file import METADATA_FILE, read_metadata
from usdm_megatron.checkpoint.store import load_sharded, single_process_group
from usdm_megatron.checkpoint.tensor_reader import TensorReader
from usdm_megatron.convert.export_hf import run_export
from usdm_megatron.convert.options import ExportOptions
from usdm_megatron.errors import CheckpointError


class Hostile:
    """Touches a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return Path.touch, (self.mark,)


@pytest.fixture
def write_checkpoint(tmp_path: Path) -> Callable[[], Path]:
    hf = tiny.write_hf_model(tmp_path / "hf", num_hidden_layers=1)
    return lambda: tiny.write_checkpoint(hf, tmp_path / "ck") / "release"


def rehashed(directory: Path) -> Path:
    (directory / "integrity.json").unlink()
    write_integrity(directory)
    return directory


@pytest.mark.parametrize("inside", [False, True])
def test_metadata_that_runs_code_is_refused(
    write_checkpoint: Callable[[], Path], tmp_path: Path, inside: bool
) -> None:
    directory = write_checkpoint()
    content: Any = Hostile(tmp_path / "mark")
    if inside:  # of a record that is good otherwise
        metadata = read_metadata(directory)
        metadata.planner_data = content
        content = metadata
    (directory / METADATA_FILE).write_bytes(pickle.dumps(content))
    with pytest.raises(CheckpointError, match=r"\.metadata refers to .*touch, which no checkpoint needs"):
        run_export(ExportOptions(load=rehashed(directory), hf_path=tmp_path / "out"))
    assert not (tmp_path / "mark").exists() and not (tmp_path / "out").exists()


def test_metadata_cannot_point_outside(write_checkpoint: Callable[[], Path]) -> None:
    directory = write_checkpoint()
    metadata = read_metadata(directory)
    next(iter(metadata.storage_data.values())).relative_path = "../../secret.distcp"
    (directory / METADATA_FILE).write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match="only .distcp files beside it are read"):
        TensorReader(directory)


@pytest.mark.parametrize("content", [b"", b"\x80\x04N.", b"not a pickle", pickle.dumps({"a": 1})])
def test_other_bytes_are_a_clear_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / METADATA_FILE).write_bytes(content)
    with pytest.raises(CheckpointError, match=r"\.metadata cannot be read"):
        read_metadata(tmp_path)


def test_an_object_that_runs_code_is_refused_before_core_opens_it(
    write_checkpoint: Callable[[], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = streamed._StreamPlanner.resolve_data
    asked: list[MetadataIndex] = []

    def resolve(self: Any, item: Any) -> Any:
        if item.type != streamed.WriteItemType.BYTE_IO or asked:
            return honest(self, item)
        asked.append(item.index)
        data = io.BytesIO()
        torch.save(Hostile(tmp_path / "mark"), data)
        return data

    with monkeypatch.context() as patch:
        patch.setattr(streamed._StreamPlanner, "resolve_data", resolve)
        directory = write_checkpoint()
    from megatron.core.dist_checkpointing.mapping import ShardedObject

    key, shard = asked[0].fqn.split("/shard_")
    offset, shape = map(int, shard.split("_"))
    state = {"object": ShardedObject(key, None, (shape,), (offset,))}
    with single_process_group(), pytest.raises(CheckpointError, match="could run code when it is opened"):
        load_sharded(directory, state, strict="requested")
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize("name", [METADATA_FILE, "common.pt", "__0_0.distcp"])
def test_what_torch_opens_must_be_hashed(
    write_checkpoint: Callable[[], Path], tmp_path: Path, name: str
) -> None:
    directory = write_checkpoint()
    path = directory / "integrity.json"
    record = json.loads(path.read_text())
    del record["files"][name]
    path.write_text(json.dumps(record))
    with pytest.raises(CheckpointError, match=f"release/{name} is not named by integrity.json"):
        run_export(ExportOptions(load=directory, hf_path=tmp_path / "out"))
