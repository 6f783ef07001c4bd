"""Packed rows → the tensors of one micro-batch.

    S = micro_batch_size * seq_length      n = segments of the micro-batch

Rows are padded to `seq_length` each and laid end to end, so S is static. Labels and loss mask are made
inside each row *before* rows are joined: else the last token of a row would be trained on the first of
the next (axolotl#1375). A segment is what attends to itself only: a sample, the padding of a row, or
with `cross_sample_attention="allowed"` all samples of a row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch

from usdm_megatron.data.token_store import PackedRow
from usdm_megatron.errors import DataError
from usdm_megatron.vocab import Vocabulary

CrossSampleAttention = Literal["masked", "allowed"]
TensorChange = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class PackedBatch:
    """One micro-batch, rows flattened into one; `row_ids` holds -1 for an empty row."""

    tokens: torch.Tensor  # int64 [1, S], pad_id beyond the end of a row
    labels: torch.Tensor  # int64 [1, S], the next token of the row; 0 where the loss mask is off
    loss_mask: torch.Tensor  # bool [1, S]
    position_ids: torch.Tensor  # int64 [1, S], from 0 in every segment
    cu_seqlens: torch.Tensor  # int32 [n + 1], from 0 to S
    max_seqlen: int
    row_ids: tuple[int, ...]
    segment_lengths: tuple[int, ...]  # [n] as Python ints: no host sync where segments are looped over

    def to(self, device: torch.device | str, non_blocking: bool = False) -> PackedBatch:
        """The same batch on `device`."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> PackedBatch:
        """The same batch in page-locked host memory, from which copies to a GPU do not block."""
        return self._map(torch.Tensor.pin_memory)

    def _map(self, change: TensorChange) -> PackedBatch:
        return replace(
            self,
            tokens=change(self.tokens),
            labels=change(self.labels),
            loss_mask=change(self.loss_mask),
            position_ids=change(self.position_ids),
            cu_seqlens=change(self.cu_seqlens),
        )


def build_packed_batch(
    rows: Sequence[PackedRow | None],
    row_ids: Sequence[int],
    *,
    seq_length: int,
    vocabulary: Vocabulary,
    train_sample_boundaries: bool,
    cross_sample_attention: CrossSampleAttention,
) -> PackedBatch:
    """Build one micro-batch of `len(rows)` rows of `seq_length` tokens; `None` is a row of padding.

    `train_sample_boundaries=False` takes the loss off the last token of each sample, whose next token
    is another sample's bos. Raises `DataError` for a row longer than `seq_length`.
    """
    size = len(rows) * seq_length
    tokens = np.full(size, vocabulary.pad_id, dtype=np.int64)
    labels = np.zeros(size, dtype=np.int64)
    loss_mask = np.zeros(size, dtype=np.bool_)
    segments: list[np.ndarray] = []
    for number, (row, row_id) in enumerate(zip(rows, row_ids, strict=True)):
        start = number * seq_length
        length = 0 if row is None else len(row.tokens)
        if length > seq_length:
            raise DataError(
                f"data: row {row_id} holds {length} tokens, more than --seq-length {seq_length}; "
                "train with a larger --seq-length or preprocess with a smaller one"
            )
        if row is not None:
            tokens[start : start + length] = row.tokens
            last = start + length - 1  # has no next token in its row
            labels[start:last] = row.tokens[1:]
            loss_mask[start:last] = True
            if not train_sample_boundaries:
                sample_ends = start + np.cumsum(row.sample_lengths) - 1
                labels[sample_ends] = 0
                loss_mask[sample_ends] = False
            segments.append(row.sample_lengths if cross_sample_attention == "masked" else np.array([length]))
        if length < seq_length:
            segments.append(np.array([seq_length - length]))
    lengths = np.concatenate(segments)
    cu_seqlens = np.zeros(len(lengths) + 1, dtype=np.int32)
    np.cumsum(lengths, out=cu_seqlens[1:])
    position_ids = np.arange(size, dtype=np.int64) - np.repeat(cu_seqlens[:-1], lengths)
    return PackedBatch(
        tokens=torch.from_numpy(tokens).unsqueeze(0),
        labels=torch.from_numpy(labels).unsqueeze(0),
        loss_mask=torch.from_numpy(loss_mask).unsqueeze(0),
        position_ids=torch.from_numpy(position_ids).unsqueeze(0),
        cu_seqlens=torch.from_numpy(cu_seqlens),
        max_seqlen=int(lengths.max()),
        row_ids=tuple(int(row_id) for row_id in row_ids),
        segment_lengths=tuple(lengths.tolist()),
    )
