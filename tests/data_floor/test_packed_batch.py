"""`build_packed_batch` against a slow builder that goes token by token."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from usdm_megatron.data.batch import PackedBatch, build_packed_batch
from usdm_megatron.data.token_store import PackedRow
from usdm_megatron.errors import DataError
from usdm_megatron.vocab import USDM_VOCABULARY, Vocabulary

VOCABULARY = Vocabulary(text_size=20, unit_count=7)  # pad 29
SEQ_LENGTH = 12


def packed(row: list[list[int]]) -> PackedRow:
    tokens = [token for sample in row for token in sample]
    return PackedRow(
        np.array(tokens, dtype=np.uint16), np.array([len(sample) for sample in row], dtype=np.int32)
    )


def brute_force(
    rows: list[list[list[int]] | None], train_sample_boundaries: bool, cross_sample_attention: str
) -> dict[str, list[Any]]:
    """Token by token, straight from the words of the design."""
    tokens, labels, mask, positions, segments = [], [], [], [], []
    for row in rows:
        flat = [(token, s) for s, sample in enumerate(row or []) for token in sample]
        pieces: list[int] = []  # segment lengths of this row
        previous_segment = None
        for t in range(SEQ_LENGTH):
            if t < len(flat):
                segment: Any = flat[t][1] if cross_sample_attention == "masked" else "row"
                tokens.append(flat[t][0])
            else:
                segment = "padding"
                tokens.append(VOCABULARY.pad_id)
            if segment != previous_segment:
                pieces.append(0)
                previous_segment = segment
            positions.append(pieces[-1])
            pieces[-1] += 1
            has_target = t + 1 < len(flat)
            if has_target and flat[t][1] != flat[t + 1][1]:
                has_target = train_sample_boundaries
            mask.append(has_target)
            labels.append(flat[t + 1][0] if has_target else 0)
        segments += pieces
    return {
        "tokens": tokens,
        "labels": labels,
        "loss_mask": mask,
        "position_ids": positions,
        "cu_seqlens": [sum(segments[:n]) for n in range(len(segments) + 1)],
        "segment_lengths": segments,
    }


def build(rows: list[list[list[int]] | None], **changes: Any) -> PackedBatch:
    options = {
        "seq_length": SEQ_LENGTH,
        "vocabulary": VOCABULARY,
        "train_sample_boundaries": True,
        "cross_sample_attention": "masked",
    }
    return build_packed_batch(
        [None if row is None else packed(row) for row in rows], range(len(rows)), **(options | changes)
    )


@st.composite
def row(draw: st.DrawFn) -> list[list[int]] | None:
    room = draw(st.integers(0, SEQ_LENGTH))
    samples = []
    while room:
        length = draw(st.integers(1, room))  # a sample of one token is legal
        samples.append(draw(st.lists(st.integers(0, 28), min_size=length, max_size=length)))
        room -= length
    return samples or None


@given(st.lists(row(), min_size=1, max_size=3), st.booleans(), st.sampled_from(["masked", "allowed"]))
def test_equals_the_builder_that_goes_token_by_token(
    rows: list[list[list[int]] | None], boundaries: bool, cross: str
) -> None:
    batch = build(rows, train_sample_boundaries=boundaries, cross_sample_attention=cross)
    expected = brute_force(rows, boundaries, cross)
    size = len(rows) * SEQ_LENGTH
    for name, dtype in (
        ("tokens", torch.int64),
        ("labels", torch.int64),
        ("loss_mask", torch.bool),
        ("position_ids", torch.int64),
    ):
        tensor = getattr(batch, name)
        assert (tensor.shape, tensor.dtype) == ((1, size), dtype)
        assert tensor[0].tolist() == expected[name], name
    assert batch.cu_seqlens.dtype == torch.int32
    assert batch.cu_seqlens.tolist() == expected["cu_seqlens"]
    assert batch.segment_lengths == tuple(expected["segment_lengths"])
    assert all(type(length) is int and length > 0 for length in batch.segment_lengths)
    assert type(batch.max_seqlen) is int
    assert batch.max_seqlen == max(expected["segment_lengths"])
    assert batch.row_ids == tuple(range(len(rows)))


def test_the_last_token_of_a_row_is_not_trained_on_the_next_rows_bos() -> None:
    """Full rows, so that no padding lies between them (axolotl#1375)."""
    full = [[1, 5, 6, 2], [1, 7, 8, 9, 10, 11, 12, 2]]
    batch = build([full, full])
    assert batch.tokens[0, SEQ_LENGTH].item() == VOCABULARY.bos_id
    assert not batch.loss_mask[0, SEQ_LENGTH - 1]
    assert not batch.loss_mask[0, 2 * SEQ_LENGTH - 1]
    assert int(batch.loss_mask.sum()) == 2 * (SEQ_LENGTH - 1)
    assert batch.segment_lengths == (4, 8, 4, 8)


def test_recipes_differ_in_the_step_from_eos_to_bos_alone() -> None:
    rows: list[list[list[int]] | None] = [[[1, 5, 2], [1, 6, 7, 2]]]
    trained = build(rows, train_sample_boundaries=True)
    masked = build(rows, train_sample_boundaries=False)
    differing = (trained.loss_mask != masked.loss_mask)[0].nonzero().ravel().tolist()
    assert differing == [2]
    assert trained.labels[0, 2].item() == VOCABULARY.bos_id
    assert masked.labels[0, 2].item() == 0


def test_an_empty_row_is_one_segment_of_padding_without_loss() -> None:
    batch = build([None])
    assert batch.tokens.unique().tolist() == [VOCABULARY.pad_id]
    assert not batch.loss_mask.any()
    assert batch.segment_lengths == (SEQ_LENGTH,)


def test_a_row_too_long_is_named() -> None:
    long = packed([[3] * (SEQ_LENGTH + 1)])
    with pytest.raises(DataError, match="row 77 holds 13 tokens, more than --seq-length 12"):
        build_packed_batch(
            [long],
            [77],
            seq_length=SEQ_LENGTH,
            vocabulary=VOCABULARY,
            train_sample_boundaries=True,
            cross_sample_attention="masked",
        )


def test_the_store_is_not_written_through(write_store: Callable[..., Any]) -> None:
    store = write_store([[[1, 5, 2]]])
    batch = build_packed_batch(
        [store.row(0)],
        [0],
        seq_length=3,
        vocabulary=VOCABULARY,
        train_sample_boundaries=True,
        cross_sample_attention="masked",
    )
    batch.tokens.zero_()
    assert store.row(0).tokens.tolist() == [1, 5, 2]


def test_ids_above_int16_survive() -> None:
    batch = build([[[1, 42001, 2]]], vocabulary=USDM_VOCABULARY)
    assert batch.tokens[0, :4].tolist() == [1, 42001, 2, 42002]
    assert batch.labels[0, :3].tolist() == [42001, 2, 0]


def test_moving_keeps_everything() -> None:
    batch = build([[[1, 5, 2]]])
    moved = batch.to("meta")
    assert {moved.tokens.device.type, moved.cu_seqlens.device.type, moved.loss_mask.device.type} == {"meta"}
    assert {moved.labels.device.type, moved.position_ids.device.type} == {"meta"}
    assert (moved.row_ids, moved.segment_lengths, moved.max_seqlen) == (
        batch.row_ids,
        batch.segment_lengths,
        batch.max_seqlen,
    )
