"""The base of an adapter: how a checkpoint records it, and how it is found again."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from tests.convert_floor.adapter_checkpoints import small_base, write_adapter
from tests.convert_floor.conftest import edit_json
from tests.tiny import write_hf_model
from usdm_megatron.checkpoint.adapter_facts import (
    AdapterFacts,
    BaseIdentity,
    read_adapter_facts,
    resolve_base,
)
from usdm_megatron.convert.export_hf import run_export
from usdm_megatron.convert.import_hf import run_import
from usdm_megatron.convert.options import ExportOptions, ImportOptions
from usdm_megatron.convert.peft_export import export_adapter
from usdm_megatron.convert.peft_import import import_adapter
from usdm_megatron.errors import CheckpointError, ConversionError
from usdm_megatron.file_reading import file_sha256
from usdm_megatron.lora_spec import LoraSpec

SPEC = LoraSpec(r=3, alpha=6.0, dropout=0.05, train_new_embeddings=True)


def test_facts_come_back(tmp_path: Path) -> None:
    facts = AdapterFacts(SPEC, "/some/where", BaseIdentity("ab" * 32, "cd" * 32))
    facts.write(tmp_path)
    assert read_adapter_facts(tmp_path) == facts
    record = json.loads((tmp_path / "adapter.json").read_text())
    assert record == {
        "base": {"directory": "/some/where", "sha256": "ab" * 32, "source_sha256": "cd" * 32},
        "lora": {
            "r": 3,
            "alpha": 6.0,
            "dropout": 0.05,
            "targets": ["q_proj", "v_proj"],
            "train_new_embeddings": True,
        },
    }
    del record["base"]["source_sha256"]  # as earlier versions wrote it
    (tmp_path / "adapter.json").write_text(json.dumps(record))
    assert read_adapter_facts(tmp_path) == replace(facts, base=BaseIdentity("ab" * 32))
    (tmp_path / "adapter.json").unlink()
    assert read_adapter_facts(tmp_path) is None


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"base": 1, "lora": {}}', '{"base": {"directory": "a", "sha256": 3}, "lora": {}}',
     '{"base": {"directory": "a", "sha256": "b"}, "lora": {"targets": ["q"]}}',
     '{"base": {"directory": "a", "sha256": "b"}, "lora": {"targets": ["q_proj"], "rslora": true}}'],
)  # fmt: skip
def test_malformed_facts(tmp_path: Path, text: str) -> None:
    (tmp_path / "adapter.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"adapter.json is malformed"):
        read_adapter_facts(tmp_path)


def test_the_base_is_found_where_it_lay_or_where_it_is_said_to_be(tmp_path: Path) -> None:
    base = small_base(tmp_path)
    facts = AdapterFacts.over(base, SPEC)
    assert resolve_base(facts) == base
    # a run has many steps: the one with the hash is meant, wherever the tracker points
    run = tmp_path / "run"
    shutil.copytree(base, run / "iter_0000010")
    shutil.copytree(base, run / "iter_0000020")
    edit_json(run / "iter_0000020/integrity.json", algorithm="sha512")
    (run / "latest_checkpointed_iteration.txt").write_text("20")
    for override, found in ((run, "iter_0000010"), (run / "iter_0000010", "."), (base.parent, "release")):
        assert resolve_base(facts, override) == override / found
    with pytest.raises(CheckpointError) as refused:
        resolve_base(facts, run / "iter_0000020")
    hashes = [file_sha256(path / "integrity.json")[:12] for path in (run / "iter_0000020", base)]
    for part in ("iter_0000020 is another model", *hashes, f"trained over {base}"):
        assert part in str(refused.value)
    with pytest.raises(CheckpointError, match=r"nowhere holds no checkpoint; the adapter was trained over"):
        resolve_base(facts, tmp_path / "nowhere")

    base.rename(tmp_path / "moved")
    with pytest.raises(CheckpointError, match=r"base/release is not there .* --pretrained-checkpoint"):
        resolve_base(facts)
    assert resolve_base(facts, tmp_path / "moved") == tmp_path / "moved"
    shutil.copytree(run / "iter_0000020", base)
    with pytest.raises(CheckpointError, match=r"base/release is another model .* --pretrained-checkpoint"):
        resolve_base(facts)
    damaged = bytearray((tmp_path / "moved/__0_0.distcp").read_bytes())
    damaged[-100] ^= 1
    (tmp_path / "moved/__0_0.distcp").write_bytes(damaged)
    with pytest.raises(CheckpointError, match=r"__0_0.distcp differs from what was written"):
        resolve_base(facts, tmp_path / "moved")


def test_merging_with_a_base_that_moved(tmp_path: Path) -> None:
    base = small_base(tmp_path)
    write_adapter(tmp_path / "ck", base, SPEC)
    options = ExportOptions(load=tmp_path / "ck", hf_path=tmp_path / "here", merge_lora=True)
    run_export(options)
    base.parent.rename(tmp_path / "moved")
    with pytest.raises(CheckpointError, match="--pretrained-checkpoint"):
        run_export(replace(options, hf_path=tmp_path / "there"))
    export_adapter(ExportOptions(load=tmp_path / "ck", hf_path=tmp_path / "peft", adapter_only=True))
    run_export(replace(options, hf_path=tmp_path / "there", pretrained_checkpoint=tmp_path / "moved"))
    ours, theirs = (tmp_path / name / "model.safetensors" for name in ("here", "there"))
    assert ours.read_bytes() == theirs.read_bytes()


def test_an_adapter_is_no_base(tmp_path: Path) -> None:
    write_adapter(tmp_path / "ck", small_base(tmp_path), SPEC)
    with pytest.raises(CheckpointError, match=r"release is an adapter, .*--merge-lora, import"):
        AdapterFacts.over(tmp_path / "ck/release", SPEC)


def test_another_conversion_of_the_same_model_is_the_same_base(tmp_path: Path) -> None:
    """Other files, the same weights: for merging, and for an adapter that comes back from PEFT's form."""
    bases = {}
    for name, seed, workers in (("ours", 0, 1), ("again", 0, 3), ("other", 1, 1)):
        hf = write_hf_model(tmp_path / f"hf{seed}", num_hidden_layers=2, seed=seed)
        run_import(ImportOptions(hf_path=str(hf), save=tmp_path / name, workers=workers))
        bases[name] = tmp_path / name / "release"
    hashes = {file_sha256(base / "integrity.json") for base in bases.values()}
    assert len(hashes) == 3, "the conversions are the same files: the comparison would be empty"
    spec = replace(SPEC, train_new_embeddings=False)
    facts = AdapterFacts.over(bases["ours"], spec)
    assert resolve_base(facts, bases["again"]) == bases["again"]
    with pytest.raises(CheckpointError, match="other is another model than the adapter's base"):
        resolve_base(facts, tmp_path / "other")

    write_adapter(tmp_path / "ck", bases["ours"], spec)
    peft = tmp_path / "peft"
    export_adapter(ExportOptions(load=tmp_path / "ck", hf_path=peft, adapter_only=True))
    import_adapter(ImportOptions(adapter=peft, load=bases["again"], save=tmp_path / "in"))
    # the shapes are the same: only what the export says of its base tells them apart
    with pytest.raises(ConversionError, match="other/release is another model than the adapter's base"):
        import_adapter(ImportOptions(adapter=peft, load=bases["other"], save=tmp_path / "refused"))
    assert not (tmp_path / "refused").exists()
    merge = ExportOptions(load=tmp_path / "ck", hf_path=tmp_path / "m", merge_lora=True)
    run_export(replace(merge, pretrained_checkpoint=bases["again"]))


def test_a_step_of_a_run_is_not_what_the_run_began_with(tmp_path: Path) -> None:
    """It hands the provenance on, so it is known by its own files alone."""
    hf = write_hf_model(tmp_path / "hf", num_hidden_layers=2)
    run_import(ImportOptions(hf_path=str(hf), save=tmp_path / "base"))
    step = tmp_path / "run/iter_0000010"
    shutil.copytree(tmp_path / "base/release", step)
    (step / "run_config.yaml").write_text("task: sft\n")
    edit_json(step / "integrity.json", algorithm="sha512")
    assert BaseIdentity.of(step).source_sha256 is None
    with pytest.raises(CheckpointError, match="is another model"):
        resolve_base(AdapterFacts.over(tmp_path / "base/release", SPEC), step)
