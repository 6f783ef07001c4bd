"""`config.json` of transformers 4.x and 5.x says the same thing to us as to transformers."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from tests.convert_floor.conftest import SMALL_CONFIG
from tests.oldest import TRANSFORMERS_4
from usdm_megatron.architecture import (
    LLAMA,
    MISTRAL,
    HFArchitecture,
    family_of,
    identity_differences,
    model_identity,
)
from usdm_megatron.errors import ConversionError


def read(**changes: Any) -> HFArchitecture:
    config = {**SMALL_CONFIG, **changes}
    return HFArchitecture.from_hf_config({key: value for key, value in config.items() if value != "absent"})


def test_odd_values_arrive() -> None:
    assert read() == HFArchitecture(
        hidden=28,
        layers=3,
        heads=6,
        kv_heads=2,
        head_dim=10,
        ffn=44,
        vocab_size=77,
        max_positions=96,
        sliding_window=17,
        rms_eps=3e-4,
        rope_theta=1e6,
        tied=False,
        initializer_range=0.05,
    )
    assert (read().heads_per_group, read().qkv_rows) == (3, 100)


def transformers_theta(config: Any) -> float:
    return config.rope_theta if TRANSFORMERS_4 else config.rope_parameters["rope_theta"]


@pytest.mark.skipif(TRANSFORMERS_4, reason="transformers 4.x looks at rope_theta alone")
@pytest.mark.parametrize("beside", ["absent", 7e4])
@pytest.mark.parametrize(
    "scaling", ["absent", None, {}, {"type": "default"}, {"rope_type": "default", "rope_theta": 3e5}]
)
@pytest.mark.parametrize(
    "parameters", ["absent", {"rope_type": "default"}, {"rope_theta": 1e6, "rope_type": "default"}]
)
def test_theta_is_found_where_transformers_finds_it(parameters: Any, scaling: Any, beside: Any) -> None:
    """4.x writes `rope_theta` and `rope_scaling`, 5.x `rope_parameters`; some files have all of them."""
    from transformers import MistralConfig

    spelling = {"rope_parameters": parameters, "rope_scaling": scaling, "rope_theta": beside}
    config = {**SMALL_CONFIG, **spelling}
    given = {key: value for key, value in config.items() if value != "absent"}
    theirs = MistralConfig(**copy.deepcopy(given))
    assert HFArchitecture.from_hf_config(given).rope_theta == transformers_theta(theirs)


@pytest.mark.parametrize("model_type", ["mistral", "llama"])
def test_absent_and_null_fields_mean_what_they_mean_to_transformers(model_type: str) -> None:
    from transformers import AutoConfig

    sizes = {
        key: SMALL_CONFIG[key]
        for key in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
        )
    }
    sizes |= {"num_attention_heads": 16, "hidden_size": 64}
    theirs = AutoConfig.for_model(model_type, **sizes)
    ours = HFArchitecture.from_hf_config({**sizes, "model_type": model_type})
    assert ours == HFArchitecture.from_hf_config(theirs.to_dict())
    assert ours.head_dim == theirs.head_dim == 4
    assert ours.kv_heads == theirs.num_key_value_heads
    assert ours.sliding_window == getattr(theirs, "sliding_window", None)
    assert (ours.rms_eps, ours.max_positions) == (theirs.rms_norm_eps, theirs.max_position_embeddings)
    assert ours.rope_theta == transformers_theta(theirs)
    assert ours.tied == theirs.tie_word_embeddings and ours.initializer_range == theirs.initializer_range
    assert read(num_key_value_heads=None).kv_heads == 6


def test_mistral_v0_2_in_both_spellings() -> None:
    """No window, theta 1e6: what 4.x wrote, and what 5.x writes."""
    old = {"rope_theta": 1e6, "rope_parameters": "absent", "torch_dtype": "bfloat16"}
    new = {"rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}, "dtype": "bfloat16"}
    found = [read(sliding_window=None, **spelling) for spelling in (old, new)]
    assert found[0] == found[1]
    assert (found[0].sliding_window, found[0].rope_theta) == (None, 1e6)


def test_the_family_is_named_by_the_class_then_by_the_type() -> None:
    assert family_of({}) is MISTRAL
    assert family_of({"model_type": "llama"}) is LLAMA
    assert family_of({"architectures": ["LlamaForCausalLM"]}) is LLAMA
    assert family_of({"architectures": ["CustomMistralForCausalLM"], "model_type": "usdm"}) is MISTRAL
    for config, message in (
        ({"model_type": "qwen2"}, "model_type = 'qwen2' is not supported; supported are mistral, llama"),
        ({"architectures": ["Qwen2ForCausalLM"], "model_type": "mistral"}, "CustomMistralForCausalLM, Llama"),
        ({"architectures": ["LlamaForCausalLM"], "model_type": "mistral"}, "contradict each other"),
    ):
        with pytest.raises(ConversionError, match=message):
            family_of(config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu' is not supported"),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, "type 'linear' is not supported"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "type 'yarn' is not supported"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5 must be 1"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e6}}}, "differs by layer type"),
        ({"rope_parameters": "yes"}, "must be an object or null"),
        ({"rope_parameters": {"rope_theta": "big"}}, "rope_theta = 'big'"),
        ({"rope_parameters": {"rope_theta": -1}}, "rope_theta = -1.0 must be a positive number"),
        ({"attention_bias": True}, "attention_bias"),
        ({"quantization_config": {"bits": 4}}, "quantized"),
        ({"rope_parameters": {"rope_theta": float("nan")}}, "rope_theta = nan"),
        ({"rope_theta": 10**400, "rope_parameters": "absent"}, "rope_theta = 1000"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers = 1000000000 must be at most 10,000"),
        ({"hidden_size": "absent"}, "hidden_size is missing"),
        ({"hidden_size": "28"}, "hidden_size = '28' must be a positive integer"),
        ({"num_key_value_heads": 4}, "num_attention_heads = 6 must be a multiple of num_key_value_heads = 4"),
        ({"head_dim": None}, "hidden_size = 28 is no multiple of num_attention_heads = 6"),
        ({"head_dim": 9}, "head_dim = 9 must be even"),
        ({"sliding_window": 0}, "sliding_window = 0"),
        ({"layer_types": ["sliding_attention"] * 2 + ["full_attention"]}, "every layer must be 'sliding_"),
        ({"layer_types": ["sliding_attention"] * 3, "sliding_window": None}, "must be 'full_attention'"),
        ({"layer_types": "full_attention"}, "layer_types with 'full_attention' is not supported"),
        ({"rms_norm_eps": True}, "rms_norm_eps = True"),
        ({"initializer_range": -0.1}, "initializer_range = -0.1"),
    ],
)
def test_what_cannot_be_computed_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConversionError, match=message):
        read(**changes)


def test_all_problems_come_at_once() -> None:
    with pytest.raises(ConversionError) as refused:
        read(hidden_act="gelu", vocab_size="absent", hidden_size="absent")
    assert len(refused.value.problems) == 3


def test_identity_ignores_what_only_draws_new_rows() -> None:
    ours = model_identity(SMALL_CONFIG)
    assert identity_differences(ours, model_identity({**SMALL_CONFIG, "initializer_range": 0.01})) == []
    other = model_identity({**SMALL_CONFIG, "rms_norm_eps": 1e-5, "sliding_window": None})
    assert identity_differences(ours, other) == ["rms_eps: 0.0003 != 1e-05", "sliding_window: 17 != None"]
