"""Logits of a packed row at any layout, for verification and tests."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region
from torch import Tensor

from usdm_megatron.data.batch import PackedBatch
from usdm_megatron.model.packed_sequence import RopeTable
from usdm_megatron.vocab import Vocabulary


@torch.no_grad()
def packed_logits(
    chunks: list[Any], rope: RopeTable, batches: list[PackedBatch], vocabulary: Vocabulary, dtype: torch.dtype
) -> list[Tensor]:
    """fp32 logits `[S, vocabulary.size]` of each micro-batch, on every rank of the last stage; else []."""
    collected: list[Tensor] = []

    def keep(logits_1SV: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        whole = gather_from_tensor_model_parallel_region(logits_1SV)
        collected.append(whole[0, :, : vocabulary.size].float())
        return logits_1SV.new_zeros(()), {}

    def forward_step(iterator: Iterator[PackedBatch], chunk: Any) -> tuple[Tensor, Any]:
        batch = next(iterator)
        output = chunk(batch.tokens, batch.position_ids, None, packed_seq_params=rope.pack(batch, dtype))
        return output, keep

    iterators = [iter(batches) for _ in chunks]
    get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iterators if len(iterators) > 1 else iterators[0],
        model=chunks,
        num_microbatches=len(batches),
        seq_length=batches[0].tokens.numel(),
        micro_batch_size=1,
        forward_only=True,
    )
    return collected
