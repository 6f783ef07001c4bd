"""megatron-core's own GPTModel with its own layer spec: what our checkpoints are measured against."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from usdm_megatron.architecture import HFArchitecture
from usdm_megatron.layout import ParallelLayout
from usdm_megatron.runtime.process_groups import open_process_groups, seed_rank
from usdm_megatron.runtime.ranks import RankEnvironment

# Odd values throughout: a default that was never wired would show.
MODEL = HFArchitecture(
    hidden=48,
    layers=4,
    heads=8,
    kv_heads=4,
    head_dim=10,
    ffn=72,
    vocab_size=77,
    max_positions=64,
    sliding_window=None,
    rms_eps=3e-4,
    rope_theta=1e6,
)
PADDED = 512


def open_groups(environment: RankEnvironment, store: Any, tp: int, pp: int) -> Any:
    layout = ParallelLayout(world_size=environment.world_size, tp=tp, pp=pp)
    return open_process_groups(layout, environment, timeout=timedelta(seconds=60), store=store)


def build_stock_model(groups: Any, model: HFArchitecture = MODEL, seed: int = 5) -> Any:
    """The pipeline stage of this rank, randomly initialised, float32."""
    import torch
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.transformer_config import TransformerConfig

    seed_rank(seed, groups.coordinates)
    config = TransformerConfig(
        num_layers=model.layers,
        hidden_size=model.hidden,
        num_attention_heads=model.heads,
        num_query_groups=model.kv_heads,
        kv_channels=model.head_dim,
        ffn_hidden_size=model.ffn,
        normalization="RMSNorm",
        layernorm_epsilon=model.rms_eps,
        add_bias_linear=False,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        use_cpu_initialization=True,
        tensor_model_parallel_size=groups.layout.tp,
        pipeline_model_parallel_size=groups.layout.pp,
        pipeline_dtype=torch.float32,
        gradient_accumulation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
    )
    return GPTModel(
        config,
        get_gpt_layer_local_spec(normalization="RMSNorm"),
        vocab_size=PADDED,
        max_sequence_length=model.max_positions,
        position_embedding_type="rope",
        rotary_base=model.rope_theta,
        share_embeddings_and_output_weights=model.tied,
        pre_process=groups.is_first_stage,
        post_process=groups.is_last_stage,
    ).eval()


def weights(module: Any) -> dict[str, Any]:
    """Its tensors by name, copied, without core's extra state."""
    return {name: value.detach().clone() for name, value in module.named_parameters()}
