"""Hugging Face architecture → megatron-core's `TransformerConfig`."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from usdm_megatron.architecture import HFArchitecture
from usdm_megatron.config import ParallelConfig
from usdm_megatron.errors import ConfigError

if TYPE_CHECKING:
    from megatron.core.transformer.transformer_config import TransformerConfig


def layout_problems(
    architecture: HFArchitecture, padded_vocabulary: int, parallel: ParallelConfig
) -> list[str]:
    """What this architecture cannot do under this layout, as sentences."""
    tp = parallel.tensor_model_parallel_size
    pp = parallel.pipeline_model_parallel_size
    chunks = pp * parallel.num_virtual_stages_per_pipeline_rank
    problems = [
        f"parallel: tp={tp} does not divide the model's {count} {what}; set "
        "--tensor-model-parallel-size to a divisor"
        for what, count in (
            ("attention heads", architecture.heads),
            ("query groups (key-value heads)", architecture.kv_heads),
            ("feed-forward columns", architecture.ffn),
            ("padded vocabulary rows", padded_vocabulary),
        )
        if count % tp
    ]
    if architecture.layers % chunks:
        problems.append(
            f"parallel: {chunks} pipeline chunks (pp={pp} x vpp={chunks // pp}) do not divide the model's "
            f"{architecture.layers} layers; set --pipeline-model-parallel-size to a divisor"
        )
    return problems


def build_transformer_config(
    architecture: HFArchitecture, parallel: ParallelConfig, *, dtype: torch.dtype
) -> TransformerConfig:
    """The core configuration of this model under this layout.

    Weights are always loaded, so nothing is initialised. Fusions that core implements for CUDA
    alone are off; the loss, RoPE and attention are ours (`model/`).
    """
    from megatron.core.transformer.transformer_config import TransformerConfig

    window = architecture.sliding_window
    return TransformerConfig(
        num_layers=architecture.layers,
        hidden_size=architecture.hidden,
        ffn_hidden_size=architecture.ffn,
        num_attention_heads=architecture.heads,
        num_query_groups=architecture.kv_heads,
        kv_channels=architecture.head_dim,
        layernorm_epsilon=architecture.rms_eps,
        # W keys with the query's own among them: flash-attn and TE count (left, right) neighbours
        window_size=None if window is None else (window - 1, 0),
        normalization="RMSNorm",
        activation_func=F.silu,
        gated_linear_unit=True,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        pipeline_dtype=dtype,
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        sequence_parallel=parallel.sequence_parallel,
        perform_initialization=False,
        use_cpu_initialization=not torch.cuda.is_available(),
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        bias_dropout_fusion=False,
        persist_layer_norm=False,
        deallocate_pipeline_outputs=_can_deallocate_outputs(parallel),
        **_virtual_pipeline(parallel),
        **_recompute(parallel, architecture.layers),
    )


def _can_deallocate_outputs(parallel: ParallelConfig) -> bool:
    """Whether core may free a stage's output after sending it.

    Not with overlapped sends over gloo: the send still reads the memory (seen: a wrong loss, another
    one every run). NCCL's stream order makes it safe.
    """
    return parallel.num_virtual_stages_per_pipeline_rank == 1 or torch.cuda.is_available()


def _virtual_pipeline(parallel: ParallelConfig) -> dict[str, Any]:
    if parallel.num_virtual_stages_per_pipeline_rank == 1:
        return {}
    overlap = parallel.overlap_p2p_communication
    return {
        "virtual_pipeline_model_parallel_size": parallel.num_virtual_stages_per_pipeline_rank,
        "overlap_p2p_comm": overlap,
        "batch_p2p_comm": not overlap,
    }


def _recompute(parallel: ParallelConfig, layers: int) -> dict[str, Any]:
    if parallel.recompute_granularity == "none":
        return {}
    if parallel.recompute_granularity == "selective":
        if "layernorm" in parallel.recompute_modules and not importlib.util.find_spec("transformer_engine"):
            raise ConfigError(
                "parallel: recompute module layernorm needs transformer-engine in megatron-core "
                "0.16 and it is not "
                "installed; drop it from --recompute-modules"
            )
        return {"recompute_granularity": "selective", "recompute_modules": list(parallel.recompute_modules)}
    chunk = layers // (parallel.pipeline_model_parallel_size * parallel.num_virtual_stages_per_pipeline_rank)
    if parallel.recompute_num_layers > chunk:
        raise ConfigError(
            f"parallel: recompute_num_layers {parallel.recompute_num_layers} exceeds the {chunk} layers of a "
            f"pipeline chunk; lower it"
        )
    return {
        "recompute_granularity": "full",
        "recompute_method": parallel.recompute_method,
        "recompute_num_layers": parallel.recompute_num_layers,
    }
