"""The table against core's own model and transformers' own weights."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.checkpoint_floor.stock_model import MODEL, PADDED, build_stock_model, open_groups
from tests.ranks import run_ranks
from usdm_megatron.architecture import FAMILIES, Family
from usdm_megatron.convert.name_table import (
    ARCHITECTURES,
    EXTRA_STATE_KEYS,
    architecture_table,
    core_shape,
    entry_of_parameter,
    from_hf,
    to_hf,
)
from usdm_megatron.errors import ConversionError
from usdm_megatron.runtime.ranks import RankEnvironment

TABLE = ARCHITECTURES["MistralForCausalLM"]
QKV, GATE_UP = (
    next(entry for entry in TABLE.entries if entry.core_key.endswith(name))
    for name in ("linear_qkv.weight", "linear_fc1.weight")
)


def core_keys_on_rank(environment: RankEnvironment, store: Any, tied: bool) -> dict[str, Any]:
    """What core's GPTModel itself asks a checkpoint for."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor
    from megatron.core.dist_checkpointing.state_dict_utils import load_preprocess

    with open_groups(environment, store, 1, 1) as groups:
        model = build_stock_model(groups, replace(MODEL, tied=tied))
        leaves = list(nested_values(load_preprocess(model.sharded_state_dict())[0]))
        parameters = {name: tuple(value.shape) for name, value in model.named_parameters()}
    tensors = {leaf.key: tuple(leaf.global_shape) for leaf in leaves if isinstance(leaf, ShardedTensor)}
    objects = {leaf.key for leaf in leaves if not isinstance(leaf, ShardedTensor)}
    return {"tensors": tensors, "objects": objects, "parameters": parameters}


@pytest.mark.parametrize("tied", [False, True])
def test_keys_and_shapes_are_those_of_cores_own_model(tied: bool) -> None:
    model = replace(MODEL, tied=tied)
    (core,) = run_ranks(1, core_keys_on_rank, tied)
    ours = {}
    for entry in TABLE.entries_of(model):
        shape = core_shape(entry, model, PADDED)
        ours[entry.core_key] = (model.layers, *shape) if entry.per_layer else shape
    assert ours == core["tensors"]
    assert set(EXTRA_STATE_KEYS) == core["objects"]
    for name, shape in core["parameters"].items():
        entry, layer = entry_of_parameter(name)
        assert core_shape(entry, model, PADDED) == shape
        assert (layer is None) is not entry.per_layer


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.model_type)
@pytest.mark.parametrize("tied", [False, True])
def test_names_and_shapes_are_those_of_transformers(tied: bool, family: Family) -> None:
    import transformers

    config = transformers.AutoConfig.for_model(
        family.model_type,
        vocab_size=MODEL.vocab_size,
        hidden_size=MODEL.hidden,
        intermediate_size=MODEL.ffn,
        num_hidden_layers=MODEL.layers,
        num_attention_heads=MODEL.heads,
        num_key_value_heads=MODEL.kv_heads,
        head_dim=MODEL.head_dim,
        tie_word_embeddings=tied,
    )
    with torch.device("meta"):
        model = getattr(transformers, family.transformers_class)(config)
    table = ARCHITECTURES[family.transformers_class]
    theirs = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    assert table.hf_shapes(replace(MODEL, tied=tied)) == theirs


def test_qkv_rows_by_sentinels() -> None:
    """Every HF row carries its projection and its number; groups are [q, q, k, v]."""
    model = replace(MODEL, hidden=1, heads=4, kv_heads=2, head_dim=2)
    rows = {"q": 8, "k": 4, "v": 4}
    start = {"q": 100, "k": 200, "v": 300}
    tensors = {
        f"model.layers.1.self_attn.{name}_proj.weight": torch.arange(start[name], start[name] + count)[
            :, None
        ]
        for name, count in rows.items()
    }
    fused = from_hf(QKV, tensors, model, PADDED, layer=1)
    assert fused[:, 0].tolist() == [
        *(100, 101, 102, 103, 200, 201, 300, 301),
        *(104, 105, 106, 107, 202, 203, 302, 303),
    ]
    back = to_hf(QKV, fused, model, layer=1)
    assert all(torch.equal(back[name], tensors[name]) for name in tensors) and back.keys() == tensors.keys()


def test_gate_comes_before_up() -> None:
    model = replace(MODEL, hidden=1, ffn=2)
    names = GATE_UP.hf_names(0)
    assert [name.split(".")[-2] for name in names] == ["gate_proj", "up_proj"]
    tensors = dict(zip(names, (torch.tensor([[1], [2]]), torch.tensor([[3], [4]])), strict=True))
    assert from_hf(GATE_UP, tensors, model, PADDED, layer=0)[:, 0].tolist() == [1, 2, 3, 4]


def test_pad_rows_are_zeros_and_do_not_come_back() -> None:
    entry = TABLE.entries[0]
    tensors = {entry.hf_names()[0]: torch.randn(MODEL.vocab_size, MODEL.hidden)}
    padded = from_hf(entry, tensors, MODEL, PADDED)
    assert padded.shape == (PADDED, MODEL.hidden) and not padded[MODEL.vocab_size :].any()
    assert torch.equal(to_hf(entry, padded, MODEL)[entry.hf_names()[0]], tensors[entry.hf_names()[0]])


@pytest.mark.parametrize("entry", TABLE.entries, ids=lambda entry: entry.core_key)
def test_to_hf_is_the_inverse_for_anything_of_the_weights_shape(entry: Any) -> None:
    gradient = torch.randn(core_shape(entry, MODEL, MODEL.vocab_size), dtype=torch.float64)
    layer = 2 if entry.per_layer else None
    parts = to_hf(entry, gradient, MODEL, layer)
    assert torch.equal(from_hf(entry, parts, MODEL, MODEL.vocab_size, layer), gradient)
    assert all(part.is_contiguous() for part in parts.values())


def test_architectures_are_table_entries() -> None:
    assert architecture_table({"architectures": ["CustomMistralForCausalLM"]}) is TABLE
    llama = architecture_table({"architectures": ["LlamaForCausalLM"]})
    assert (llama.export_as, llama.model_type) == ("LlamaForCausalLM", "llama")
    for names in (["Qwen2ForCausalLM"], None, "MistralForCausalLM", [{}], []):
        with pytest.raises(
            ConversionError,
            match="supported are MistralForCausalLM, CustomMistralForCausalLM, LlamaForCausalLM",
        ):
            architecture_table({"architectures": names})
    with pytest.raises(KeyError, match="no weight in the table"):
        entry_of_parameter("decoder.layers.0.mlp.experts.weight")
