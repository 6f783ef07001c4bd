"""Single values of a source that would go wrong later: each is refused before a weight is written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.convert_floor.conftest import edit_json
from usdm_megatron.checkpoint.facts import read_facts
from usdm_megatron.cli.convert import main
from usdm_megatron.cli.entry import run_guarded
from usdm_megatron.convert import import_hf
from usdm_megatron.convert.export_hf import run_export
from usdm_megatron.convert.import_hf import dry_run, run_import
from usdm_megatron.convert.options import ExportOptions, ImportOptions
from usdm_megatron.errors import CheckpointError, ConversionError
from usdm_megatron.vocab import Vocabulary


def refuse(source: Path, save: Path, match: str, **options: Any) -> str:
    """A dry run and an import must fail with `match` before anything is written."""
    for action in (dry_run, run_import):
        with pytest.raises(ConversionError, match=match) as refused:
            action(ImportOptions(hf_path=str(source), save=save, **options))
        assert not save.exists()
    return str(refused.value)


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(import_hf, "_write", lambda *_: pytest.fail("weights were to be written"))


@pytest.fixture
def with_tokenizer(plain_model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(plain_model, tmp_path / "with_tokenizer"))


# ── numbers that the target type does not hold ──


def rewrite(source: Path, name: str, value: float, dtype: torch.dtype) -> None:
    tensors = {key: tensor.to(dtype) for key, tensor in load_file(source / "model.safetensors").items()}
    tensors[name].view(-1)[:2] = value
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("name", ["model.norm.weight", "model.embed_tokens.weight"])
@pytest.mark.parametrize(
    ("value", "stored", "dtype", "limit"),
    [
        (1e6, torch.float32, "fp16", "float16 holds (±65504)"),
        (-1e300, torch.float64, "fp32", "float32 holds (±3.4028e+38)"),
    ],
)
def test_an_import_never_writes_infinity(
    small_model: Callable[..., Path],
    tmp_path: Path,
    name: str,
    value: float,
    stored: torch.dtype,
    dtype: Any,
    limit: str,
) -> None:
    source = small_model()
    rewrite(source, name, value, stored)
    with pytest.raises(ConversionError) as refused:
        run_import(ImportOptions(hf_path=str(source), save=tmp_path / "ck", dtype=dtype))
    assert f"{name} has 2 values beyond what {limit}; choose another --dtype" in str(refused.value)
    assert not (tmp_path / "ck").exists()


def test_an_export_never_writes_infinity(small_model: Callable[..., Path], tmp_path: Path) -> None:
    source = small_model()
    rewrite(source, "model.norm.weight", 1e6, torch.float32)
    run_import(ImportOptions(hf_path=str(source), save=tmp_path / "ck"))
    with pytest.raises(ConversionError, match="2 values beyond what float16 holds.*choose another --dtype"):
        run_export(ExportOptions(load=tmp_path / "ck", hf_path=tmp_path / "hf", dtype="fp16"))
    assert not (tmp_path / "hf").exists()


def test_new_rows_never_are_infinite(with_tokenizer: Path, tmp_path: Path) -> None:
    edit_json(with_tokenizer / "config.json", initializer_range=1e308)
    refuse(with_tokenizer, tmp_path / "ck", "initializer_range = 1e[+]308.*exceed", extend_vocab="units=3")


def test_f64_names_the_remedy(small_model: Callable[..., Path], tmp_path: Path) -> None:
    source = small_model()
    rewrite(source, "model.norm.weight", 1, torch.float64)
    refuse(source, tmp_path / "ck", "type F64; supported are BF16, F16, F32: say --dtype")


# ── the config ──


@pytest.mark.parametrize("value", [77, 10**9, -1, True, [2, 77], 1.0])
@pytest.mark.parametrize("name", ["bos_token_id", "eos_token_id"])
def test_special_ids_are_ids_of_the_model(
    small_model: Callable[..., Path], tmp_path: Path, no_weights: None, name: str, value: object
) -> None:
    source = small_model()
    edit_json(source / "config.json", **{name: value})
    refuse(source, tmp_path / "ck", f"{name} = .* must be an id of the model, from 0 to 76")


def test_special_ids_of_a_checkpoint_are_its_own(small_model: Callable[..., Path], tmp_path: Path) -> None:
    run_import(ImportOptions(hf_path=str(small_model()), save=tmp_path / "ck"))
    edit_json(tmp_path / "ck" / "release" / "vocabulary.json", bos_id=10**9)
    with pytest.raises(CheckpointError, match="bos_id = 1000000000 must be an id, from 0 to 76"):
        read_facts(tmp_path / "ck" / "release")


@pytest.mark.parametrize("value", ["false", 1, []])
def test_tied_or_not_is_a_boolean(small_model: Callable[..., Path], tmp_path: Path, value: object) -> None:
    source = small_model()
    edit_json(source / "config.json", tie_word_embeddings=value)
    refuse(source, tmp_path / "ck", "tie_word_embeddings = .* must be true or false")


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
def test_json_that_could_not_be_written_again(
    small_model: Callable[..., Path], tmp_path: Path, no_weights: None, file: str
) -> None:
    source = small_model()
    original = (source / file).read_text()
    edit_json(source / file, note="\ud800")
    refuse(source, tmp_path / "ck", rf"{file} holds half a character, \\ud800")
    edit_json(source / file, note="\U0001f642")  # both halves are there
    dry_run(ImportOptions(hf_path=str(source), save=tmp_path / "ck"))
    nested = '{"note": ' + "[" * 500 + "]" * 500 + ", "
    (source / file).write_text(nested + original.lstrip().removeprefix("{"))
    refuse(source, tmp_path / "ck", f"{file} is nested more than 100 deep")


def test_a_bad_generation_config_is_found_first(
    small_model: Callable[..., Path], tmp_path: Path, no_weights: None
) -> None:
    source = small_model()
    (source / "generation_config.json").write_text("[]")
    refuse(source, tmp_path / "ck", "generation_config.json must hold a JSON object")


# ── the tokenizer ──


@pytest.mark.parametrize("units", range(1, 8))
def test_any_number_of_units(plain_model: Path, tmp_path: Path, units: int) -> None:
    options = ImportOptions(hf_path=str(plain_model), save=tmp_path / "ck", extend_vocab=f"units={units}")
    assert run_import(options).vocabulary == Vocabulary(unit_count=units)


def test_a_dry_run_finds_rows_without_ids(
    small_model: Callable[..., Path], tokenizer_dir: Path, tmp_path: Path
) -> None:
    wide = small_model("wide", vocab_size=32_064, hidden_size=4)
    shutil.copytree(tokenizer_dir, wide, dirs_exist_ok=True)
    refuse(wide, tmp_path / "ck", "32000 ids and the model 32064 rows", extend_vocab="usdm")


def test_a_tokenizer_that_does_not_load_is_found_first(
    with_tokenizer: Path, tmp_path: Path, no_weights: None
) -> None:
    edit_json(with_tokenizer / "tokenizer.json", decoder={"type": "Nothing"})
    text = refuse(with_tokenizer, tmp_path / "ck", "transformers cannot load the tokenizer")
    assert text.startswith(f"{with_tokenizer}: ")  # no temporary name


def test_the_tokenizer_is_checked_as_the_export_s_will_be(with_tokenizer: Path, tmp_path: Path) -> None:
    edit_json(with_tokenizer / "config.json", model_type=None)
    edit_json(with_tokenizer / "tokenizer_config.json", tokenizer_class=None)
    summary = run_import(ImportOptions(hf_path=str(with_tokenizer), save=tmp_path / "ck"))
    assert summary.has_tokenizer
    run_export(ExportOptions(load=tmp_path / "ck", hf_path=tmp_path / "hf"))
    names = {path.name for path in (tmp_path / "ck" / "release" / "tokenizer").iterdir()}
    assert "tokenizer.json" in names and "config.json" not in names


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"<s>"', '"\\ud800"', "tokenizer.json holds half a character"),
        ('"id": 1,', '"id": 1e999,', "tokenizer.json is malformed"),
    ],
)
def test_odd_values_in_a_tokenizer(
    with_tokenizer: Path, tmp_path: Path, old: str, new: str, message: str
) -> None:
    path = with_tokenizer / "tokenizer.json"
    text = json.dumps(json.loads(path.read_text()))
    assert old in text
    path.write_text(text.replace(old, new, 1))
    refuse(with_tokenizer, tmp_path / "ck", message, extend_vocab="units=3")


def test_an_odd_list_of_added_tokens(with_tokenizer: Path, tmp_path: Path) -> None:
    edit_json(with_tokenizer / "tokenizer_config.json", added_tokens_decoder=5)
    refuse(with_tokenizer, tmp_path / "ck", "added_tokens_decoder = 5 must be", extend_vocab="units=3")


def test_a_huge_tokenizer_is_refused_unread(with_tokenizer: Path, tmp_path: Path) -> None:
    with (with_tokenizer / "tokenizer.json").open("r+b") as file:
        file.truncate((64 << 20) + 1)
    refuse(with_tokenizer, tmp_path / "ck", "tokenizer.json holds 67,108,865 bytes; at most 64 MiB")


def test_a_model_without_tokenizer_is_said(
    small_model: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_guarded(main, ["import", "--hf-path", str(small_model()), "--save", str(tmp_path / "a")]) == 0
    assert "no tokenizer in the source" in capsys.readouterr().out


# ── the record ──


def test_the_versions_of_all_that_took_part_are_recorded(extended: Path) -> None:
    versions = read_facts(extended / "release").provenance["versions"]
    assert {"usdm-megatron", "transformers", "tokenizers", "torch"} <= versions.keys()


def test_flags(tmp_path: Path, small_model: Callable[..., Path]) -> None:
    with pytest.raises(ConversionError, match="--max-shard-size"):
        ExportOptions(load=tmp_path, hf_path=tmp_path, max_shard_size="9" * 400)
    refuse(small_model(), tmp_path / "ck", "--hf-cache-dir goes with a hub id", hf_cache_dir=tmp_path)
