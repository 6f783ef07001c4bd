"""Build this rank's part of the model: one `GPTModel` per pipeline chunk."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.transformer_block import get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from usdm_megatron.architecture import HFArchitecture
from usdm_megatron.config import CoreAttention
from usdm_megatron.model.layer_spec import build_block_spec
from usdm_megatron.model.loss import packed_cross_entropy
from usdm_megatron.runtime.process_groups import ProcessGroups
from usdm_megatron.vocab import Vocabulary


class PackedGPTModel(GPTModel):
    """Core's `GPTModel` whose loss leaves the padding of the vocabulary outside the softmax.

    RoPE is applied by the packed core attention, so the model itself has no position embedding.
    """

    def __init__(self, *args: Any, vocabulary_size: int, **kwargs: Any) -> None:
        super().__init__(*args, position_embedding_type="none", **kwargs)
        self.vocabulary_size = vocabulary_size

    def compute_language_model_loss(self, labels: Tensor, logits: Tensor) -> Tensor:
        """Per-token loss `[1, S]` from labels `[1, S]` and logits `[S, 1, V]`."""
        group = self.pg_collection.tp
        loss_S = packed_cross_entropy(
            logits.squeeze(1),
            labels.squeeze(0),
            vocabulary_size=self.vocabulary_size,
            tp_rank=group.rank(),
            group=group,
        )
        return loss_S.unsqueeze(0)


def build_model_chunks(
    config: TransformerConfig,
    architecture: HFArchitecture,
    vocabulary: Vocabulary,
    groups: ProcessGroups,
    backend: CoreAttention,
) -> list[PackedGPTModel]:
    """This rank's chunks (one, or `vpp` of an interleaved pipeline), uninitialised, on its device."""
    vpp = groups.layout.vpp
    chunks = []
    for chunk in range(vpp):
        stage = chunk if vpp > 1 else None
        first = groups.is_first_stage and chunk == 0
        last = groups.is_last_stage and chunk == vpp - 1
        layers_here = get_num_layers_to_build(config, vp_stage=stage, pp_rank=groups.coordinates.pp)
        model = PackedGPTModel(
            config=config,
            transformer_layer_spec=build_block_spec(config, backend, layers_here),
            vocab_size=vocabulary.padded_size,
            vocabulary_size=vocabulary.size,
            max_sequence_length=architecture.max_positions,
            pre_process=first,
            post_process=last,
            share_embeddings_and_output_weights=architecture.tied,
            pg_collection=groups.collection,
            vp_stage=stage,
        )
        _mark_sharded_weights(model)
        chunks.append(model.to(groups.device))
    return chunks


def _mark_sharded_weights(model: torch.nn.Module) -> None:
    """Say which weights are shards: the gradient norm counts all others on one tensor parallel rank only.

    Core does it while it initialises (`tensor_parallel/layers.py:137`), which weights that are loaded skip.
    """
    sharded_axis = {ColumnParallelLinear: 0, VocabParallelEmbedding: 0, RowParallelLinear: 1}
    for module in model.modules():
        axis = sharded_axis.get(type(module))
        if axis is not None and module.weight is not None:
            set_tensor_model_parallel_attributes(module.weight, is_parallel=True, dim=axis, stride=1)


def parameter_count(chunks: list[PackedGPTModel]) -> int:
    """Parameters on this rank."""
    return sum(parameter.numel() for chunk in chunks for parameter in chunk.parameters())


def weight_dtype(bf16: bool) -> torch.dtype:
    """Dtype of weights and activations."""
    return torch.bfloat16 if bf16 else torch.float32
