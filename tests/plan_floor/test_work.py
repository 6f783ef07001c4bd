"""FLOPs and rows: the check values, the trainer's own count, brute force over pairs."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.plan_floor.requests import MISTRAL, SEQ_LENGTH
from tests.tiny import VOCABULARY, write_store
from usdm_megatron.data.blend import open_rows
from usdm_megatron.plan.work import ModelFlops, RowShape, causal_pairs


def test_check_values_of_mistral_7b() -> None:
    flops = ModelFlops.of(MISTRAL)
    assert MISTRAL.parameters == 7_323_676_672
    assert flops.per_token / 1e9 == pytest.approx(42.9, abs=0.05)
    full, causal, window, packed = (
        flops.per_pair * pairs / 1e9
        for pairs in (
            SEQ_LENGTH,
            causal_pairs(SEQ_LENGTH, None) / SEQ_LENGTH,
            causal_pairs(SEQ_LENGTH, 4096) / SEQ_LENGTH,
            causal_pairs(1024, 4096) / 1024,
        )
    )
    assert (full, causal, window, packed) == pytest.approx((12.9, 6.4, 4.8, 0.8), abs=0.05)


def test_physical_limit_of_an_a100() -> None:
    flops, row = ModelFlops.of(MISTRAL), RowShape.of_one_sample(SEQ_LENGTH)
    packed = RowShape(SEQ_LENGTH, SEQ_LENGTH, ((1024, 8.0),), "eight samples")
    assert 312e12 / (flops.of_row_full_s(row) / row.tokens) == pytest.approx(5_592, abs=1)
    assert 312e12 / (flops.of_row(packed, 4096) / packed.tokens) == pytest.approx(7_140, abs=5)


def test_flops_equal_the_trainers_count() -> None:
    from usdm_megatron.train.metrics import FlopCounter

    counter = FlopCounter.of(MISTRAL.architecture, MISTRAL.vocabulary.size, "A100")
    flops = ModelFlops.of(MISTRAL)
    assert (flops.per_token, flops.per_pair) == (counter.per_token, counter.per_pair)
    assert counter.peak_tflops == 312.0


@given(st.integers(1, 60), st.none() | st.integers(1, 70))
def test_pairs_equal_a_count_of_them(length: int, window: int | None) -> None:
    seen = sum(1 for q in range(length) for k in range(q + 1) if window is None or q - k < window)
    assert causal_pairs(length, window) == seen


def test_the_mean_row_of_a_blend(tmp_path: Path) -> None:
    """By weight: 3 rows of A for each of B, whatever the stores hold."""
    a = [[[1, 5, 2], [1, 5, 5, 5, 2]], [[1, 5, 2], [1, 5, 2]]]  # 8 and 6 tokens
    b = [[[1, 7, 7, 2]]]
    prefixes = [str(write_store(tmp_path / name, rows, VOCABULARY)) for name, rows in (("a", a), ("b", b))]
    row = RowShape.of_rows(open_rows(prefixes, [3, 1]), 16)  # type: ignore[list-item]  # ints are fractions
    assert row.tokens == pytest.approx(0.75 * 7 + 0.25 * 4)
    assert dict(row.samples) == pytest.approx({3: 0.75 * 1.5, 5: 0.75 * 0.5, 4: 0.25})
    assert row.causal_pairs(None) == pytest.approx(0.75 * (1.5 * 6 + 0.5 * 15) + 0.25 * 10)
