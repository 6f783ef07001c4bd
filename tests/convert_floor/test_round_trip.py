"""HF → ours → HF, bit for bit, and transformers loads the result."""

from __future__ import annotations

import filecmp
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from tests.checkpoint_floor.stock_model import build_stock_model, open_groups
from tests.convert_floor.conftest import edit_json, write_hf_model
from tests.ranks import run_ranks
from usdm_megatron.architecture import HFArchitecture
from usdm_megatron.checkpoint.common_file import read_common
from usdm_megatron.checkpoint.facts import read_facts
from usdm_megatron.checkpoint.integrity import files_below
from usdm_megatron.checkpoint.resolve import resolve_checkpoint
from usdm_megatron.checkpoint.store import load_full_tensors, load_sharded, single_process_group
from usdm_megatron.convert.export_hf import exported_config, run_export
from usdm_megatron.convert.import_hf import run_import
from usdm_megatron.convert.name_table import architecture_table
from usdm_megatron.convert.options import ExportOptions, ImportOptions, VerifyOptions
from usdm_megatron.convert.safetensors_writer import plan_shards
from usdm_megatron.convert.verify_weights import compare_weights
from usdm_megatron.errors import ConversionError
from usdm_megatron.runtime.ranks import RankEnvironment
from usdm_megatron.vocab import USDM_VOCABULARY, Vocabulary


def all_tensors(directory: Path) -> dict[str, torch.Tensor]:
    return {name: t for path in directory.glob("*.safetensors") for name, t in load_file(path).items()}


def assert_equal_tensors(ours: Path, theirs: Path) -> None:
    a, b = all_tensors(ours), all_tensors(theirs)
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype
        assert torch.equal(a[name].view(torch.uint8), b[name].view(torch.uint8)), name


def there_and_back(source: Path, work: Path, **options: Any) -> Path:
    run_import(ImportOptions(hf_path=str(source), save=work / "checkpoint"))
    run_export(ExportOptions(load=work / "checkpoint", hf_path=work / "hf", **options))
    return work / "hf"


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    groups=st.integers(1, 3),
    heads_per_group=st.integers(1, 3),
    head_dim=st.sampled_from([2, 6, 10]),
    hidden=st.integers(3, 20),
    ffn=st.integers(1, 20),
    layers=st.integers(1, 3),
    vocab=st.integers(3, 600),
    tied=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    max_shard_size=st.sampled_from(["5GB", "2KB", "1B"]),
)
def test_every_tensor_of_any_config_comes_back_bit_for_bit(
    tmp_path_factory: pytest.TempPathFactory,
    groups: int,
    heads_per_group: int,
    head_dim: int,
    hidden: int,
    ffn: int,
    layers: int,
    vocab: int,
    tied: bool,
    dtype: torch.dtype,
    max_shard_size: str,
) -> None:
    work = tmp_path_factory.mktemp("trip")
    source = write_hf_model(
        work / "source",
        dtype=dtype,
        num_key_value_heads=groups,
        num_attention_heads=groups * heads_per_group,
        head_dim=head_dim,
        hidden_size=hidden,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        vocab_size=vocab,
        tie_word_embeddings=tied,
        sliding_window=None,
    )
    assert_equal_tensors(there_and_back(source, work, max_shard_size=max_shard_size), source)


