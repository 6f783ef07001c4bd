"""LoRA without ranks: what is valid, names, the fused B, the transformation of a layer's spec."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

from usdm_megatron.architecture import HFArchitecture
from usdm_megatron.checkpoint.store import single_process_group
from usdm_megatron.config import ParallelConfig
from usdm_megatron.convert.name_table import entry_of_parameter as base_entry
from usdm_megatron.convert.name_table import from_hf
from usdm_megatron.errors import ConfigError
from usdm_megatron.lora_spec import TARGETS, LoraSpec
from usdm_megatron.model.architecture import build_transformer_config
from usdm_megatron.model.build import _new_ids
from usdm_megatron.model.lora import names
from usdm_megatron.model.lora.adapter import FusedRows, fuse_b, initial_a, with_lora
from usdm_megatron.vocab import Vocabulary

MODEL = HFArchitecture(
    hidden=12, layers=2, heads=6, kv_heads=2, head_dim=4, ffn=10, vocab_size=40, max_positions=64,
    sliding_window=None,
)  # fmt: skip
CONFIG = build_transformer_config(MODEL, ParallelConfig(), dtype=torch.float32)


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"r": 0}, "lora: r is 0; it must be a whole number, 1 or more"),
        ({"r": 2.5}, "lora: r is 2.5; it must be a whole number, 1 or more"),
        ({"alpha": 0.0}, "lora: alpha is 0.0; it must be a positive number"),
        ({"alpha": float("nan")}, "lora: alpha is nan; it must be a positive number"),
        ({"dropout": 1.0}, "lora: dropout is 1.0; it must be at least 0 and below 1"),
        ({"dropout": -0.1}, "lora: dropout is -0.1; it must be at least 0 and below 1"),
        ({"targets": frozenset({"qproj"})}, "lora: target module 'qproj' is unknown; did you mean q_proj?"),
        ({"targets": frozenset({"lm_head"})}, "lora: target module 'lm_head' is unknown; known are q_proj, "),
        ({"targets": frozenset()}, "lora: no target modules; name some of q_proj, k_proj, "),
    ],
)
def test_bad_values(fields: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(problem)):
        LoraSpec(**fields)


def test_all_problems_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        LoraSpec(r=-1, alpha=-1, dropout=2, targets=frozenset({"a", "q_proj", "b"}))
    assert len(caught.value.problems) == 5


def test_new_embeddings_need_new_ids() -> None:
    assert list(_new_ids(Vocabulary(text_size=10, unit_count=2))) == [10, 11, 12, 13, 14]
    with pytest.raises(ConfigError, match="vocabulary of 32000 ids has no new ones"):
        _new_ids(Vocabulary(unit_count=0))


def test_names_both_ways() -> None:
    assert tuple(projection.target for projection in names.PROJECTIONS) == TARGETS
    for entry in names.adapter_entries(TARGETS, MODEL, train_new_embeddings=True):
        for layer in entry.layers(MODEL):
            module_name = entry.core_key.replace("layers.", f"layers.{layer}.")
            assert names.entry_of_parameter(module_name) == (entry, layer)
            assert names.entry_of_peft(entry.peft_name(layer)) == (entry, layer)
    assert names.entry_of_parameter("decoder.layers.3.mlp.linear_fc2.adapters.down_proj.lora_a")[1] == 3
    for base in (
        "decoder.layers.0.self_attention.linear_qkv.weight",
        "decoder.final_layernorm.weight",
        "embedding.word_embeddings.weight",
        "decoder.layers.0.self_attention.linear_proj.adapters.q_proj.lora_a",
    ):
        assert not names.is_adapter_key(base)
    tied = names.adapter_entries(
        {"q_proj"}, HFArchitecture(**{**vars(MODEL), "tied": True}), train_new_embeddings=True
    )
    assert [entry.core_key.rsplit(".", 2)[-1] for entry in tied] == ["lora_a", "lora_b", "weight"]


CORE_WEIGHT = {
    "linear_qkv": "decoder.layers.0.self_attention.linear_qkv.weight",
    "linear_proj": "decoder.layers.0.self_attention.linear_proj.weight",
    "linear_fc1": "decoder.layers.0.mlp.linear_fc1.weight",
    "linear_fc2": "decoder.layers.0.mlp.linear_fc2.weight",
}


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from(sorted(CORE_WEIGHT)),
    st.sets(st.sampled_from(TARGETS)),
    st.integers(1, 3),
    st.data(),
)
def test_fused_b_is_what_conversion_makes_of_each_delta(
    linear: str, chosen: set[str], r: int, data: st.DataObject
) -> None:
    """B·A in the layer's order = the converter's arrangement of each projection's own B·A."""
    projections = names.projections_of(linear)
    targets = chosen & {p.target for p in projections} or {data.draw(st.sampled_from(projections)).target}
    generator = torch.Generator().manual_seed(r)
    deltas, all_a, all_b = {}, [], []
    for projection in projections:
        a_entry, b_entry = names.adapter_entries({projection.target}, MODEL, train_new_embeddings=False)
        a = torch.randn(names.entry_shape(a_entry, MODEL, r), generator=generator)
        b = torch.randn(names.entry_shape(b_entry, MODEL, r), generator=generator)
        has = projection.target in targets
        all_b.append(b if has else None)
        all_a += [a] if has else []
        deltas[f"model.layers.0.{projection.hf_module}.weight"] = (
            b @ a if has else torch.zeros(len(b), a.size(1))
        )
    entry, _ = base_entry(CORE_WEIGHT[linear])
    expected = from_hf(entry, deltas, MODEL, 512, 0)
    fused = fuse_b(all_b, FusedRows.of_rank(linear, CONFIG, 1))
    torch.testing.assert_close(fused @ torch.cat(all_a), expected)


