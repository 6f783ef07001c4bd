"""Everything that cannot be converted is refused by name, all at once, and leaves nothing behind."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from tests.convert_floor.conftest import edit_json
from usdm_megatron.checkpoint.facts import read_facts
from usdm_megatron.convert import import_hf
from usdm_megatron.convert.export_hf import run_export
from usdm_megatron.convert.hf_source import open_source
from usdm_megatron.convert.import_hf import run_import
from usdm_megatron.convert.options import ExportOptions, ImportOptions, VerifyOptions
from usdm_megatron.errors import CheckpointError, ConversionError


def refuse(source: Path | str, save: Path, match: str, **options: Any) -> ConversionError:
    """Import must fail with `match`, and nothing may be left at the destination."""
    with pytest.raises(ConversionError, match=match) as refused:
        run_import(ImportOptions(hf_path=str(source), save=save, **options))
    assert not save.exists() or list(save.iterdir()) == []
    return refused.value


def rewrite(source: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(source / "model.safetensors")
    change(tensors)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})


# ── sources ──


def test_missing_paths_and_files(small_model: Callable[..., Path], tmp_path: Path) -> None:
    refuse(tmp_path / "nowhere", tmp_path / "ck", "nowhere does not exist")
    (tmp_path / "file").write_text("")
    refuse(tmp_path / "file", tmp_path / "ck", "file is not a directory")
    (tmp_path / "empty").mkdir()
    refuse(tmp_path / "empty", tmp_path / "ck", "config.json is missing")
    source = small_model()
    (source / "model.safetensors").unlink()
    refuse(source, tmp_path / "ck", "holds neither model.safetensors nor")
    (source / "config.json").write_text("{")
    refuse(source, tmp_path / "ck", "config.json cannot be read")


def test_pickles_are_refused_with_the_remedy(small_model: Callable[..., Path], tmp_path: Path) -> None:
    source = small_model()
    (source / "model.safetensors").rename(source / "pytorch_model.bin")
    refuse(source, tmp_path / "ck", "pytorch_model.bin and no safetensors.*save_pretrained")


def test_other_architectures_are_refused_with_the_list(
    small_model: Callable[..., Path], tmp_path: Path
) -> None:
    source = small_model()
    edit_json(source / "config.json", architectures=["Qwen2ForCausalLM"])
    refuse(
        source,
        tmp_path / "ck",
        "Qwen2ForCausalLM.*supported are MistralForCausalLM, CustomMistralForCausalLM, LlamaForCausalLM",
    )


def test_all_wrong_tensors_are_named_at_once(small_model: Callable[..., Path], tmp_path: Path) -> None:
    source = small_model()

    def change(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["model.norm.weight"]
        del tensors["model.layers.2.mlp.up_proj.weight"]
        tensors["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(60)
        tensors["model.layers.3.mlp.up_proj.weight"] = torch.zeros(44, 28)
        tensors["lm_head.weight"] = torch.zeros(78, 28)

    rewrite(source, change)
    error = refuse(source, tmp_path / "ck", "tensor model.norm.weight is missing")
    text = str(error)
    assert len(error.problems) == 5
    assert "model.layers.2.mlp.up_proj.weight is missing" in text
    assert (
        "q_proj.bias does not belong" in text and "model.layers.3.mlp.up_proj.weight does not belong" in text
    )
    assert "lm_head.weight has shape [78, 28], expected [77, 28]" in text


def test_buffers_and_equal_tied_copies_do_no_harm(small_model: Callable[..., Path], tmp_path: Path) -> None:
    source = small_model(tie_word_embeddings=True)

    def add(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        tensors["model.layers.1.self_attn.rotary_emb.inv_freq"] = torch.zeros(5)

    rewrite(source, add)
    run_import(ImportOptions(hf_path=str(source), save=tmp_path / "tied"))
    rewrite(source, lambda tensors: tensors["lm_head.weight"].add_(1))
    refuse(source, tmp_path / "ck", "lm_head.weight does not belong")


def test_mixed_types_need_a_decision(small_model: Callable[..., Path], tmp_path: Path) -> None:
    source = small_model()
    rewrite(
        source, lambda tensors: tensors.update({"model.norm.weight": torch.ones(28, dtype=torch.bfloat16)})
    )
    refuse(source, tmp_path / "ck", r"different types \(BF16, F32\); say --dtype")
    run_import(ImportOptions(hf_path=str(source), save=tmp_path / "ck", dtype="fp32"))
    other = small_model("double")
    rewrite(other, lambda tensors: tensors.update({k: v.double() for k, v in tensors.items()}))
    refuse(other, tmp_path / "ck2", "type F64; supported are BF16, F16, F32")


@pytest.mark.parametrize(
    "name", ["../other.safetensors", "/etc/passwd", "sub/a.safetensors", "..", "a\\b.safetensors"]
)
def test_an_index_cannot_point_outside(small_model: Callable[..., Path], tmp_path: Path, name: str) -> None:
    source = small_model()
    shutil.copy(source / "model.safetensors", tmp_path / "other.safetensors")
    (source / "model.safetensors").unlink()
    index = {"weight_map": {"model.norm.weight": name}}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    refuse(source, tmp_path / "ck", "only files in the same directory are read")


def test_an_index_that_does_not_say_what_is_there(small_model: Callable[..., Path], tmp_path: Path) -> None:
    source = small_model()
    (source / "model.safetensors").rename(source / "a.safetensors")
    index = source / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"x": "b.safetensors", "y": "c.bin"}}))
    error = refuse(source, tmp_path / "ck", "b.safetensors is missing")
    assert "'c.bin'; only safetensors" in str(error)
    index.write_text(json.dumps({"weight_map": {"model.more.weight": "a.safetensors"}}))
    refuse(source, tmp_path / "ck", "a.safetensors does not hold tensor model.more.weight")
    for content in ('{"weight_map": []}', "{}", "[]", "{", '{"weight_map": {}}'):
        index.write_text(content)
        refuse(source, tmp_path / "ck", "index.json")


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_damaged_header_gives_a_typed_error_or_the_right_tensors(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    directory = tmp_path_factory.mktemp("fuzz")
    (directory / "config.json").write_text("{}")
    path = directory / "model.safetensors"
    save_file({"a": torch.zeros(3, 2), "b": torch.zeros(4)}, path)
    content = bytearray(path.read_bytes())
    if data.draw(st.booleans()):
        content = content[: data.draw(st.integers(0, len(content) - 1))]
    else:
        content[data.draw(st.integers(0, len(content) - 41))] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content)
    try:
        tensors = open_source(directory).tensors
    except ConversionError as error:
        assert "model.safetensors" in str(error)
    else:
        assert all(isinstance(tensor.shape, tuple) for tensor in tensors.values())


def test_special_ids_must_be_ids(small_model: Callable[..., Path], tmp_path: Path) -> None:
    source = small_model()
    edit_json(source / "config.json", eos_token_id=[2, 5])
    run_import(ImportOptions(hf_path=str(source), save=tmp_path / "several"))
    assert read_facts(tmp_path / "several" / "release").vocabulary.eos_id == 2
    edit_json(source / "config.json", eos_token_id="</s>")
    refuse(source, tmp_path / "ck", "eos_token_id = '</s>' must be an id")


# ── vocabulary ──


def test_weights_that_are_partially_extended(plain_model: Path, exported: Path, tmp_path: Path) -> None:
    source = tmp_path / "partial"
    shutil.copytree(plain_model, source)
    for path in exported.glob("*token*"):
        shutil.copyfile(path, source / path.name)
    refuse(source, tmp_path / "ck", "partially extended: the tokenizer has 42003 ids, the model 32000")
    refuse(source, tmp_path / "ck", "partially extended", extend_vocab="usdm")


def test_extending_needs_a_tokenizer_that_ends_with_the_rows(
    small_model: Callable[..., Path], tokenizer_dir: Path, tmp_path: Path
) -> None:
    source = small_model()
    refuse(source, tmp_path / "ck", "holds no tokenizer to extend", extend_vocab="usdm")
    shutil.copytree(tokenizer_dir, source, dirs_exist_ok=True)
    refuse(source, tmp_path / "ck", "the tokenizer has 32000 ids, the model only 77", extend_vocab="usdm")
    wide = small_model("wide", vocab_size=32_064, hidden_size=4)
    shutil.copytree(tokenizer_dir, wide, dirs_exist_ok=True)
    refuse(wide, tmp_path / "ck", "32000 ids and the model 32064 rows", extend_vocab="usdm")


# ── destinations ──


def test_an_existing_model_is_replaced_only_when_asked(
    small_model: Callable[..., Path], tmp_path: Path
) -> None:
    options = ImportOptions(hf_path=str(small_model()), save=tmp_path / "ck")
    run_import(options)
    before = (tmp_path / "ck" / "release" / "integrity.json").read_bytes()
    with pytest.raises(ConversionError, match="pass --overwrite"):
        run_import(options)
    other = small_model("other", seed=2)
    run_import(ImportOptions(hf_path=str(other), save=tmp_path / "ck", overwrite=True))
    assert (tmp_path / "ck" / "release" / "integrity.json").read_bytes() != before
    assert {path.name for path in (tmp_path / "ck").iterdir()} == {
        "release",
        "latest_checkpointed_iteration.txt",
    }
    (tmp_path / "run" / "iter_0000020").mkdir(parents=True)
    with pytest.raises(ConversionError, match="is a run with checkpoints of its own"):
        run_import(ImportOptions(hf_path=str(other), save=tmp_path / "run", overwrite=True))


def test_an_interrupted_import_leaves_nothing_and_the_next_one_cleans_up(
    small_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ImportOptions(hf_path=str(small_model()), save=tmp_path / "ck")
    stale = tmp_path / "ck" / ("release.tmp-" + "a" * 32)
    stale.mkdir(parents=True)  # what a kill leaves
    with monkeypatch.context() as patch:
        patch.setattr(import_hf, "write_facts", lambda *_, **__: (_ for _ in ()).throw(OSError("disk full")))
        with pytest.raises(CheckpointError, match="disk full"):
            run_import(options)
    assert list((tmp_path / "ck").iterdir()) == []
    run_import(options)
    assert (tmp_path / "ck" / "release" / "integrity.json").is_file()


def test_export_destinations(small_model: Callable[..., Path], tmp_path: Path) -> None:
    run_import(ImportOptions(hf_path=str(small_model()), save=tmp_path / "ck"))
    options = {"load": tmp_path / "ck", "hf_path": tmp_path / "hf"}
    run_export(ExportOptions(**options))
    with pytest.raises(ConversionError, match="hf exists; pass --overwrite"):
        run_export(ExportOptions(**options))
    (tmp_path / "hf" / "old.txt").write_text("")
    run_export(ExportOptions(**options, overwrite=True))
    assert not (tmp_path / "hf" / "old.txt").exists()
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.txt").write_text("")
    with pytest.raises(ConversionError, match="is no Hugging Face model"):
        run_export(ExportOptions(load=tmp_path / "ck", hf_path=tmp_path / "home", overwrite=True))
    assert (tmp_path / "home" / "thesis.txt").exists()


# ── checkpoints ──


def test_facts_that_contradict_each_other(small_model: Callable[..., Path], tmp_path: Path) -> None:
    run_import(ImportOptions(hf_path=str(small_model()), save=tmp_path / "ck"))
    directory = tmp_path / "ck" / "release"
    edit_json(directory / "vocabulary.json", text_size=78)
    with pytest.raises(
        CheckpointError, match="vocabulary.json has 78 ids, but hf_config.json says vocab_size = 77"
    ):
        read_facts(directory)
    (directory / "vocabulary.json").write_text('{"text_size": 77}')
    with pytest.raises(CheckpointError, match="vocabulary.json is malformed"):
        read_facts(directory)
    (directory / "provenance.json").unlink()
    (directory / "vocabulary.json").unlink()
    with pytest.raises(CheckpointError, match="vocabulary.json is missing"):
        read_facts(directory)


# ── the hub ──


def test_a_hub_that_does_not_answer_is_one_line_with_a_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    def offline(*_: object, **__: object) -> str:
        raise ConnectionError("no route to host\nand much more")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    error = refuse("mistralai/Mistral-7B-v0.1", tmp_path / "ck", "the hub did not give it")
    assert "\n" not in str(error) and "hf download" in str(error) and "no route to host" in str(error)


def test_a_hub_id_is_downloaded_with_revision_and_cache(
    small_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    snapshot = small_model("0123abcd")
    asked: dict[str, Any] = {}

    def download(repo: str, **options: Any) -> str:
        asked.update(options, repo=repo)
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    run_import(
        ImportOptions(
            hf_path="a/b", save=tmp_path / "ck", hf_revision="main", hf_cache_dir=tmp_path / "cache"
        )
    )
    assert (asked["repo"], asked["revision"], asked["cache_dir"]) == ("a/b", "main", tmp_path / "cache")
    assert "*.bin" not in asked["allow_patterns"]
    provenance = read_facts(tmp_path / "ck" / "release").provenance
    assert (provenance["source"], provenance["revision"]) == ("a/b", "0123abcd")
    refuse(snapshot, tmp_path / "ck2", "--hf-revision goes with a hub id", hf_revision="main")


# ── options ──


@pytest.mark.parametrize("size", ["", "5 apples", "0", "-1GB", "0.0001B"])
def test_shard_sizes(size: str) -> None:
    with pytest.raises(ConversionError, match="--max-shard-size"):
        ExportOptions(load=Path("a"), hf_path=Path("b"), max_shard_size=size)


def test_shard_sizes_are_decimal_unless_said_otherwise() -> None:
    sizes = {"5GB": 5 * 10**9, "300 mb": 3 * 10**8, "1GiB": 2**30, "17": 17, "1.5KB": 1500}
    for text, expected in sizes.items():
        assert (
            ExportOptions(load=Path("a"), hf_path=Path("b"), max_shard_size=text).max_shard_bytes == expected
        )


def test_numbers_are_checked_at_birth() -> None:
    with pytest.raises(ConversionError, match="--seed -1"):
        ImportOptions(hf_path="a", save=Path("b"), seed=-1)
    with pytest.raises(ConversionError) as refused:
        VerifyOptions(
            hf_path="a",
            load=Path("b"),
            tensor_model_parallel_size=0,
            tolerance=float("nan"),
            sequence_length=0,
        )
    assert len(refused.value.problems) == 3
