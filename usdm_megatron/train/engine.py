"""Model, optimizer and pipeline step of one rank, built together: what training and its tests share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from usdm_megatron.architecture import HFArchitecture
from usdm_megatron.config import CoreAttention, RunConfig
from usdm_megatron.model.architecture import build_transformer_config
from usdm_megatron.model.build import build_model_chunks, parameter_count, weight_dtype
from usdm_megatron.model.packed_sequence import RopeTable
from usdm_megatron.runtime.process_groups import ProcessGroups
from usdm_megatron.train.optimizer import AdamW, wrap_chunks
from usdm_megatron.train.step import PipelineStep
from usdm_megatron.vocab import Vocabulary


@dataclass(frozen=True)
class Engine:
    """`models` are the bare chunks (for checkpoints), `step` and `optimizer` work on their wrappers.

    `parameters` counts this rank's, frozen ones too.
    """

    models: list[Any]
    wrapped: list[Any]
    optimizer: AdamW
    step: PipelineStep
    parameters: int


def build_engine(
    config: RunConfig,
    architecture: HFArchitecture,
    vocabulary: Vocabulary,
    groups: ProcessGroups,
    backend: CoreAttention,
) -> Engine:
    """This rank's model (uninitialised: load weights next), optimizer and step."""
    dtype = weight_dtype(config.training.bf16)
    core_config = build_transformer_config(
        architecture, config.parallel, dtype=dtype, deterministic=config.training.deterministic_mode
    )
    models = build_model_chunks(
        core_config,
        architecture,
        vocabulary,
        groups,
        backend,
        lora=config.lora.spec,
        seed=config.training.seed,
    )
    wrapped = wrap_chunks(models, config.parallel, groups)
    step = PipelineStep(
        wrapped,
        groups,
        RopeTable(architecture.head_dim, architecture.rope_theta, config.data.seq_length, groups.device),
        vocabulary,
        dtype=dtype,
        loss_reduction=config.training.loss_reduction,
    )
    optimizer = AdamW(wrapped, config.optimizer, groups, bf16=config.training.bf16)
    return Engine(models, wrapped, optimizer, step, parameter_count(models))
