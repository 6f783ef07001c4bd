"""Stores and rows that the tests of `usdm_megatron.data` share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from usdm_megatron.data.token_store import TokenStore
from usdm_megatron.data.token_store_writer import TokenStoreWriter
from usdm_megatron.vocab import Vocabulary

Row = list[list[int]]  # samples of a row, ids of a sample

SMALL_VOCABULARY = Vocabulary(text_size=20, unit_count=7)  # 30 ids, pad 29


@pytest.fixture
def vocabulary() -> Vocabulary:
    return SMALL_VOCABULARY


@pytest.fixture
def make_rows() -> Callable[..., list[Row]]:
    """`make_rows(count, seed, longest)`: rows of random samples, each bos … eos, at most `longest` ids."""

    def make(
        count: int, seed: int = 0, longest: int = 24, vocabulary: Vocabulary = SMALL_VOCABULARY
    ) -> list[Row]:
        rng = np.random.default_rng(seed)
        rows = []
        for _ in range(count):
            row: Row = []
            room = int(rng.integers(3, longest + 1))
            while room >= 3:
                length = int(rng.integers(3, room + 1))
                body = rng.integers(3, vocabulary.size - 1, length - 2).tolist()
                row.append([vocabulary.bos_id, *body, vocabulary.eos_id])
                room -= length
            rows.append(row)
        return rows

    return make


@pytest.fixture
def write_store(tmp_path: Path) -> Callable[..., TokenStore]:
    """`write_store(rows, name, …)` writes, opens and returns a store."""

    def write(
        rows: Sequence[Row],
        name: str = "store",
        vocabulary: Vocabulary = SMALL_VOCABULARY,
        row_capacity: int = 1000,
        block: int = 3,
    ) -> TokenStore:
        prefix = tmp_path / name
        with TokenStoreWriter(prefix, vocabulary, row_capacity=row_capacity) as writer:
            for start in range(0, len(rows), block):
                some = rows[start : start + block]
                samples = [sample for row in some for sample in row]
                writer.append(
                    np.concatenate([np.array(sample) for sample in samples]),
                    np.array([len(sample) for sample in samples]),
                    np.array([len(row) for row in some]),
                )
            writer.finish()
        return TokenStore.open(prefix)

    return write
