"""What a PEFT directory and a merged model consist of, what is refused, and how much memory it takes."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tests import tiny
from tests.convert_floor.adapter_checkpoints import all_tensors, peft_model, small_base, write_adapter
from tests.convert_floor.conftest import edit_json, write_hf_model
from tests.training import reference
from usdm_megatron.checkpoint.adapter_facts import AdapterFacts, read_adapter_facts
from usdm_megatron.checkpoint.facts import read_facts
from usdm_megatron.checkpoint.integrity import verify_integrity, write_integrity
from usdm_megatron.cli.convert import main
from usdm_megatron.cli.entry import run_guarded
from usdm_megatron.convert.export_hf import run_export
from usdm_megatron.convert.import_hf import run_import
from usdm_megatron.convert.options import ExportOptions, ImportOptions, VerifyOptions
from usdm_megatron.convert.peft_export import dry_run, export_adapter
from usdm_megatron.convert.verify_weights import compare_weights
from usdm_megatron.errors import CheckpointError, ConversionError
from usdm_megatron.file_reading import file_sha256
from usdm_megatron.lora_spec import TARGETS, LoraSpec

SPEC = LoraSpec(r=3, alpha=6.0, dropout=0.05, train_new_embeddings=True)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory, extended: Path) -> Path:
    """A bf16 LoRA checkpoint over `extended`, the model with USDM's vocabulary and tokenizer. Read only."""
    return write_adapter(tmp_path_factory.mktemp("lora"), extended / "release", SPEC, torch.bfloat16)