def test_initial_a_depends_on_what_it_is_for() -> None:
    q, *_, down = names.PROJECTIONS
    same = initial_a(q, 3, 4, 8, seed=5)
    assert torch.equal(same, initial_a(q, 3, 4, 8, seed=5))
    for other in (
        initial_a(q, 3, 4, 8, seed=6),
        initial_a(q, 2, 4, 8, seed=5),
        initial_a(down, 3, 4, 8, seed=5),
    ):
        assert not torch.equal(same, other)
    # uniform over ±1/√fan_in, as torch.nn.init.kaiming_uniform_(a=√5): mean 0, variance bound²/3
    wide = initial_a(q, 0, 64, 1024, seed=0) * 32
    assert wide.abs().max() <= 1
    assert wide.mean().abs() < 0.01 and wide.var() == pytest.approx(1 / 3, rel=0.02)


def test_transformation_leaves_its_input_alone() -> None:
    layer = get_gpt_layer_local_spec(normalization="RMSNorm")
    block = TransformerBlockSubmodules(layer_specs=[layer, layer], layer_norm=None)
    before = copy.deepcopy(layer)
    adapted = with_lora(block, LoraSpec(targets=frozenset({"v_proj", "down_proj"})))
    assert layer == before and block.layer_specs == [layer, layer]
    for spec in adapted.layer_specs:
        attention, mlp = spec.submodules.self_attention.submodules, spec.submodules.mlp.submodules
        assert attention.linear_qkv.module.__name__ == "AdaptedColumnParallelLinear"
        assert mlp.linear_fc2.module.__name__ == "AdaptedRowParallelLinear"
        # without a target a linear layer is the same class as before
        assert attention.linear_proj is layer.submodules.self_attention.submodules.linear_proj
        assert mlp.linear_fc1 is layer.submodules.mlp.submodules.linear_fc1


class NormedLinear(torch.nn.Module):
    """Core's `TELayerNormColumnParallelLinear` from outside: it norms; the normed input comes on demand."""

    def __init__(
        self, input_size: int, output_size: int, *, config: Any, tp_group: Any, stride: int = 1
    ) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(output_size, input_size))
        self.return_layernorm_output = False

    def forward(self, x: torch.Tensor) -> tuple[Any, None]:
        normed = F.rms_norm(x, (x.size(-1),))
        output = F.linear(normed, self.weight)
        return ((output, normed) if self.return_layernorm_output else output), None


def test_any_class_that_the_spec_names() -> None:
    """A spec like Transformer Engine's: fused norm, class given as a `ModuleSpec` with parameters."""
    lora = LoraSpec(r=2, alpha=3, targets=frozenset({"k_proj", "gate_proj"}))
    layer = get_gpt_layer_local_spec(normalization="RMSNorm")
    layer.submodules.mlp.submodules.linear_fc1 = ModuleSpec(module=NormedLinear, params={"stride": 2})
    spec = with_lora(layer, lora).submodules.mlp.submodules.linear_fc1
    x = torch.randn(5, 1, MODEL.hidden)
    with single_process_group():
        linear = spec(MODEL.hidden, 2 * MODEL.ffn, config=CONFIG, tp_group=torch.distributed.group.WORLD)
        assert isinstance(linear, NormedLinear) and list(linear.adapters) == ["gate_proj"]
        adapter = linear.adapters["gate_proj"]
        torch.nn.init.normal_(adapter.lora_a)
        torch.nn.init.normal_(adapter.lora_b)
        output, bias = linear(x)
    normed = F.rms_norm(x, (x.size(-1),))
    expected = F.linear(normed, linear.weight)
    expected[..., : MODEL.ffn] += 1.5 * F.linear(F.linear(normed, adapter.lora_a), adapter.lora_b)
    assert bias is None
    torch.testing.assert_close(output, expected)


def test_a_layer_without_the_linear_layer() -> None:
    layer = get_gpt_layer_local_spec(num_experts=4, moe_grouped_gemm=False, normalization="RMSNorm")
    assert with_lora(layer, LoraSpec()) is not layer
    with pytest.raises(ConfigError, match="no linear_fc2 to adapt; drop down_proj from the target modules"):
        with_lora(layer, LoraSpec(targets=frozenset({"down_proj"})))
