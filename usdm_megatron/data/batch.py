"""Packed rows → the tensors of one micro-batch.

    S = tokens of the micro-batch with padding      n = segments of the micro-batch

Rows are padded to `seq_length` each and laid end to end, or laid end to end and padded once to a length
that suits all micro-batches of a step. Labels and loss mask are made inside each row *before* rows are
joined: else the last token of a row would be trained on the first of the next (axolotl#1375). A segment is
what attends to itself only: a sample, padding, or with `cross_sample_attention="allowed"` all samples of a
row.
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

    tokens: torch.Tensor  # int64 [1, S], pad_id in padding
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
    batch_length: int | None = None,
) -> PackedBatch:
    """Build one micro-batch of `len(rows)` rows of `seq_length` tokens; `None` is a row of padding.

    Without a loss mask every token of a row is a target but its first; `train_sample_boundaries=False`
    takes the loss off the last token of each sample, whose next token is another sample's bos. With
    `batch_length` rows are laid end to end and padded to that many tokens together. Raises `DataError` for
    a row longer than `seq_length`.
    """
    spans = _row_spans(rows, row_ids, seq_length, batch_length)
    size = sum(spans)
    tokens = np.full(size, vocabulary.pad_id, dtype=np.int64)
    labels = np.zeros(size, dtype=np.int64)
    loss_mask = np.zeros(size, dtype=np.bool_)
    segments: list[np.ndarray] = []
    start = 0
    for row, span in zip(rows, spans, strict=True):
        length = 0 if row is None else len(row.tokens)
        if row is not None:
            tokens[start : start + length] = row.tokens
            last = start + length - 1  # has no next token in its row
            # the mask says which tokens are targets: a position counts by the token after it
            loss_mask[start:last] = True if row.loss_mask is None else row.loss_mask[1:]
            labels[start:last] = np.where(loss_mask[start:last], row.tokens[1:], 0)
            if not train_sample_boundaries:
                sample_ends = start + np.cumsum(row.sample_lengths) - 1
                labels[sample_ends] = 0
                loss_mask[sample_ends] = False
            segments.append(row.sample_lengths if cross_sample_attention == "masked" else np.array([length]))
        segments.append(_padding_segments(span - length, seq_length))
        start += span
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


def _row_spans(
    rows: Sequence[PackedRow | None], row_ids: Sequence[int], seq_length: int, batch_length: int | None
) -> list[int]:
    """Tokens of the batch that each row takes, its padding included."""
    lengths = [0 if row is None else len(row.tokens) for row in rows]
    for length, row_id in zip(lengths, row_ids, strict=True):
        if length > seq_length:
            raise DataError(
                f"data: row {row_id} holds {length} tokens, more than --seq-length {seq_length}; "
                "train with a larger --seq-length or preprocess with a smaller one"
            )
    if batch_length is None:
        return [seq_length] * len(rows)
    if sum(lengths) > batch_length:
        raise ValueError(f"{sum(lengths)} tokens do not fit a batch of {batch_length}")
    return [*lengths[:-1], batch_length - sum(lengths[:-1])]


def _padding_segments(tokens: int, seq_length: int) -> np.ndarray:
    """Padding as segments of at most `seq_length`: no position may lie beyond a row's last."""
    starts = np.arange(0, tokens, seq_length)
    return np.minimum(tokens - starts, seq_length)
