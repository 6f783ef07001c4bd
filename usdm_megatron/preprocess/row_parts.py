"""Packed rows as a store holds them: cut into samples, ids narrow; made in workers from any `RowSource`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from usdm_megatron.data.token_index import LENGTH_DTYPE
from usdm_megatron.data.token_store import token_dtype
from usdm_megatron.data.token_store_writer import largest_as_unsigned
from usdm_megatron.preprocess.rows import RowSource, cut_samples
from usdm_megatron.vocab import Vocabulary

_CHUNK_TOKENS = 128 << 10  # compared while they are in the cache, then converted


@dataclass(frozen=True)
class CutRows:
    """Some consecutive rows: T tokens, n samples, R rows; what `TokenStoreWriter.append` takes."""

    tokens: np.ndarray  # [T], of the store's dtype where all ids are in the vocabulary, else as read
    sample_lengths: np.ndarray  # int32 [n]
    samples_per_row: np.ndarray  # int32 [R]
    rows_without_bos: int
    place: Callable[[int], str]

    def row_lengths(self) -> np.ndarray:
        """Tokens of every row, int64 `[R]`."""
        ends = np.cumsum(self.sample_lengths, dtype=np.int64)
        return np.diff(ends[np.cumsum(self.samples_per_row) - 1], prepend=0)


@dataclass(frozen=True)
class RowCutter:
    """part → `CutRows`, in a worker: a quarter of the bytes of int64 ids go back to the parent."""

    source: RowSource
    vocabulary: Vocabulary

    def __call__(self, part: Any) -> CutRows:
        rows = self.source.read(part)
        tokens = _as_stored(rows.tokens, self.vocabulary)
        cuts = cut_samples(tokens, rows.row_lengths, self.vocabulary.bos_id)
        return CutRows(
            tokens,
            cuts.sample_lengths.astype(LENGTH_DTYPE),
            cuts.samples_per_row.astype(LENGTH_DTYPE),
            cuts.rows_without_bos,
            rows.place,
        )


def _as_stored(tokens: np.ndarray, vocabulary: Vocabulary) -> np.ndarray:
    """`tokens` in the store's dtype, or as they are where one is outside of the vocabulary."""
    dtype = token_dtype(vocabulary)
    if tokens.dtype == dtype:
        return tokens
    stored = np.empty(len(tokens), dtype)
    for start in range(0, len(tokens), _CHUNK_TOKENS):
        chunk = tokens[start : start + _CHUNK_TOKENS]
        if largest_as_unsigned(chunk) >= vocabulary.size:
            return tokens
        stored[start : start + len(chunk)] = chunk
    return stored
