"""Hugging Face architecture → megatron-core's `TransformerConfig`."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from usdm_megatron.architecture import HFArchitecture
from usdm_megatron.config import ParallelConfig
from usdm_megatron.errors import ConfigError
from usdm_megatron.pipeline_stages import StageLayers, stage_layers

if TYPE_CHECKING:
    from megatron.core.transformer.transformer_config import TransformerConfig


def layout_problems(
    architecture: HFArchitecture, padded_vocabulary: int, parallel: ParallelConfig
) -> list[str]:
    """What this architecture cannot do under this layout, as sentences."""
    tp = parallel.tensor_model_parallel_size
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
    try:
        problems += recompute_problems(parallel, stage_layers(architecture.layers, parallel))
    except ConfigError as error:
        problems += error.problems
    return problems


def recompute_problems(parallel: ParallelConfig, stages: StageLayers) -> list[str]:
    """What cannot be recomputed with these layers in the pipeline's chunks, as sentences."""
    if parallel.recompute_granularity == "selective":
        return _selective_problems(parallel.recompute_modules)
    if parallel.recompute_granularity == "none":
        return []
    at_a_time = parallel.recompute_num_layers
    sizes = sorted({len(chunk) for chunks in stages for chunk in chunks})
    if at_a_time > sizes[-1]:
        return [
            f"parallel: recompute_num_layers {at_a_time} exceeds the {sizes[-1]} layers of a "
            f"pipeline chunk; lower it"
        ]
    undivided = [size for size in sizes if size % at_a_time]
    if parallel.recompute_method == "uniform" and undivided:
        # core's last group would reach past the chunk's last layer (transformer_block.py:539)
        return [
            f"parallel: recompute_num_layers {at_a_time} does not divide the {undivided[0]} layers of a "
            "pipeline chunk into groups (--recompute-method uniform); set a divisor, or "
            "--recompute-method block"
        ]
    return []


def _selective_problems(modules: tuple[str, ...]) -> list[str]:
    if "layernorm" in modules and not importlib.util.find_spec("transformer_engine"):
        # `CheckpointWithoutOutput` takes its default for fp8 (tensor_parallel/random.py:636)
        return [
            "parallel: recompute module layernorm needs transformer-engine in megatron-core "
            "0.16 and it is not "
            "installed; drop it from --recompute-modules"
        ]
    return []


def build_transformer_config(
    architecture: HFArchitecture,
    parallel: ParallelConfig,
    *,
    dtype: torch.dtype,
    deterministic: bool = False,
) -> TransformerConfig:
    """The core configuration of this model under this layout.

    Weights are always loaded, so nothing is initialised. Fusions that core implements for CUDA
    alone are off; the loss, RoPE and attention are ours (`model/`).
    """
    from megatron.core.transformer.transformer_config import TransformerConfig

    window = architecture.sliding_window
    stages = stage_layers(architecture.layers, parallel)
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
        use_te_activation_func=True,  # of the layer spec, that is: ours
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
        deterministic_mode=deterministic,
        deallocate_pipeline_outputs=_can_deallocate_outputs(parallel),
        **_pipeline(parallel, stages),
        **_recompute(parallel, stages),
    )


def _can_deallocate_outputs(parallel: ParallelConfig) -> bool:
    """Whether core may free a stage's output after sending it.

    Not with overlapped sends over gloo: the send still reads the memory (seen: a wrong loss, another
    one every run). NCCL's stream order makes it safe.
    """
    return parallel.num_virtual_stages_per_pipeline_rank == 1 or torch.cuda.is_available()


def _pipeline(parallel: ParallelConfig, stages: StageLayers) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    if not parallel.has_even_stages:
        fields["pipeline_model_parallel_layout"] = _core_layout(stages)
    if parallel.num_virtual_stages_per_pipeline_rank > 1:
        overlap = parallel.overlap_p2p_communication
        fields["virtual_pipeline_model_parallel_size"] = parallel.num_virtual_stages_per_pipeline_rank
        fields["overlap_p2p_comm"], fields["batch_p2p_comm"] = overlap, not overlap
    return fields


def _core_layout(stages: StageLayers) -> list[list[str]]:
    """What each chunk along the model holds, in the words of core's `PipelineParallelLayerLayout`."""
    along_the_model = [chunk for number in zip(*stages, strict=True) for chunk in number]
    chunks = [["decoder"] * len(layers) for layers in along_the_model]
    chunks[0].insert(0, "embedding")
    chunks[-1].append("loss")
    return chunks


def _recompute(parallel: ParallelConfig, stages: StageLayers) -> dict[str, Any]:
    if problems := recompute_problems(parallel, stages):
        raise ConfigError(*problems)
    if parallel.recompute_granularity == "none":
        return {}
    if parallel.recompute_granularity == "selective":
        return {"recompute_granularity": "selective", "recompute_modules": list(parallel.recompute_modules)}
    return {
        "recompute_granularity": "full",
        "recompute_method": parallel.recompute_method,
        "recompute_num_layers": parallel.recompute_num_layers,
    }
