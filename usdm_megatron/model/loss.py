"""Cross-entropy and argmax over a tensor-parallel, padded vocabulary, and the loss as sums and counts.

S = tokens, V = this rank's columns of the padded vocabulary, K = kinds of target.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from usdm_megatron.vocab import TargetKind

# fp32 copy of the logits held at a time, in elements: 16 Mi x 4 B = 64 MiB
_CHUNK_ELEMENTS = 16 * 2**20


class _PackedVocabularyCrossEntropy(torch.autograd.Function):
    """Per-token loss from logits `[S, V]`; pad columns stay outside the softmax.

    One pass over the logits in fp32 chunks of tokens, two small reductions over tensor parallel
    ranks. The backward pass writes the gradient over the logits, which nobody else reads.
    """

    @staticmethod
    def forward(
        ctx: Any, logits_SV: Tensor, labels_S: Tensor, first_column: int, columns: int, group: Any
    ) -> Tensor:
        own_max_S = torch.full_like(labels_S, float("-inf"), dtype=torch.float32)
        own_sum_S = torch.zeros_like(own_max_S)
        target_S = torch.zeros_like(own_max_S)
        local_S = labels_S - first_column
        ours_S = (local_S >= 0) & (local_S < columns)
        local_S = torch.where(ours_S, local_S, 0)
        if columns:  # a rank may hold nothing but padding
            for rows in _chunks(logits_SV):
                chunk = logits_SV[rows, :columns].float()
                own_max_S[rows] = chunk.amax(dim=-1)
                own_sum_S[rows] = (chunk - own_max_S[rows, None]).exp_().sum(dim=-1)
                target_S[rows] = chunk.gather(1, local_S[rows, None]).squeeze(1)
            target_S = torch.where(ours_S, target_S, 0.0)
        max_S = own_max_S.clone()
        if dist.get_world_size(group) > 1:
            dist.all_reduce(max_S, op=dist.ReduceOp.MAX, group=group)
            own_sum_S *= (own_max_S - max_S).exp_()
            both = torch.stack((own_sum_S, target_S))
            dist.all_reduce(both, group=group)
            own_sum_S, target_S = both[0], both[1]
        log_normaliser_S = max_S + own_sum_S.log()
        ctx.save_for_backward(logits_SV, log_normaliser_S, local_S, ours_S)
        ctx.columns = columns
        return log_normaliser_S - target_S

    @staticmethod
    def backward(ctx: Any, grad_S: Tensor) -> tuple[Tensor | None, ...]:
        logits_SV, log_normaliser_S, local_S, ours_S = ctx.saved_tensors
        with torch.no_grad():
            for rows in _chunks(logits_SV):
                chunk = logits_SV[rows, : ctx.columns].float()
                chunk.sub_(log_normaliser_S[rows, None]).exp_().mul_(grad_S[rows, None])
                if ctx.columns:
                    hit = torch.where(ours_S[rows], grad_S[rows], 0.0)
                    chunk.scatter_add_(1, local_S[rows, None], -hit[:, None])
                logits_SV[rows, : ctx.columns] = chunk.to(logits_SV.dtype)
            logits_SV[:, ctx.columns :] = 0
        return logits_SV, None, None, None, None


def packed_cross_entropy(
    logits_SV: Tensor, labels_S: Tensor, *, vocabulary_size: int, tp_rank: int, group: Any
) -> Tensor:
    """Per-token loss `[S]`, fp32, over exactly `vocabulary_size` columns of the padded vocabulary.

    The gradient overwrites `logits_SV`: hand it over.
    """
    first_column, columns = _true_columns(logits_SV, vocabulary_size, tp_rank)
    return _PackedVocabularyCrossEntropy.apply(logits_SV, labels_S, first_column, columns, group)


@torch.no_grad()
def predicted_ids(logits_SV: Tensor, *, vocabulary_size: int, tp_rank: int, group: Any) -> Tensor:
    """The id of the largest logit, int64 `[S]`, among `vocabulary_size` columns of the padded vocabulary.

    Of equal logits the first, as `torch.argmax` has it; bf16 logits often are equal.
    """
    first_column, columns = _true_columns(logits_SV, vocabulary_size, tp_rank)
    ids_S = torch.full(logits_SV.shape[:1], vocabulary_size, device=logits_SV.device)
    own_max_S = torch.full_like(ids_S, float("-inf"), dtype=torch.float32)
    if columns:  # a rank may hold nothing but padding
        local_S = logits_SV[:, :columns].argmax(dim=-1)
        own_max_S = logits_SV.gather(1, local_S[:, None]).squeeze(1).float()
        ids_S = first_column + local_S
    if dist.get_world_size(group) > 1:
        max_S = own_max_S.clone()
        dist.all_reduce(max_S, op=dist.ReduceOp.MAX, group=group)
        ids_S = torch.where(own_max_S == max_S, ids_S, vocabulary_size)
        dist.all_reduce(ids_S, op=dist.ReduceOp.MIN, group=group)
    return ids_S


def count_by_kind(mask_S: Tensor, kind_S: Tensor) -> Tensor:
    """How many tokens of `mask_S` are of each `TargetKind`, float64 `[K]`."""
    return _members(mask_S, kind_S).sum(dim=1)


@dataclass(frozen=True)
class LossRecord:
    """Sums and counts of target losses by `TargetKind`; divided once, when read.

    `sums_K` in nats, `counts_K` in targets, both float64.
    """

    sums_K: Tensor
    counts_K: Tensor

    @classmethod
    def of_tokens(cls, loss_S: Tensor, mask_S: Tensor, kind_S: Tensor) -> LossRecord:
        """The record of one micro-batch: losses, which of them count, and the kind of each target."""
        member_KS = _members(mask_S, kind_S)
        counted_S = torch.where(mask_S, loss_S.detach(), 0.0).to(torch.float64)  # 0 x inf would be NaN
        return cls(sums_K=member_KS @ counted_S, counts_K=member_KS.sum(dim=1))

    @classmethod
    def zero(cls, device: torch.device) -> LossRecord:
        zeros = torch.zeros(len(TargetKind), dtype=torch.float64, device=device)
        return cls(sums_K=zeros, counts_K=zeros.clone())

    def __add__(self, other: LossRecord) -> LossRecord:
        return LossRecord(self.sums_K + other.sums_K, self.counts_K + other.counts_K)


def _true_columns(logits_SV: Tensor, vocabulary_size: int, tp_rank: int) -> tuple[int, int]:
    """The id of this rank's first column, and how many of its columns are no padding."""
    width = logits_SV.size(-1)
    first_column = tp_rank * width
    columns = min(max(vocabulary_size - first_column, 0), width)
    return first_column, columns


def _members(mask_S: Tensor, kind_S: Tensor) -> Tensor:
    """1 where a token of `mask_S` is of the kind, float64 `[K, S]`."""
    kinds_K1 = torch.arange(len(TargetKind), device=kind_S.device)[:, None]
    return ((kind_S[None, :] == kinds_K1) & mask_S[None, :]).to(torch.float64)


def _chunks(logits_SV: Tensor) -> list[slice]:
    rows = max(1, _CHUNK_ELEMENTS // logits_SV.size(-1))
    return [slice(start, start + rows) for start in range(0, logits_SV.size(0), rows)]
