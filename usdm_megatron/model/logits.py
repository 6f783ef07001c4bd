"""Logits and hidden states of a packed row at any layout, for verification and tests.

S = tokens of the row, P = positions of it that are kept, V = vocabulary / tp.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
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


def stage_modules(model: Any) -> dict[int, torch.nn.Module]:
    """The modules of a `GPTModel` stage whose outputs are hidden states, by depth.

    0: the embedding; n: decoder layer n, counted from 1 over all stages; layers + 1: the final norm.
    """
    modules: dict[int, torch.nn.Module] = {layer.layer_number: layer for layer in model.decoder.layers}
    if model.pre_process:
        modules[0] = model.embedding
    if model.decoder.final_layernorm is not None:
        modules[model.config.num_layers + 1] = model.decoder.final_layernorm
    return modules


@contextmanager
def kept_states(modules: Mapping[int, torch.nn.Module], positions_P: Tensor) -> Iterator[dict[int, Tensor]]:
    """Fill the yielded dict with what these modules put out, under their keys, while the block runs.

    Each state is fp32 `[P, hidden]`, at these positions of the one row that runs; only they are held.
    """
    states: dict[int, Tensor] = {}

    def keep(depth: int, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output  # layers may return more beside it
        states[depth] = hidden.detach().reshape(-1, hidden.size(-1))[positions_P].float()

    handles = [
        module.register_forward_hook(lambda _module, _input, output, depth=depth: keep(depth, output))
        for depth, module in modules.items()
    ]
    try:
        yield states
    finally:
        for handle in handles:
            handle.remove()
