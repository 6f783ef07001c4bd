"""Llama, one entry of the table: imported, run at a layout, exported, and refused where it is more."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from tests.convert_floor.conftest import edit_json
from tests.convert_floor.test_verify_layers import verify
from tests.ranks import run_ranks
from usdm_megatron.architecture import HFArchitecture
from usdm_megatron.convert.export_hf import run_export
from usdm_megatron.convert.import_hf import run_import
from usdm_megatron.convert.options import ExportOptions, ImportOptions, VerifyOptions
from usdm_megatron.errors import ConversionError

SPELLINGS = ("transformers 5", "transformers 4")


class Converted(NamedTuple):
    """A Llama of transformers, its checkpoint, and what was exported from that."""

    hf: Path
    root: Path
    exported: Path


def write_llama(directory: Path, **changes: Any) -> Path:
    """Random weights, norms included; nothing has its default value."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = {
        "vocab_size": 203,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "rms_norm_eps": 3e-4,
        "rope_theta": 5e5,
        "initializer_range": 0.2,
    }
    torch.manual_seed(4)
    model = LlamaForCausalLM(LlamaConfig(**{**config, **changes}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
    model.save_pretrained(directory)
    return directory


def spell_as_transformers_4(config: Path) -> None:
    edit_json(
        config,
        head_dim=None,  # did not exist before 4.46
        rope_parameters=None,
        dtype=None,
        rope_theta=5e5,
        torch_dtype="float32",
        pretraining_tp=2,  # how its training summed; no other function
        transformers_version="4.40.0",
    )


@pytest.fixture(scope="module", params=SPELLINGS)
def llama(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Converted:
    """As 5.x writes it with its own head_dim; as 4.x wrote it, with tied embeddings."""
    directory = tmp_path_factory.mktemp("llama")
    if request.param == "transformers 5":
        hf = write_llama(directory / "hf", head_dim=16)
    else:
        hf = write_llama(directory / "hf", tie_word_embeddings=True)
        spell_as_transformers_4(hf / "config.json")
    converted = Converted(hf, directory / "checkpoint", directory / "exported")
    run_import(ImportOptions(hf_path=str(hf), save=converted.root))
    run_export(ExportOptions(load=converted.root, hf_path=converted.exported))
    return converted


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 2)])
def test_logits_equal_transformers(tp: int, pp: int, llama: Converted) -> None:
    options = VerifyOptions(
        hf_path=str(llama.hf),
        load=llama.root,
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
    )
    assert run_ranks(tp * pp, verify, [options], 512) == [[None]] * (tp * pp)


def test_an_exported_llama_is_the_source_to_transformers(llama: Converted) -> None:
    from transformers import AutoModelForCausalLM, LlamaForCausalLM

    tokens = torch.randint(0, 203, (2, 70), generator=torch.Generator().manual_seed(0))
    models = [AutoModelForCausalLM.from_pretrained(path) for path in (llama.hf, llama.exported)]
    assert all(isinstance(model, LlamaForCausalLM) for model in models)
    source, exported = (model.config.to_dict() for model in models)
    for told in ("_name_or_path", "transformers_version"):
        source.pop(told, None), exported.pop(told, None)
    assert exported == source
    with torch.no_grad():
        logits = [model(tokens).logits for model in models]
    assert torch.equal(*logits)


def test_an_exported_llama_says_nothing_of_mistral(llama: Converted) -> None:
    source, exported = (json.loads((path / "config.json").read_text()) for path in (llama.hf, llama.exported))
    assert (exported["architectures"], exported["model_type"]) == (["LlamaForCausalLM"], "llama")
    assert exported["rope_theta"] == 5e5  # where 4.x looks
    assert exported.keys() - source.keys() <= {"rope_theta", "dtype", "torch_dtype", "use_cache"}
    assert HFArchitecture.from_hf_config(exported) == HFArchitecture.from_hf_config(source)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"rope_parameters": None, "rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
            "rope_scaling of type 'llama3' is not supported",
        ),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, "rope_parameters of type 'linear'"),
        ({"attention_bias": True}, "attention_bias = true is not supported"),
        ({"mlp_bias": True}, "mlp_bias = true is not supported"),
        ({"sliding_window": 4096}, "sliding_window = 4096 is nothing that LlamaForCausalLM"),
        ({"model_type": "mistral"}, "contradict each other"),
    ],
)
def test_a_llama_that_is_more_than_that_is_refused(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    hf = write_llama(tmp_path / "hf", num_hidden_layers=1)
    edit_json(hf / "config.json", **changes)
    with pytest.raises(ConversionError, match=message):
        run_import(ImportOptions(hf_path=str(hf), save=tmp_path / "checkpoint"))
    assert not (tmp_path / "checkpoint").exists()


def test_buffers_that_old_llamas_saved_are_left_out(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    hf = write_llama(tmp_path / "hf", num_hidden_layers=2)
    old = shutil.copytree(hf, tmp_path / "old")
    weights = load_file(hf / "model.safetensors")
    for layer in range(2):
        weights[f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(weights, old / "model.safetensors", metadata={"format": "pt"})
    assert run_import(ImportOptions(hf_path=str(old), save=tmp_path / "checkpoint")).model.layers == 2


def test_configs_of_the_hub() -> None:
    """Llama 2 7B and Llama 3 8B as their `config.json` has them."""
    common = {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "hidden_act": "silu",
        "hidden_size": 4096,
        "initializer_range": 0.02,
        "model_type": "llama",
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "tie_word_embeddings": False,
    }
    two = {"intermediate_size": 11008, "max_position_embeddings": 4096, "num_key_value_heads": 32}
    three = {"intermediate_size": 14336, "max_position_embeddings": 8192, "num_key_value_heads": 8}
    old = HFArchitecture.from_hf_config({**common, **two, "vocab_size": 32_000})
    new = HFArchitecture.from_hf_config({**common, **three, "vocab_size": 128_256, "rope_theta": 500_000.0})
    assert (old.head_dim, old.heads_per_group, old.rope_theta, old.sliding_window) == (128, 1, 1e4, None)
    assert (new.head_dim, new.heads_per_group, new.rope_theta, new.sliding_window) == (128, 4, 5e5, None)
