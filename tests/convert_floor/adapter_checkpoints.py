"""LoRA checkpoints with random adapters, and how they are compared with peft."""

from __future__ import annotations

import zlib
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from tests import tiny
from usdm_megatron.checkpoint.adapter_facts import AdapterFacts
from usdm_megatron.checkpoint.facts import copy_facts, megatron_common, read_facts
from usdm_megatron.checkpoint.streamed import StreamedTensor, save_streamed
from usdm_megatron.convert.adapter_weights import adapter_places
from usdm_megatron.lora_spec import LoraSpec


def random_tensor(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Values that depend on the name alone, so that no two factors are alike; none is zero."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return (0.2 * torch.randn(shape, generator=generator)).to(dtype)


def small_base(directory: Path, **changes: Any) -> Path:
    """A tiny model `directory/hf` and its checkpoint `directory/base/release`; returns the latter."""
    hf = tiny.write_hf_model(directory / "hf", num_hidden_layers=2, **changes)
    return tiny.write_checkpoint(hf, directory / "base") / "release"


def write_adapter(root: Path, base: Path, spec: LoraSpec, dtype: torch.dtype = torch.float32) -> Path:
    """A LoRA checkpoint `root/release` over the checkpoint directory `base`; returns `root`."""
    facts = read_facts(base)
    adapter = AdapterFacts.over(base, spec)

    def extra_files(directory: Path) -> None:
        adapter.write(directory)
        copy_facts(facts, directory)

    save_streamed(
        root,
        "release",
        [
            StreamedTensor(
                place.entry.core_key,
                place.shape,
                dtype,
                partial(random_tensor, name, place.shape, dtype),
                place.layer,
                facts.architecture.layers,
            )
            for name, place in adapter_places(spec, facts.architecture, facts.vocabulary).items()
        ],
        (),
        megatron_common(facts.hf_config, facts.vocabulary, 0, "fp32"),
        extra_files,
    )
    return root


def peft_model(base_hf: Path, adapter: Path, dtype: torch.dtype = torch.float32) -> Any:
    """transformers' model with the exported adapter, as a user loads it."""
    from peft import PeftModel
    from transformers import MistralForCausalLM

    base = MistralForCausalLM.from_pretrained(base_hf, attn_implementation="eager").to(dtype)
    return PeftModel.from_pretrained(base, str(adapter)).eval()


def all_tensors(directory: Path) -> dict[str, Tensor]:
    return {name: t for path in directory.glob("*.safetensors") for name, t in load_file(path).items()}


def assert_same_bits(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype, name
        assert torch.equal(tensor.view(torch.uint8), theirs[name].contiguous().view(torch.uint8)), name
