"""`usdm-megatron reply`: what it prints and writes, and what it says to bad input."""

from __future__ import annotations

import io
import json
import shutil
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tests.cli.test_start_up import HEAVY, probe
from tests.convert_floor.conftest import edit_json
from tests.reply_floor.conftest import VOCABULARY, WriteStore, one_exchange
from tests.tiny import write_hf_model
from usdm_megatron.checkpoint.integrity import write_integrity
from usdm_megatron.cli import main
from usdm_megatron.corpora.dialog import DialogTemplate
from usdm_megatron.demo.tokenizer import write_mistral_tokenizer
from usdm_megatron.errors import DataError
from usdm_megatron.reply.model_directory import open_model_directory
from usdm_megatron.reply.unit_file import read_units


@pytest.fixture
def units_file(tmp_path: Path) -> Path:
    path = tmp_path / "units.txt"
    path.write_text("1 2 3\n\t19\n")
    return path


def test_prints_transcript_reply_and_units(
    model_path: Path, units_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "reply.json"
    command = ["reply", "--model", str(model_path), "--units", str(units_file), "--max-new-tokens", "6"]
    assert main([*command, "--json", str(out)]) == 0
    printed = capsys.readouterr().out.splitlines()
    record = json.loads(out.read_text())
    assert set(record) == {"transcript", "text", "units", "unfinished"}
    assert printed[0] == f"transcript   {record['transcript']}".splitlines()[0]
    assert any(line == f"reply units  {' '.join(map(str, record['units']))}" for line in printed)
    assert all(0 <= unit < VOCABULARY.unit_count for unit in record["units"])
    assert "unfinished" in printed[-1]


def test_standard_input(
    model_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"1 2 3 19")))
    assert main(["reply", "--model", str(model_path), "--units", "-", "--max-new-tokens", "1"]) == 0
    assert "reply units" in capsys.readouterr().out


