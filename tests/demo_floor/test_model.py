"""The demo's model: a Mistral with every shape that is easily mistaken, and the real tokenizer."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from usdm_megatron.demo.corpus import WORDS
from usdm_megatron.demo.model import write_demo_model
from usdm_megatron.demo.settings import DEMO


def test_shapes_differ_where_they_may(model_directory: Path) -> None:
    config = json.loads((model_directory / "config.json").read_text())
    assert config["architectures"] == ["MistralForCausalLM"]
    assert config["vocab_size"] == 32_000
    assert config["num_key_value_heads"] < config["num_attention_heads"]
    assert config["head_dim"] != config["hidden_size"] // config["num_attention_heads"]
    assert config["sliding_window"] == DEMO.sliding_window < DEMO.seq_length
    assert config["rms_norm_eps"] == 3e-4
    # the demo runs at TP2 x PP2
    assert config["num_key_value_heads"] % 2 == config["num_attention_heads"] % 2 == 0
    assert config["num_hidden_layers"] % 2 == config["intermediate_size"] % 2 == 0


def test_transformers_loads_it_and_every_word_is_one_token(model_directory: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert AutoModelForCausalLM.from_pretrained(model_directory).config.num_hidden_layers == DEMO.layers
    tokenizer = AutoTokenizer.from_pretrained(model_directory)
    ids = tokenizer(" ".join(WORDS), add_special_tokens=False)["input_ids"]
    assert len(ids) == len(WORDS)
    assert tokenizer.decode(ids).split() == list(WORDS)


def test_the_same_settings_write_the_same_weights(model_directory: Path, tmp_path: Path) -> None:
    weights = (model_directory / "model.safetensors").read_bytes()
    assert (write_demo_model(tmp_path / "again") / "model.safetensors").read_bytes() == weights
    other = write_demo_model(tmp_path / "other", dataclasses.replace(DEMO, seed=7))
    assert (other / "model.safetensors").read_bytes() != weights