def test_transformers_computes_the_same_with_the_result(
    small_model: Callable[..., Path], tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    source = small_model()
    exported = there_and_back(source, tmp_path)
    ours, theirs = (AutoModelForCausalLM.from_pretrained(path).eval() for path in (exported, source))
    ids = torch.randint(0, 77, (2, 60), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        assert torch.equal(ours(ids).logits, theirs(ids).logits)
    assert type(ours).__name__ == "MistralForCausalLM"
    ignored = {"_name_or_path", "dtype", "use_cache"}
    differing = {
        key: (value, theirs.config.to_dict().get(key))
        for key, value in ours.config.to_dict().items()
        if key not in ignored and value != theirs.config.to_dict().get(key)
    }
    assert differing == {} and ours.config.use_cache is True


# ── the extended model ──


def test_the_exported_model_is_what_the_originals_inference_needs(exported: Path, plain_model: Path) -> None:
    from transformers import AutoModelForCausalLM

    config = json.loads((exported / "config.json").read_text())
    assert config["architectures"] == ["MistralForCausalLM"]
    assert (config["vocab_size"], config["use_cache"]) == (42_003, True)
    model = AutoModelForCausalLM.from_pretrained(exported)
    assert model.get_input_embeddings().weight.shape == (42_003, 8)
    assert model.get_output_embeddings().weight.shape == (42_003, 8)
    assert model.generation_config.pad_token_id == 42_002
    ours, theirs = all_tensors(exported), all_tensors(plain_model)
    for name, tensor in theirs.items():
        assert torch.equal(ours[name][: tensor.shape[0]], tensor), name
    assert filecmp.cmp(exported / "tokenizer.model", plain_model / "tokenizer.model", shallow=False)


def test_a_model_that_has_the_tokens_is_taken_as_it_is(exported: Path, tmp_path: Path) -> None:
    published = tmp_path / "published"
    shutil.copytree(exported, published)
    edit_json(published / "config.json", architectures=["CustomMistralForCausalLM"])
    (published / "integrity.json").unlink()  # the edit was meant
    summary = run_import(
        ImportOptions(hf_path=str(published), save=tmp_path / "ck", extend_vocab="usdm", seed=99)
    )
    assert summary.new_rows == 0 and summary.vocabulary == USDM_VOCABULARY
    run_export(ExportOptions(load=tmp_path / "ck", hf_path=tmp_path / "hf"))
    assert_equal_tensors(tmp_path / "hf", exported)
    for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json"):
        assert filecmp.cmp(tmp_path / "hf" / name, exported / name, shallow=False), name
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["architectures"] == [
        "MistralForCausalLM"
    ]


def test_two_imports_are_equal_bytes(extended: Path, plain_model: Path, tmp_path: Path) -> None:
    run_import(ImportOptions(hf_path=str(plain_model), save=tmp_path / "again", extend_vocab="usdm", seed=7))
    names = files_below(extended)
    assert names == files_below(tmp_path / "again") and len(names) > 10
    for name in [*names, "release/integrity.json"]:
        assert filecmp.cmp(extended / name, tmp_path / "again" / name, shallow=False), name


def test_the_checkpoint_carries_what_training_needs(extended: Path, plain_model: Path) -> None:
    resolved = resolve_checkpoint(extended, fallback=False)
    facts = read_facts(resolved.path)
    assert (resolved.path, resolved.step) == (extended / "release", None)
    assert (facts.kind, facts.iteration, facts.vocabulary) == ("converted", None, USDM_VOCABULARY)
    assert facts.architecture == HFArchitecture.from_hf_config(
        {**json.loads((plain_model / "config.json").read_text()), "vocab_size": 42_003}
    )
    assert (
        facts.tokenizer_dir == extended / "release" / "tokenizer" and len(facts.tokenizer_sha256 or "") == 64
    )
    assert facts.provenance["source"] == "tiny-mistral"
    assert "model.safetensors" in facts.provenance["files"]
    assert str(plain_model.parent) not in (extended / "release" / "provenance.json").read_text()
    common = read_common(resolved.path)
    args = common["args"]
    assert (args.padded_vocab_size, args.num_query_groups, args.kv_channels) == (42_496, 2, 10)
    assert (args.norm_epsilon, args.rotary_base, args.bf16) == (3e-4, 1e6, True)
    assert (common["checkpoint_version"], common["iteration"]) == (3.0, 0)


def test_pad_rows_are_zeros_in_the_checkpoint(extended: Path) -> None:
    names = ["embedding.word_embeddings.weight", "output_layer.weight"]
    with single_process_group():
        tensors = load_full_tensors(extended / "release", names)
    for name in names:
        assert tensors[name].shape[0] == 42_496 and not tensors[name][42_003:].any()
        assert tensors[name][:42_003].any(dim=1).all()


# ── against core's own model ──


def stock_logits_on_rank(
    environment: RankEnvironment, store: Any, tp: int, checkpoint: str, ids: list[int]
) -> torch.Tensor:
    """Core's stock specs load the checkpoint strictly and compute; logits `[S, V]`."""
    import torch.distributed as dist

    facts = read_facts(Path(checkpoint))
    with open_groups(environment, store, tp, 1) as groups:
        model = build_stock_model(groups, facts.architecture, seed=123)
        loaded = load_sharded(Path(checkpoint), {"model": model.sharded_state_dict()})
        model.load_state_dict(loaded["model"])
        tokens = torch.tensor([ids])
        causal = torch.ones(1, 1, len(ids), len(ids)).triu(1).bool()  # True: hidden
        with torch.no_grad():
            logits = model(tokens, torch.arange(len(ids))[None], causal)
        parts = [torch.empty_like(logits) for _ in range(tp)]
        dist.all_gather(parts, logits.contiguous(), group=groups.tp)
        return torch.cat(parts, dim=-1)[0, :, : facts.vocabulary.size].clone()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("tp", [1, 2])
def test_cores_stock_model_loads_it_strictly_and_computes_transformers_logits(
    small_model: Callable[..., Path], tmp_path: Path, tp: int, tied: bool
) -> None:
    from transformers import AutoModelForCausalLM

    # core's stock attention has no sliding window on CPU: one longer than the sample
    source = small_model(tie_word_embeddings=tied, sliding_window=64)
    theirs = AutoModelForCausalLM.from_pretrained(source).eval()
    run_import(ImportOptions(hf_path=str(source), save=tmp_path / "ck"))
    ids = torch.randint(0, 77, (40,), generator=torch.Generator().manual_seed(4)).tolist()
    with torch.no_grad():
        expected = theirs(torch.tensor([ids])).logits[0]
    scale = expected.abs().max()
    for rank in run_ranks(tp, stock_logits_on_rank, tp, str(tmp_path / "ck" / "release"), ids):
        assert ((rank - expected).abs().max() / scale).item() < 1e-5


# ── verify --mode weights ──


def test_verify_weights(extended: Path, plain_model: Path, exported: Path, tmp_path: Path) -> None:
    against_source = compare_weights(VerifyOptions(hf_path=str(plain_model), load=extended, mode="weights"))
    assert (against_source.compared_ids, against_source.ids, against_source.tensors) == (32_000, 42_003, 30)
    assert "32,000 rows" in against_source.describe()
    against_export = compare_weights(VerifyOptions(hf_path=str(exported), load=extended, mode="weights"))
    assert (against_export.compared_ids, against_export.ids) == (42_003, 42_003)
    other = tmp_path / "other"
    shutil.copytree(plain_model, other)
    tensors = load_file(other / "model.safetensors")
    tensors["model.layers.1.self_attn.k_proj.weight"][3, 2] += 1
    from safetensors.torch import save_file

    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConversionError, match=r"layers.1.self_attn.k_proj.weight: 1 of 160 values differ"):
        compare_weights(VerifyOptions(hf_path=str(other), load=extended, mode="weights"))
    edit_json(other / "config.json", rms_norm_eps=1e-5)
    with pytest.raises(ConversionError, match="rms_eps: 0.0003 != 1e-05"):
        compare_weights(VerifyOptions(hf_path=str(other), load=extended, mode="weights"))


# ── types, shards, configs ──


@pytest.mark.parametrize(("name", "dtype"), [("fp32", torch.float32), ("fp16", torch.float16)])
def test_types_can_be_changed_either_way(
    small_model: Callable[..., Path], tmp_path: Path, name: Any, dtype: torch.dtype
) -> None:
    source = small_model(dtype=torch.bfloat16)
    summary = run_import(ImportOptions(hf_path=str(source), save=tmp_path / "ck", dtype=name))
    assert summary.weight_type == name
    run_export(ExportOptions(load=tmp_path / "ck", hf_path=tmp_path / "same"))
    run_export(ExportOptions(load=tmp_path / "ck", hf_path=tmp_path / "back", dtype="bf16"))
    converted = {key: value.to(dtype) for key, value in all_tensors(source).items()}
    for key, value in all_tensors(tmp_path / "same").items():
        assert torch.equal(value, converted[key])
    for key, value in all_tensors(tmp_path / "back").items():
        assert torch.equal(value, converted[key].to(torch.bfloat16))
    config = json.loads((tmp_path / "same" / "config.json").read_text())
    assert config["torch_dtype"] == {"fp32": "float32", "fp16": "float16"}[name]


def test_shards_are_planned_in_order_and_bounded() -> None:
    shapes = {"a": (5, 1), "b": (5,), "c": (1,), "d": (4, 5), "e": (1,)}  # 2 bytes a value
    shards = plan_shards(shapes, "bf16", 20)
    assert [list(shard.shapes) for shard in shards] == [["a", "b"], ["c"], ["d"], ["e"]]
    assert shards[1].file == "model-00002-of-00004.safetensors"
    (only,) = plan_shards(shapes, "bf16", 200)
    assert list(only.shapes) == ["a", "b", "c", "d", "e"] and only.file == "model.safetensors"


def test_the_index_lists_every_tensor(small_model: Callable[..., Path], tmp_path: Path) -> None:
    exported = there_and_back(small_model(), tmp_path, max_shard_size="8KB")
    index = json.loads((exported / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in exported.glob("*.safetensors"))
    assert len(files) > 2 and sorted(set(index["weight_map"].values())) == files
    for name, file in index["weight_map"].items():
        assert name in load_file(exported / file)
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in all_tensors(exported).values())
    modes = {path.stat().st_mode for path in exported.iterdir()}
    assert len(modes) == 1  # as readable as any file


def test_the_exported_config_is_read_right_by_transformers_4_and_5(extended: Path) -> None:
    facts = read_facts(extended / "release")
    facts.hf_config["auto_map"] = {"AutoModelForCausalLM": "modeling_custom.Custom"}
    # as 5.x writes them
    facts.hf_config["rope_parameters"] = {"rope_theta": 1e6, "rope_type": "default"}
    facts.hf_config["dtype"] = "float32"
    config = exported_config(facts, architecture_table(facts.hf_config), "bf16")
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 1e6
    assert config["torch_dtype"] == config["dtype"] == "bfloat16"
    assert "auto_map" not in config


def test_a_text_model_stays_one(plain_model: Path, tmp_path: Path) -> None:
    run_import(ImportOptions(hf_path=str(plain_model), save=tmp_path / "ck"))
    facts = read_facts(tmp_path / "ck" / "release")
    assert facts.vocabulary == Vocabulary(text_size=32_000, unit_count=0)
    run_export(ExportOptions(load=tmp_path / "ck", hf_path=tmp_path / "hf"))
    assert_equal_tensors(tmp_path / "hf", plain_model)
    assert "pad_token_id" not in json.loads((tmp_path / "hf" / "generation_config.json").read_text())