def test_peft_directory(adapter: Path, exported: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    target = tmp_path / "peft"
    summary = export_adapter(ExportOptions(load=adapter, hf_path=target, adapter_only=True))
    assert (summary.checkpoint, summary.files) == (adapter / "release", ("adapter_model.safetensors",))
    assert (summary.tensors, summary.weight_type) == (2 * 2 * 3 + 2, "bf16")
    names = {path.name for path in target.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "README.md", "integrity.json"} < names
    assert "config.json" not in names and verify_integrity(target) == []
    ids = list(range(32_000, 42_003))
    assert json.loads((target / "adapter_config.json").read_text()) == {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "revision": None,
        "inference_mode": True,
        "r": 3,
        "lora_alpha": 6,
        "lora_dropout": 0.05,
        "target_modules": ["q_proj", "v_proj"],
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": None,
        "trainable_token_indices": {"embed_tokens": ids, "lm_head": ids},
    }
    tokenizer = AutoTokenizer.from_pretrained(target)
    assert tokenizer.convert_tokens_to_ids("<|unit9999|>") == 42_001
    loaded = peft_model(exported, target)
    assert loaded.peft_config["default"].lora_alpha == 6
    card = (target / "README.md").read_text()
    assert yaml.safe_load(card.split("---")[1])["library_name"] == "peft"
    for said in (
        "| r | 3 |",
        "| rows of new ids | trained |",
        file_sha256(adapter / "release/integrity.json"),
    ):
        assert (said in card) is (said[0] == "|")
    assert (
        file_sha256(Path(read_adapter_facts(adapter / "release").base_directory) / "integrity.json") in card
    )
    assert str(adapter.parent) not in card


def test_merged_directory(adapter: Path, exported: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    target = tmp_path / "merged"
    summary = run_export(ExportOptions(load=adapter, hf_path=target, merge_lora=True, max_shard_size="1MB"))
    assert summary.weight_type == "bf16" and len(summary.files) > 1 and verify_integrity(target) == []
    expected = json.loads((exported / "config.json").read_text())
    assert json.loads((target / "config.json").read_text()) == expected
    for name in ("tokenizer.json", "generation_config.json"):
        assert (target / name).read_bytes() == (exported / name).read_bytes()
    assert "## Adapter, merged" in (target / "README.md").read_text()
    assert "## Adapter" not in (exported / "README.md").read_text()
    before, after = all_tensors(exported), all_tensors(target)
    changed = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    assert changed == {
        "model.embed_tokens.weight",
        "lm_head.weight",
        *(f"model.layers.{i}.self_attn.{name}.weight" for i in range(3) for name in ("q_proj", "v_proj")),
    }
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        rows = (after[name] != before[name]).any(dim=1).nonzero().flatten()
        assert rows.tolist() == list(range(32_000, 42_003))
    assert AutoModelForCausalLM.from_pretrained(target).get_input_embeddings().weight.shape == (42_003, 8)


# ── which base adapter_config.json says ──


def test_base_model(tmp_path: Path) -> None:
    base = small_base(tmp_path)
    plain = LoraSpec(r=2)
    write_adapter(tmp_path / "ck", base, plain)

    def said(**options: Any) -> str | None:
        target = tmp_path / "peft"
        shutil.rmtree(target, ignore_errors=True)
        export_adapter(ExportOptions(load=tmp_path / "ck", hf_path=target, adapter_only=True, **options))
        config = json.loads((target / "adapter_config.json").read_text())
        front = yaml.safe_load((target / "README.md").read_text().split("---")[1])
        name: str | None = config["base_model_name_or_path"]
        assert "trainable_token_indices" not in config
        assert front.get("base_model") == (name if name and not Path(name).exists() else None)
        return name

    def provenance(**content: Any) -> None:
        edit_json(tmp_path / "ck/release/provenance.json", **content)
        (tmp_path / "ck/release/integrity.json").unlink()
        write_integrity(tmp_path / "ck/release")

    assert said() is None
    provenance(source="a local name")
    assert said() is None
    provenance(source="org/model", options={"extend_vocab": None})
    assert said() == "org/model"
    provenance(source="org/model", options={"extend_vocab": "usdm"})
    assert said() is None
    assert said(base_model="org/extended") == "org/extended"
    assert said(base_model=str(tmp_path / "hf")) == str(tmp_path / "hf")
    other = write_hf_model(tmp_path / "other", hidden_size=20)
    with pytest.raises(ConversionError, match="other is another model than the adapter's: hidden"):
        said(base_model=str(other))
    rounded = tmp_path / "rounded"
    reference.load_model(tmp_path / "hf").bfloat16().save_pretrained(rounded)
    assert said(base_model=str(rounded)) == str(rounded)
    alike = tiny.write_hf_model(tmp_path / "alike", seed=1, num_hidden_layers=2)
    with pytest.raises(ConversionError, match="alike is another model than the adapter's base .* differs"):
        said(base_model=str(alike))
    shutil.move(tmp_path / "base", tmp_path / "moved")  # then nobody can tell, and the word is taken for it
    assert said(base_model=str(alike)) == str(alike)


def test_auto_peft_model_finds_the_base(tmp_path: Path) -> None:
    from peft import AutoPeftModelForCausalLM

    base = small_base(tmp_path)
    write_adapter(tmp_path / "ck", base, LoraSpec(r=2, targets=frozenset(TARGETS)))
    export_adapter(
        ExportOptions(
            load=tmp_path / "ck",
            hf_path=tmp_path / "peft",
            adapter_only=True,
            base_model=str(tmp_path / "hf"),
        )
    )
    ids = torch.tensor([[1, 5, 350, 2]])
    with torch.no_grad():
        found = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "peft", attn_implementation="eager")
        assert torch.equal(
            found.eval()(ids).logits, peft_model(tmp_path / "hf", tmp_path / "peft")(ids).logits
        )


# ── refused ──


def test_flags_that_do_not_go_together(tmp_path: Path) -> None:
    def refused(**options: Any) -> str:
        with pytest.raises(ConversionError) as caught:
            ExportOptions(load=tmp_path, hf_path=tmp_path / "out", **options)
        return str(caught.value)

    assert "--adapter-only and --merge-lora exclude each other" in refused(adapter_only=True, merge_lora=True)
    assert "--pretrained-checkpoint goes with --merge-lora" in refused(pretrained_checkpoint=tmp_path)
    assert "--base-model goes with --adapter-only" in refused(merge_lora=True, base_model="a/b")


def test_flags_that_do_not_go_with_the_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = small_base(tmp_path)
    write_adapter(tmp_path / "ck", base, SPEC)
    target = tmp_path / "out"

    def export(load: Path, *flags: str) -> str:
        assert run_guarded(main, ["export", "--load", str(load), "--hf-path", str(target), *flags]) == 2
        assert not target.exists()
        return capsys.readouterr().err

    assert all(flag in export(tmp_path / "ck") for flag in ("--adapter-only", "--merge-lora"))
    assert "whole model and no adapter; drop --adapter-only" in export(base, "--adapter-only")
    assert "whole model and no adapter; drop --merge-lora" in export(base, "--merge-lora")
    assert "--adapter-only and --merge-lora exclude" in export(base, "--merge-lora", "--adapter-only")
    with pytest.raises(CheckpointError, match="holds a LoRA adapter without its base"):
        compare_weights(VerifyOptions(hf_path=str(tmp_path / "hf"), load=tmp_path / "ck", mode="weights"))


def test_what_a_target_may_be(tmp_path: Path) -> None:
    base = small_base(tmp_path)
    write_adapter(tmp_path / "ck", base, SPEC)
    adapter = ExportOptions(load=tmp_path / "ck", hf_path=tmp_path / "peft", adapter_only=True)
    model = ExportOptions(load=tmp_path / "ck", hf_path=tmp_path / "model", merge_lora=True)
    export_adapter(adapter)
    run_export(model)
    with pytest.raises(ConversionError, match="peft exists; pass --overwrite"):
        export_adapter(adapter)
    export_adapter(replace(adapter, overwrite=True))
    with pytest.raises(ConversionError, match=r"model is no PEFT adapter \(no adapter_config.json\)"):
        export_adapter(replace(adapter, hf_path=tmp_path / "model", overwrite=True))
    with pytest.raises(ConversionError, match=r"peft is no Hugging Face model \(no config.json\)"):
        run_export(replace(model, hf_path=tmp_path / "peft", overwrite=True))


def test_a_checkpoint_that_is_not_what_it_says(tmp_path: Path) -> None:
    base = small_base(tmp_path)
    write_adapter(tmp_path / "ck", base, replace(SPEC, targets=frozenset({"q_proj", "o_proj"})))
    directory = tmp_path / "ck/release"
    AdapterFacts.over(base, replace(SPEC, r=4, targets=frozenset({"q_proj", "k_proj"}))).write(directory)
    (directory / "integrity.json").unlink()
    write_integrity(directory)
    with pytest.raises(CheckpointError) as refused:
        export_adapter(ExportOptions(load=directory, hf_path=tmp_path / "out", adapter_only=True))
    for problem in (
        "does not hold decoder.layers.self_attention.linear_qkv.adapters.k_proj.lora_a",
        "holds decoder.layers.self_attention.linear_proj.adapters.o_proj.lora_b, which adapter.json does not",
        "adapters.q_proj.lora_a has shape [2, 3, 32], expected [2, 4, 32]",
    ):
        assert problem in str(refused.value)


@pytest.mark.parametrize("merge", [False, True])
def test_values_that_are_not_finite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, merge: bool) -> None:
    from tests.convert_floor import adapter_checkpoints

    def damaged(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        tensor = torch.ones(shape, dtype=dtype)
        if "layers.1" in name and "v_proj.lora_B" in name:
            tensor[0, 0] = float("nan")
        return tensor

    monkeypatch.setattr(adapter_checkpoints, "random_tensor", damaged)
    write_adapter(tmp_path / "ck", small_base(tmp_path), SPEC)
    options = ExportOptions(
        load=tmp_path / "ck", hf_path=tmp_path / "out", merge_lora=merge, adapter_only=not merge
    )
    name = "layers.1.self_attn.v_proj" + (".weight" if merge else ".lora_B.weight")
    with pytest.raises(ConversionError, match=rf"{name} has \d+ values that are NaN"):
        (run_export if merge else export_adapter)(options)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "ck", "hf"]


