"""`config.json` of transformers 4.x and 5.x says the same thing to us as to transformers."""

from __future__ import annotations

from typing import Any

import pytest

from tests.convert_floor.conftest import SMALL_CONFIG
from usdm_megatron.architecture import HFArchitecture, identity_differences, model_identity
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


def test_transformers_4_and_5_spell_theta_differently() -> None:
    assert read(rope_parameters="absent", rope_theta=1e6) == read()
    assert read(rope_scaling={"type": "default"}) == read()
    assert read(rope_parameters={"rope_theta": 1e6}, rope_theta=5.0) == read()


def test_absent_and_null_fields_mean_what_they_mean_to_transformers() -> None:
    from transformers import MistralConfig

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
    sizes |= {"num_attention_heads": 8, "hidden_size": 32}
    theirs = MistralConfig(**sizes)
    ours = HFArchitecture.from_hf_config(sizes)
    assert ours == HFArchitecture.from_hf_config(theirs.to_dict())
    assert ours.head_dim == theirs.head_dim == 4
    assert ours.sliding_window == theirs.sliding_window
    assert (ours.rms_eps, ours.max_positions) == (theirs.rms_norm_eps, theirs.max_position_embeddings)
    assert ours.rope_theta == theirs.rope_parameters["rope_theta"]
    assert read(sliding_window=None).sliding_window is None
    assert read(num_key_value_heads=None).kv_heads == 6


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu' is not supported"),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, "type 'linear' is not supported"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "type 'yarn' is not supported"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"rope_parameters": "yes"}, "must be an object or null"),
        ({"rope_parameters": {"rope_theta": "big"}}, "rope_theta = 'big'"),
        ({"rope_parameters": {"rope_theta": -1}}, "rope_theta = -1.0 must be a positive number"),
        ({"attention_bias": True}, "attention_bias"),
        ({"quantization_config": {"bits": 4}}, "quantized"),
        ({"hidden_size": "absent"}, "hidden_size is missing"),
        ({"hidden_size": "28"}, "hidden_size = '28' must be a positive integer"),
        ({"num_key_value_heads": 4}, "num_attention_heads = 6 must be a multiple of num_key_value_heads = 4"),
        ({"head_dim": None}, "hidden_size = 28 is no multiple of num_attention_heads = 6"),
        ({"head_dim": 9}, "head_dim = 9 must be even"),
        ({"sliding_window": 0}, "sliding_window = 0"),
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
