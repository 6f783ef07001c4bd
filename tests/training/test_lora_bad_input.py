"""Wrong input of `--lora`: one clear message, exit code 2, before any rank starts."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests import tiny
from tests.convert_floor.adapter_checkpoints import write_adapter
from tests.training.dialogs import random_dialogs, write_rows
from usdm_megatron.cli import main
from usdm_megatron.cli.convert import main as convert
from usdm_megatron.cli.training import TrainingCommand
from usdm_megatron.config_file import dump_config
from usdm_megatron.lora_spec import LoraSpec
from usdm_megatron.vocab import Vocabulary

SPEC = LoraSpec(r=4, alpha=16.0, targets=frozenset({"q_proj", "v_proj"}))
SAME = ("--lora", "--lora-r", "4", "--no-train-new-embeddings")
Started = Callable[..., str]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(
        tmp_path_factory.mktemp("data") / "dialogs", [[dialog] for dialog in random_dialogs(8, longest=30)]
    )


@pytest.fixture(scope="module")
def adapter(tiny_model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A converted adapter over `tiny_model`, as `import --adapter` writes one."""
    return write_adapter(tmp_path_factory.mktemp("adapter") / "root", tiny_model.release, SPEC)


@pytest.fixture
def started(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Started:
    """A dry run of `sft` with these flags: what it prints, or why it refuses."""

    def call(*flags: str, code: int = 2) -> str:
        words = [
            "sft",
            "--train-data-path",
            str(data),
            "--save",
            str(tmp_path / "run"),
            "--seq-length",
            "128",
        ]
        assert main([*words, "--dry-run", *flags]) == code
        captured = capsys.readouterr()
        return captured.err if code else captured.out

    return call


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--lora-r", "0"], "lora: r is 0; it must be a whole number, 1 or more"),
        (["--lora-r", "-3"], "lora: r is -3"),
        (["--lora-r", "100000000"], "above 32, its smaller side; set --lora-r to 32 or less"),
        (["--lora-alpha", "0"], "lora: alpha is 0.0; it must be a positive number"),
        (["--lora-dropout", "1"], "lora: dropout is 1.0; it must be at least 0 and below 1"),
        (["--lora-target-modules", "q_prj"], "target module 'q_prj' is unknown; did you mean q_proj?"),
        (["--lora-target-modules", "embed_tokens"], "target module 'embed_tokens' is unknown; known are"),
        (["--lora-target-modules"], "no target modules"),
    ],
)
def test_a_spec_that_is_none(flags: list[str], expected: str, started: Started, tiny_model: Any) -> None:
    assert expected in started("--lora", *flags, "--pretrained-checkpoint", str(tiny_model.root))


def test_all_problems_come_at_once(started: Started) -> None:
    message = started("--lora", "--lora-r", "0", "--lora-dropout", "2", "--lora-target-modules", "a", "b")
    assert len(message.splitlines()) == 4


def test_flags_of_lora_without_it(started: Started, tiny_model: Any) -> None:
    message = started("--lora-r", "4", "--pretrained-checkpoint", str(tiny_model.root))
    assert "lora: r set, and --lora is not; add --lora" in message


def test_fields_of_lora_in_a_file_without_it(started: Started, tiny_model: Any, tmp_path: Path) -> None:
    """Refused as the same flags are; not what a run of all weights wrote, nor what is off by word."""
    file = tmp_path / "config.yaml"
    start = ("--config", str(file), "--pretrained-checkpoint", str(tiny_model.root))
    file.write_text("lora: {r: 4, alpha: 3}")
    assert "lora: r, alpha set, and --lora is not; add --lora" in started(*start)
    assert "lora: r, alpha set" in started(*start, "--no-lora")
    started(*start, "--lora", code=0)
    for text in ("lora: {enabled: true, r: 4}", "lora: {enabled: false, r: 4}"):
        file.write_text(text)
        started(*start, "--no-lora", code=0)
        assert "lora: alpha set" in started(*start, "--no-lora", "--lora-alpha", "7")
    for recipe in ("usdm", "corrected"):
        plain = TrainingCommand("sft", "").parse(["--recipe", recipe, "--seq-length", "128"])[1]
        file.write_text(dump_config(plain))
        started(*start, code=0)


def test_one_problem_a_value(started: Started) -> None:
    for flag, value in (("--lora-alpha", "inf"), ("--lora-dropout", "nan"), ("--adam-beta1", "nan")):
        assert len(started("--lora", flag, value).splitlines()) == 1