def test_dry_run(adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = dry_run(ExportOptions(load=adapter, hf_path=tmp_path / "out", adapter_only=True))
    assert "14 tensors of a LoRA adapter" in text and "nothing was written" in text
    assert (
        "adapters.q_proj.lora_a → base_model.model.model.layers.2.self_attn.q_proj.lora_A.weight [3, 8]"
        in text
    )
    arguments = ["export", "--load", str(adapter), "--hf-path", str(tmp_path / "out"), "--dry-run"]
    assert run_guarded(main, [*arguments, "--merge-lora"]) == 0
    assert "MistralForCausalLM, 3 layers" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


# ── memory ──

_PEAK = """
import sys, threading, time
from pathlib import Path
from usdm_megatron.convert.export_hf import run_export
from usdm_megatron.convert.options import ExportOptions
import torch.distributed.checkpoint, transformers

def anonymous_mb():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024

before, peak, done = anonymous_mb(), 0, False
def watch():
    global peak
    while not done:
        peak = max(peak, anonymous_mb())
        time.sleep(0.002)
thread = threading.Thread(target=watch)
thread.start()
run_export(ExportOptions(load=Path(sys.argv[1]), hf_path=Path(sys.argv[2]), merge_lora=True))
done = True
thread.join()
print(peak - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    """Five times the layers, no more memory: a merge holds a tensor or two a worker."""
    peaks = []
    for layers in (4, 20):
        work = tmp_path / str(layers)
        hf = write_hf_model(
            work / "hf", hidden_size=256, intermediate_size=1024, num_hidden_layers=layers, vocab_size=2000
        )
        run_import(ImportOptions(hf_path=str(hf), save=work / "base"))
        write_adapter(work / "ck", work / "base/release", LoraSpec(targets=frozenset(TARGETS)))
        arguments = [sys.executable, "-c", _PEAK, str(work / "ck"), str(work / "out")]
        done = subprocess.run(arguments, capture_output=True, text=True, timeout=120, check=True)
        peaks.append(float(done.stdout.split()[-1]))
        shutil.rmtree(work)
    assert peaks[1] < peaks[0] + 16  # MB; the sixteen layers more are 60


def test_facts_of_the_adapter_are_the_bases(adapter: Path, extended: Path) -> None:
    ours, theirs = read_facts(adapter / "release"), read_facts(extended / "release")
    assert (ours.vocabulary, ours.hf_config) == (theirs.vocabulary, theirs.hf_config)
    assert ours.tokenizer_sha256 == theirs.tokenizer_sha256
