"""What attention needs to know about a packed row, made once per micro-batch.

T = tokens of the flattened micro-batch, D = head dimension.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from usdm_megatron.data.batch import PackedBatch


@dataclass
class PackedSequence(PackedSeqParams):
    """Core's THD parameters plus this row's RoPE and its sample lengths on the host.

    `rope_cos_TD`, `rope_sin_TD` are gathered by position; `segment_lengths` are Python ints, so
    that no attention backend reads a device tensor.
    """

    rope_cos_TD: Tensor | None = None
    rope_sin_TD: Tensor | None = None
    segment_lengths: tuple[int, ...] = ()

    @classmethod
    def of_lengths(cls, lengths: Sequence[int], device: torch.device) -> PackedSequence:
        """A row of samples of these lengths, for attention alone: it carries no RoPE."""
        cu_seqlens = torch.tensor([0, *lengths], device=device).cumsum(0).to(torch.int32)
        return cls(
            qkv_format="thd",
            cu_seqlens_q=cu_seqlens,
            cu_seqlens_kv=cu_seqlens,
            max_seqlen_q=max(lengths),
            max_seqlen_kv=max(lengths),
            segment_lengths=tuple(lengths),
        )


class RopeTable:
    """cos and sin of every position, fp32 `[positions, D]` (halves repeated, as in transformers)."""

    def __init__(self, head_dim: int, theta: float, positions: int, device: torch.device) -> None:
        exponents_D = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
        inverse_frequency_D = 1.0 / (theta**exponents_D)
        angles_PD = torch.outer(torch.arange(positions).float(), inverse_frequency_D)
        angles_PD = torch.cat((angles_PD, angles_PD), dim=-1)
        self._cos_PD = angles_PD.cos().to(device)
        self._sin_PD = angles_PD.sin().to(device)

    def pack(self, batch: PackedBatch, dtype: torch.dtype) -> PackedSequence:
        """The packed-sequence parameters of `batch`, RoPE gathered in `dtype`."""
        positions_T = batch.position_ids.view(-1)
        return PackedSequence(
            qkv_format="thd",
            cu_seqlens_q=batch.cu_seqlens,
            cu_seqlens_kv=batch.cu_seqlens,
            max_seqlen_q=batch.max_seqlen,
            max_seqlen_kv=batch.max_seqlen,
            rope_cos_TD=self._cos_PD[positions_T].to(dtype),
            rope_sin_TD=self._sin_PD[positions_T].to(dtype),
            segment_lengths=batch.segment_lengths,
        )


def apply_rope(x_THD: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> Tensor:
    """Rotate `[T, heads, D]` by the row's positions (half-rotation convention, as in transformers)."""
    first, second = x_THD.chunk(2, dim=-1)
    rotated = torch.cat((-second, first), dim=-1)
    return x_THD * cos_TD.unsqueeze(1) + rotated * sin_TD.unsqueeze(1)
