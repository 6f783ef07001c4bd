"""The loss mask of a row in a micro-batch, and rows laid end to end, against a builder of single tokens."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from usdm_megatron.data.batch import PackedBatch, build_packed_batch
from usdm_megatron.data.token_store import PackedRow
from usdm_megatron.vocab import Vocabulary

VOCABULARY = Vocabulary(text_size=20, unit_count=7)
SEQ_LENGTH = 12
Sample = list[tuple[int, int]]  # id, and whether it is a target


@st.composite
def rows(draw: st.DrawFn) -> list[list[Sample] | None]:
    token = st.tuples(st.integers(3, VOCABULARY.size - 1), st.integers(0, 1))
    sample = st.lists(token, min_size=1, max_size=5).map(lambda tokens: [(1, 0), *tokens[1:]])
    row = st.lists(sample, min_size=1, max_size=2)
    return draw(st.lists(st.none() | row, min_size=1, max_size=4))


def build(rows: list[list[Sample] | None], batch_length: int | None) -> PackedBatch:
    packed = [
        None
        if row is None
        else PackedRow(
            np.array([token for sample in row for token, _ in sample]),
            np.array([len(sample) for sample in row], dtype=np.int32),
            np.array([target for sample in row for _, target in sample], dtype=np.uint8),
        )
        for row in rows
    ]
    return build_packed_batch(
        packed,
        range(len(rows)),
        seq_length=SEQ_LENGTH,
        vocabulary=VOCABULARY,
        train_sample_boundaries=True,
        cross_sample_attention="masked",
        batch_length=batch_length,
    )


@given(rows(), st.none() | st.integers(0, 30))
def test_equals_the_builder_that_goes_token_by_token(
    rows: list[list[Sample] | None], spare: int | None
) -> None:
    held = sum(len(sample) for row in rows for sample in row or ())
    batch = build(rows, None if spare is None else max(1, held + spare))
    size = len(rows) * SEQ_LENGTH if spare is None else max(1, held + spare)
    tokens, labels = [VOCABULARY.pad_id] * size, [0] * size
    mask, positions = [False] * size, []
    at = 0
    for number, row in enumerate(rows):
        at = number * SEQ_LENGTH if spare is None else at
        for sample in row or ():
            for place, (token, target) in enumerate(sample):
                tokens[at] = token
                if target:  # predicted by the token before it
                    labels[at - 1], mask[at - 1] = token, True
                positions.append((at, place))
                at += 1
    assert batch.tokens[0].tolist() == tokens
    assert batch.loss_mask[0].tolist() == mask
    assert batch.labels[0].tolist() == labels
    assert all(int(batch.position_ids[0, at]) == place for at, place in positions)
    assert sum(batch.segment_lengths) == int(batch.cu_seqlens[-1]) == size
    assert max(batch.segment_lengths) <= SEQ_LENGTH  # no position beyond what RoPE is prepared for


def test_rows_that_do_not_fit_are_our_bug() -> None:
    with pytest.raises(ValueError, match="3 tokens do not fit a batch of 2"):
        build([[[(1, 0), (5, 1), (6, 1)]]], 2)