def test_evaluates_a_store(
    model_path: Path,
    template: DialogTemplate,
    write_store: WriteStore,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    samples = [template.sample(one_exchange("hello", "hi", [unit], [unit])) for unit in range(3)]
    store, out = write_store(samples), tmp_path / "out.json"
    command = ["reply", "--model", str(model_path), "--eval", store.prefix, "--max-new-tokens", "4"]
    assert main([*command, "--batch-size", "2", "--limit", "2", "--json", str(out)]) == 0
    printed = capsys.readouterr()
    record = json.loads(out.read_text())
    assert record["exchanges"] == 2
    assert f"{store.prefix}: 2 replies" in printed.out
    assert f"word error rate {record['transcript_word_error_rate']:7.2%}" in printed.out
    assert "2 of 2 replies" in printed.err


def test_help_imports_nothing_heavy() -> None:
    found = probe("reply", "--help")
    assert found["code"] == 0
    assert "--units" in found["output"] and "--eval" in found["output"]
    assert set(found["modules"]).isdisjoint(HEAVY)


# --- bad input


def error_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[str]:
    assert main(["reply", *arguments]) == 2
    return capsys.readouterr().err.splitlines()


def test_flags_that_contradict(model_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = ("--model", str(model_path))
    (neither,) = error_of(capsys, *model)
    assert "neither is given" in neither
    both, below = error_of(capsys, *model, "--units", "-", "--eval", "P", "--batch-size", "0")
    assert "both are given" in both and "--batch-size is 0" in below
    limit, out = error_of(
        capsys, *model, "--units", "-", "--limit", "3", "--json", str(tmp_path / "no" / "out.json")
    )
    assert "--limit counts the dialogs of --eval" in limit and "is no directory" in out
    missing, *_ = error_of(capsys, *model, "--eval", str(tmp_path / "none"))
    assert "no token store" in missing
    (batch,) = error_of(capsys, *model, "--units", "-", "--batch-size", "4")
    assert "--batch-size counts replies of --eval; drop it" in batch


@pytest.mark.parametrize("name", [".", "", "/", "{there}"])
def test_json_that_is_a_directory(
    name: str, model_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Said before any work: the units are not even looked for."""
    path = name.format(there=tmp_path)
    (problem,) = error_of(capsys, "--model", str(model_path), "--units", "nowhere", "--json", path)
    assert "is a directory; name a file" in problem


@pytest.mark.parametrize(
    ("text", "problems"),
    [
        (b"", ["holds no units; give decimal numbers"]),
        (b" \n\t\n", ["holds no units"]),
        (b"1 2\n3 x4 5\n", ["line 2: 'x4' is no unit"]),
        (b"1 2\n\n-3", ["line 3: '-3' is no unit"]),
        (b"<|unit5|>", ["line 1: '<|unit5|>' is no unit"]),
        (b"1 20\n19 " + b"9" * 5000, ["line 1: unit 20 is out of range; the model has 0 to 19", "line 2: "]),
        (b"1.5 \xff", ["'1.5' is no unit", "'\ufffd' is no unit"]),
        (b"x " * 50, ["'x'"] * 10),
    ],
)
def test_malformed_units(tmp_path: Path, text: bytes, problems: list[str]) -> None:
    path = tmp_path / "units.txt"
    path.write_bytes(text)
    with pytest.raises(DataError) as caught:
        read_units(str(path), VOCABULARY)
    assert len(caught.value.problems) == len(problems)
    for found, expected in zip(caught.value.problems, problems, strict=True):
        assert found.startswith(f"--units {path}") and expected in found


def test_units_that_cannot_be_read(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none"):
        with pytest.raises(DataError, match="--units .*: cannot be read"):
            read_units(str(path), VOCABULARY)
    large = tmp_path / "large"
    large.write_bytes(b"1 " * (5 << 20))
    with pytest.raises(DataError, match="larger than 8 MiB"):
        read_units(str(large), VOCABULARY)


def test_standard_input_that_is_closed(
    model_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", None)  # as Python starts under `<&-`
    (problem,) = error_of(capsys, "--model", str(model_path), "--units", "-")
    assert "--units -: standard input is closed; pipe the units in" in problem


def test_more_units_than_the_context(
    model_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "units.txt"
    path.write_text("1 " * 300)
    (problem,) = error_of(capsys, "--model", str(model_path), "--units", str(path))
    assert "reads 200 tokens at once, and the prompt takes 345" in problem


def test_directories_that_are_no_speech_model(
    model_path: Path, tmp_path: Path, units_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def problem_with(path: Path) -> str:
        return error_of(capsys, "--model", str(path), "--units", str(units_file))[0]

    assert "no such directory" in problem_with(tmp_path / "none")
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "no config.json in it" in problem_with(empty)
    (empty / "adapter_config.json").write_text("{}")
    assert "export it with --merge-lora" in problem_with(empty)
    plain = write_hf_model(tmp_path / "plain", vocab_size=32_000, num_hidden_layers=1)
    assert "no tokenizer in it" in problem_with(plain)
    write_mistral_tokenizer(plain)
    assert "its vocabulary of 32,000 ids has no speech units" in problem_with(plain)
    broken = shutil.copytree(model_path, tmp_path / "broken")
    (broken / "tokenizer.json").write_text("{")
    assert "cannot be read" in problem_with(broken)


def test_weights_that_are_incomplete_or_pickled(
    model_path: Path, tmp_path: Path, units_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """transformers would fill a missing tensor with random numbers and reply all the same."""
    deeper = shutil.copytree(model_path, tmp_path / "deeper")
    edit_json(deeper / "config.json", num_hidden_layers=3, layer_types=None)
    problems = error_of(capsys, "--model", str(deeper), "--units", str(units_file))
    assert "tensor model.layers.2" in problems[0] and "is missing" in problems[0]
    pickled = shutil.copytree(model_path, tmp_path / "pickled")
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    assert "pickles" in error_of(capsys, "--model", str(pickled), "--units", str(units_file))[0]


def test_weights_that_are_damaged(
    model_path: Path, tmp_path: Path, units_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By their record where there is one (our exports have it), else by what comes of them."""
    path = shutil.copytree(model_path, tmp_path / "damaged")
    reply = ("--model", str(path), "--units", str(units_file), "--max-new-tokens", "1")
    write_integrity(path)
    assert main(["reply", *reply]) == 0
    weights = path / "model.safetensors"
    tensors = load_file(weights)
    tensors["lm_head.weight"][:] = float("nan")
    save_file(tensors, weights, metadata={"format": "pt"})
    (problem,) = error_of(capsys, *reply)
    assert f"{weights} differs from what integrity.json recorded" in problem
    (path / "integrity.json").unlink()
    (problem,) = error_of(capsys, *reply)
    assert "the model's logits are NaN or infinite" in problem and "export again" in problem


def test_the_context_is_the_shorter_limit(model_path: Path, tmp_path: Path) -> None:
    assert open_model_directory(model_path).context_tokens == 200
    unlimited = shutil.copytree(model_path, tmp_path / "unlimited")
    for limit in (10**30, 1e30, None, 0, "many"):
        edit_json(unlimited / "tokenizer_config.json", model_max_length=limit)
        assert open_model_directory(unlimited).context_tokens == 512  # max_position_embeddings
