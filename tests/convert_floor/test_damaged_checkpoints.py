"""An export hashes the weights while it writes: whatever is wrong with them, it is that which is said."""

from __future__ import annotations

import os
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.convert_floor.adapter_checkpoints import small_base, write_adapter
from tests.convert_floor.conftest import write_hf_model
from usdm_megatron.checkpoint import integrity
from usdm_megatron.convert import export_hf
from usdm_megatron.convert.export_hf import dry_run, run_export
from usdm_megatron.convert.import_hf import run_import
from usdm_megatron.convert.options import ExportOptions, ImportOptions, VerifyOptions
from usdm_megatron.convert.verify_weights import compare_weights
from usdm_megatron.errors import CheckpointError
from usdm_megatron.lora_spec import LoraSpec

FILES = ("__0_0.distcp", "__0_1.distcp", ".metadata", "hf_config.json", "vocabulary.json", "common.pt")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A converted model in two `.distcp` files. Read only."""
    work = tmp_path_factory.mktemp("whole")
    run_import(ImportOptions(hf_path=str(write_hf_model(work / "hf")), save=work / "ck", workers=2))
    return work / "ck"


@pytest.fixture
def checkpoint(whole: Path, tmp_path: Path) -> Path:
    return shutil.copytree(whole, tmp_path / "ck")


def flip(path: Path, position: int, bits: int = 4) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= bits
    path.write_bytes(content)


def refuse(root: Path, *files: str, **options: Any) -> None:
    """Exporting must name just these files of the checkpoint, and leave nothing."""
    target = root.parent / "hf"
    with pytest.raises(CheckpointError) as refused:
        run_export(ExportOptions(load=root, hf_path=target, **options))
    named = [Path(problem.split(" differs")[0]).name for problem in refused.value.problems]
    assert named == sorted(files), refused.value
    assert [path.name for path in root.parent.iterdir()] == [root.name]


@settings(max_examples=60, deadline=None)
@given(file=st.sampled_from(FILES), share=st.floats(0, 1, exclude_max=True), bits=st.integers(1, 255))
def test_any_flipped_byte_refuses_the_export_and_names_the_file(
    tmp_path_factory: pytest.TempPathFactory, whole: Path, file: str, share: float, bits: int
) -> None:
    """In values, in the archives around them (which torch cannot read then), in what describes them."""
    root = shutil.copytree(whole, tmp_path_factory.mktemp("flip") / "ck")
    path = root / "release" / file
    flip(path, int(share * path.stat().st_size), bits)
    refuse(root, file)


@pytest.mark.parametrize("share", [0, 0.4, 0.99])
def test_truncated_weights_are_named(checkpoint: Path, share: float) -> None:
    path = checkpoint / "release" / "__0_1.distcp"
    os.truncate(path, int(share * path.stat().st_size))
    refuse(checkpoint, "__0_1.distcp")


def test_all_damaged_files_are_named_at_once(checkpoint: Path) -> None:
    for name in FILES:
        flip(checkpoint / "release" / name, 40)
    refuse(checkpoint, *FILES)


def test_damage_explains_values_that_are_not_finite(checkpoint: Path) -> None:
    path = checkpoint / "release" / "__0_0.distcp"
    content = path.read_bytes()
    nan = torch.full((4096,), float("nan")).numpy().tobytes()
    path.write_bytes(content[:4096] + nan + content[4096 + len(nan) :])
    refuse(checkpoint, "__0_0.distcp")


def test_a_dry_run_reads_every_byte(checkpoint: Path) -> None:
    flip(checkpoint / "release" / "__0_1.distcp", -200)
    with pytest.raises(CheckpointError, match=r"__0_1\.distcp differs"):
        dry_run(ExportOptions(load=checkpoint, hf_path=checkpoint.parent / "hf"))


@pytest.mark.parametrize("damaged", [True, False])
def test_nothing_is_published_before_the_last_byte_was_hashed(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, damaged: bool
) -> None:
    """With a hash that is slower than everything else, and a directory that would be replaced."""
    written, target = threading.Event(), checkpoint.parent / "hf"
    target.mkdir()
    (target / "config.json").write_text("the old one")
    flip(checkpoint / "release" / "__0_0.distcp", 4000, 4 if damaged else 0)  # in a value: it can be read
    write_shard, file_sha256 = export_hf.write_shard, integrity.file_sha256
    seen: list[bool] = []

    def last_shard(*arguments: Any) -> str:
        digest = write_shard(*arguments)
        written.set()
        return digest

    def late(path: Path, *arguments: Any) -> str:
        if path.name == "__0_0.distcp":
            assert written.wait(60)
            seen.append((target / "config.json").read_text() == "the old one")
        return file_sha256(path, *arguments)

    monkeypatch.setattr(export_hf, "write_shard", last_shard)
    monkeypatch.setattr(integrity, "file_sha256", late)
    options = ExportOptions(load=checkpoint, hf_path=target, overwrite=True)
    if damaged:
        with pytest.raises(CheckpointError, match=r"__0_0\.distcp differs"):
            run_export(options)
    else:
        run_export(options)
    assert seen == [True]
    assert ((target / "config.json").read_text() == "the old one") is damaged
    assert sorted(path.name for path in checkpoint.parent.iterdir()) == ["ck", "hf"]


def test_an_error_of_the_disk_over_whole_weights_stays_one(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export_hf, "write_shard", full)
    with pytest.raises(OSError, match="No space left"):
        run_export(ExportOptions(load=checkpoint, hf_path=checkpoint.parent / "hf"))
    assert [path.name for path in checkpoint.parent.iterdir()] == ["ck"]


def test_each_byte_of_the_weights_is_hashed_once(whole: Path, tmp_path: Path, monkeypatch: Any) -> None:
    hashed: list[str] = []
    file_sha256 = integrity.file_sha256

    def counted(path: Path, *arguments: Any) -> str:
        hashed.append(path.name)
        return file_sha256(path, *arguments)

    monkeypatch.setattr(integrity, "file_sha256", counted)
    run_export(ExportOptions(load=whole, hf_path=tmp_path / "hf"))
    assert sorted(name for name in hashed if name.endswith(".distcp")) == ["__0_0.distcp", "__0_1.distcp"]


def test_a_comparison_names_the_damaged_file_and_not_the_tensor(checkpoint: Path, whole: Path) -> None:
    flip(checkpoint / "release" / "__0_0.distcp", 4000)  # in a value: it can be read, and differs
    options = VerifyOptions(hf_path=str(whole.parent / "hf"), load=checkpoint, mode="weights")
    with pytest.raises(CheckpointError) as refused:
        compare_weights(options)
    (problem,) = refused.value.problems
    assert problem.startswith(f"{checkpoint / 'release' / '__0_0.distcp'} differs")


@pytest.mark.parametrize("part", ["base", "adapter"])
def test_a_merge_names_the_damaged_file_of_either(tmp_path: Path, part: str) -> None:
    base = small_base(tmp_path)
    spec = LoraSpec(r=2, targets=frozenset({"q_proj", "down_proj"}))
    write_adapter(tmp_path / "ck", base, spec)
    damaged = {"base": base, "adapter": tmp_path / "ck" / "release"}[part] / "__0_0.distcp"
    flip(damaged, -200)
    with pytest.raises(CheckpointError) as refused:
        run_export(ExportOptions(load=tmp_path / "ck", hf_path=tmp_path / "merged", merge_lora=True))
    (problem,) = refused.value.problems
    assert problem.startswith(f"{damaged} differs")
    assert not list(tmp_path.glob("merged*"))
