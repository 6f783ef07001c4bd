"""The row that `verify` runs has every sample length and every kind of token that can go wrong."""

from __future__ import annotations

import numpy as np
import pytest

from usdm_megatron.convert.verification_row import IDS_PER_KIND, build_verification_row
from usdm_megatron.vocab import USDM_VOCABULARY, TargetKind, Vocabulary


@pytest.mark.parametrize("window", [1, 2, 3, 16, 64, 4096, None])
@pytest.mark.parametrize(
    "vocabulary", [USDM_VOCABULARY, Vocabulary(unit_count=0), Vocabulary(text_size=20, unit_count=7)]
)
def test_lengths_and_ids(vocabulary: Vocabulary, window: int | None) -> None:
    row = build_verification_row(vocabulary, window, seed=5)
    w = 64 if window is None else window
    asked = [length for length in (1, w - 1, w, w + 1, 3 * w) if length]
    assert list(row.sample_lengths[: len(asked)]) == asked
    assert sum(row.sample_lengths) == len(row.tokens)
    tokens = np.array(row.tokens)
    assert tokens.min() >= 0 and tokens.max() < vocabulary.size
    starts = np.cumsum([0, *row.sample_lengths[:-1]])
    assert (tokens[starts] == vocabulary.bos_id).all()
    kinds = vocabulary.kind_of_id()
    for kind in np.unique(kinds):
        there = np.unique(tokens[kinds[tokens] == kind])
        assert there.size >= min(IDS_PER_KIND, int((kinds == kind).sum())), TargetKind(kind)
    edges = {0, vocabulary.text_size - 1, vocabulary.pad_id, vocabulary.eos_id}
    if vocabulary.has_speech:
        edges |= {
            vocabulary.continue_id,
            vocabulary.correspond_id,
            vocabulary.first_unit_id,
            vocabulary.size - 2,
        }
    assert edges <= set(row.tokens)


def test_the_real_vocabulary_has_the_named_ids() -> None:
    assert {0, 31_999, 32_000, 42_002} <= set(build_verification_row(USDM_VOCABULARY, 16, 0).tokens)


def test_the_seed_decides() -> None:
    rows = [build_verification_row(USDM_VOCABULARY, 64, seed) for seed in (1, 1, 2)]
    assert rows[0] == rows[1] != rows[2]


def test_a_4096_window_fits_mistrals_positions() -> None:
    row = build_verification_row(USDM_VOCABULARY, 4096, 0)
    assert row.sample_lengths == (1, 4095, 4096, 4097, 12_288)