def test_a_vocabulary_without_new_ids(started: Started, tmp_path: Path, data: Path) -> None:
    vocabulary = Vocabulary(text_size=tiny.VOCABULARY.size, unit_count=0)
    hf = tiny.write_hf_model(tmp_path / "hf")
    root = tiny.write_checkpoint(hf, tmp_path / "plain", vocabulary)
    message = started("--lora", "--train-new-embeddings", "--pretrained-checkpoint", str(root))
    assert "has no speech ids whose rows could train" in message and "--no-train-new-embeddings" in message


def test_an_adapter_needs_lora(started: Started, adapter: Path) -> None:
    message = started("--pretrained-checkpoint", str(adapter))
    assert "is an adapter, and this run trains all weights; add --lora" in message
    assert "--merge-lora" in message


def test_an_adapter_that_is_not_made_so(started: Started, adapter: Path) -> None:
    other = (
        "--lora-r",
        "8",
        "--lora-alpha",
        "4",
        "--lora-target-modules",
        "o_proj",
        "--train-new-embeddings",
    )
    message = started("--lora", *other, "--pretrained-checkpoint", str(adapter))
    for rule in (
        "--lora-r 4, now it is 8",
        "--lora-alpha 16.0, now it is 4.0",
        "--lora-target-modules q_proj",
    ):
        assert rule in message
    assert "was made with --no-train-new-embeddings; give it again" in message
    assert len(message.splitlines()) == 4


def test_a_converted_adapter_starts(started: Started, adapter: Path, tiny_model: Any) -> None:
    """As weights to start with; beside it in --load, --pretrained-checkpoint is its base."""
    out = started(*SAME, "--pretrained-checkpoint", str(adapter), code=0)
    assert f"start       {adapter / 'release'} at step 0" in out
    assert f"LoRA base   {tiny_model.release}" in out
    started(*SAME, "--load", str(adapter), "--pretrained-checkpoint", str(tiny_model.root), code=0)


def test_an_adapter_over_another_base(started: Started, adapter: Path, tmp_path: Path) -> None:
    other = tiny.write_checkpoint(tiny.write_hf_model(tmp_path / "hf", seed=1), tmp_path / "other")
    message = started(*SAME, "--load", str(adapter), "--pretrained-checkpoint", str(other))
    assert "is another model than the adapter's base" in message


def test_a_base_that_is_gone_or_damaged(started: Started, tiny_model: Any, tmp_path: Path) -> None:
    base, root = tmp_path / "base", tmp_path / "adapter"
    shutil.copytree(tiny_model.root, base)
    write_adapter(root, base / "release", SPEC)
    shard = next((base / "release").glob("*.distcp"))
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    assert shard.name in started(*SAME, "--pretrained-checkpoint", str(root))
    shutil.rmtree(base)
    message = started(*SAME, "--load", str(root))
    assert "is not there (any more); say where the base is now with --pretrained-checkpoint" in message


def test_a_base_that_moved_from_an_adapter_to_start_with(
    started: Started, tiny_model: Any, tmp_path: Path
) -> None:
    """--pretrained-checkpoint names the adapter and cannot name the base too: what is advised works."""
    base, moved, root = tmp_path / "base", tmp_path / "moved", tmp_path / "adapter"
    shutil.copytree(tiny_model.root, base)
    write_adapter(root, base / "release", SPEC)
    base.rename(moved)
    message = started(*SAME, "--pretrained-checkpoint", str(root))
    assert "is not there (any more); put it back there, or tie the adapter to where it is now" in message
    assert "say where the base is now" not in message
    tool = "python tools/convert_hf_checkpoint.py"
    commands = message.split(f"{tool} ")[1:]
    names = {"DIR": tmp_path / "dir", "BASE": moved, "NEW": tmp_path / "new"}
    for command in commands:
        words = command.replace(", then", "").split()
        assert convert([str(names.get(word, word)) for word in words]) == 0
    assert f"LoRA base   {moved}" in started(*SAME, "--pretrained-checkpoint", str(tmp_path / "new"), code=0)


def test_a_layout_that_does_not_divide(started: Started, tiny_model: Any) -> None:
    flags = ("--tensor-model-parallel-size", "3", "--world-size", "3", "--global-batch-size", "4")
    assert "tp=3" in started("--lora", *flags, "--pretrained-checkpoint", str(tiny_model.root))
