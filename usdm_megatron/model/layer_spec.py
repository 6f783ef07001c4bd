"""The layer: core's own modules with our RMSNorm, SwiGLU and packed core attention."""

from __future__ import annotations

import torch
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from usdm_megatron.config import CoreAttention
from usdm_megatron.lora_spec import LoraSpec
from usdm_megatron.model.attention import packed_core_attention
from usdm_megatron.model.fused import rms_norm, swiglu
from usdm_megatron.model.lora.adapter import with_lora


class RMSNorm(torch.nn.Module):
    """Root-mean-square norm over the last axis, statistics in fp32 (as in transformers' Mistral).

    Under sequence parallel each rank sees a slice of the sequence: the weight is marked, so that
    core sums its gradient over tensor parallel ranks.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


def build_block_spec(
    config: TransformerConfig, backend: CoreAttention, layers_here: int, lora: LoraSpec | None = None
) -> TransformerBlockSubmodules:
    """The decoder block of one pipeline chunk with `layers_here` layers, adapted where `lora` says so."""
    layer = get_gpt_layer_local_spec(normalization="RMSNorm")
    layer.submodules.input_layernorm = RMSNorm
    layer.submodules.pre_mlp_layernorm = RMSNorm
    layer.submodules.self_attention.submodules.core_attention = ModuleSpec(
        module=packed_core_attention(backend)
    )
    layer.submodules.mlp.submodules.activation_func = swiglu
    block = TransformerBlockSubmodules(layer_specs=[layer] * layers_here, layer_norm=RMSNorm)
    return block if lora is None else with_lora(block, lora)
