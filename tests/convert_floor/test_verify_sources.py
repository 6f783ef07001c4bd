"""`verify --mode logits` believes nothing of the Hugging Face side that an import would refuse."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests import tiny
from usdm_megatron.cli.convert import main
from usdm_megatron.cli.entry import run_guarded
from usdm_megatron.convert.hf_source import INDEX_FILE, SINGLE_FILE

Change = Callable[[Path], None]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model and its checkpoint. Read only."""
    directory = tmp_path_factory.mktemp("model")
    hf = tiny.write_hf_model(directory / "hf", num_hidden_layers=1)
    return hf, tiny.write_checkpoint(hf, directory / "ck")


def without_norms(hf: Path) -> None:
    tensors = {name: tensor for name, tensor in load_file(hf / SINGLE_FILE).items() if "norm" not in name}
    save_file(tensors, hf / SINGLE_FILE, metadata={"format": "pt"})


def with_another(hf: Path) -> None:
    tensors = {**load_file(hf / SINGLE_FILE), "model.more.weight": torch.ones(2)}
    save_file(tensors, hf / SINGLE_FILE, metadata={"format": "pt"})


def mis_shaped(hf: Path) -> None:
    tensors = load_file(hf / SINGLE_FILE)
    tensors["model.norm.weight"] = torch.ones(7)
    save_file(tensors, hf / SINGLE_FILE, metadata={"format": "pt"})


def truncated(hf: Path) -> None:
    content = (hf / SINGLE_FILE).read_bytes()
    (hf / SINGLE_FILE).write_bytes(content[:-10])


def outside(hf: Path) -> None:
    shutil.move(hf / SINGLE_FILE, hf.parent / "outside.safetensors")
    names = load_file(hf.parent / "outside.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "../outside.safetensors")}
    (hf / INDEX_FILE).write_text(json.dumps(index))


def pickled(hf: Path) -> None:
    (hf / SINGLE_FILE).rename(hf / "pytorch_model.bin")


def piped(hf: Path) -> None:
    (hf / "config.json").unlink()
    os.mkfifo(hf / "config.json")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without_norms, "tensor model.norm.weight is missing"),
        (with_another, "tensor model.more.weight does not belong"),
        (mis_shaped, "tensor model.norm.weight has shape [7], expected [32]"),
        (truncated, "truncated: expected"),
        (outside, "only files in the same directory are read"),
        (pickled, "pickles, which can run code"),
        (piped, "config.json is not a regular file"),
    ],
)
def test_what_an_import_refuses_is_refused(
    model: tuple[Path, Path],
    tmp_path: Path,
    change: Change,
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    hf = shutil.copytree(model[0], tmp_path / "hf")
    change(hf)
    assert run_guarded(main, ["verify", "--hf-path", str(hf), "--load", str(model[1])]) == 2
    shown = capsys.readouterr()
    assert message in shown.err and "equal" not in shown.out


def test_a_directory_as_the_report_is_refused_before_anything_runs(
    model: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["verify", "--hf-path", str(model[0]), "--load", str(model[1]), "--json", str(tmp_path)]
    assert run_guarded(main, arguments) == 2
    assert f"--json {tmp_path} is a directory" in capsys.readouterr().err
