"""Small Hugging Face models with odd values, written once."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from usdm_megatron.convert.options import ImportOptions
from usdm_megatron.demo.tokenizer import write_mistral_tokenizer

# head_dim is no hidden / heads, three query heads share a group; nothing has its default value.
SMALL_CONFIG: dict[str, Any] = {
    "vocab_size": 77,
    "hidden_size": 28,
    "intermediate_size": 44,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 10,
    "max_position_embeddings": 96,
    "sliding_window": 17,
    "rms_norm_eps": 3e-4,
    "rope_theta": 1e6,  # 4.x keeps it, 5.x turns it into rope_parameters
    "initializer_range": 0.05,
}


def write_hf_model(
    directory: Path, seed: int = 1, dtype: torch.dtype = torch.float32, **changes: Any
) -> Path:
    """A Mistral that transformers saved, every weight random (norms too)."""
    from transformers import MistralConfig, MistralForCausalLM

    model = MistralForCausalLM(MistralConfig(**{**SMALL_CONFIG, **changes}))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    model.to(dtype).save_pretrained(directory)
    return directory


def edit_json(path: Path, **changes: Any) -> None:
    """Set keys of a JSON file; None removes one."""
    content = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The plain tokenizer of Mistral-7B-v0.1."""
    return write_mistral_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def plain_model(tmp_path_factory: pytest.TempPathFactory, tokenizer_dir: Path) -> Path:
    """A small model with Mistral's 32,000 ids and its tokenizer; bf16. Read only."""
    directory = write_hf_model(
        tmp_path_factory.mktemp("plain") / "tiny-mistral",
        dtype=torch.bfloat16,
        vocab_size=32_000,
        hidden_size=8,
    )
    shutil.copytree(tokenizer_dir, directory, dirs_exist_ok=True)
    return directory


@pytest.fixture(scope="session")
def extended(tmp_path_factory: pytest.TempPathFactory, plain_model: Path) -> Path:
    """`plain_model` imported with `--extend-vocab usdm`. Read only."""
    from usdm_megatron.convert.import_hf import run_import

    root = tmp_path_factory.mktemp("extended")
    run_import(ImportOptions(hf_path=str(plain_model), save=root, extend_vocab="usdm", seed=7))
    return root


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory, extended: Path) -> Path:
    """`extended` exported. Read only."""
    from usdm_megatron.convert.export_hf import run_export
    from usdm_megatron.convert.options import ExportOptions

    target = tmp_path_factory.mktemp("exported") / "hf"
    run_export(ExportOptions(load=extended, hf_path=target))
    return target


@pytest.fixture
def small_model(tmp_path: Path) -> Callable[..., Path]:
    """`small_model(**config changes)`: a model of 77 ids without tokenizer, in a directory of its own."""

    def make(name: str = "source", **changes: Any) -> Path:
        return write_hf_model(tmp_path / name, **changes)

    return make
