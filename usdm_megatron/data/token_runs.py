"""The tokens of a store as runs of one kind, a block of whole rows at a time.

    T = tokens of a block      n = its samples      R = its runs

Kinds change a few times a sample, so what is asked of every token is asked of few runs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from usdm_megatron.data.token_store import TokenStore
from usdm_megatron.errors import DataError

BLOCK_TOKENS = 1 << 19  # 1 MiB of uint16 and its intermediates stay in the cache of a core


@dataclass(frozen=True)
class RowsOfStore:
    """Consecutive rows from `first_row` on, laid end to end."""

    first_row: int
    row_lengths: np.ndarray  # int64 [rows], summing to T
    sample_lengths: np.ndarray  # int64 [n], summing to T
    tokens: np.ndarray  # [T], as stored
    loss_mask: np.ndarray | None  # uint8 [T]

    def row_starts(self) -> np.ndarray:
        """First token of every row, int64 `[rows]`."""
        return np.cumsum(self.row_lengths) - self.row_lengths

    def sample_starts(self) -> np.ndarray:
        """First token of every sample, int64 `[n]`."""
        return np.cumsum(self.sample_lengths) - self.sample_lengths


@dataclass(frozen=True)
class KindRuns:
    """Longest stretches of one kind inside a sample: neighbours in a sample differ in kind."""

    kinds: np.ndarray  # uint8 [R], by the table that `runs_of` was given
    starts: np.ndarray  # int64 [R], first token of the run in its block
    lengths: np.ndarray  # int64 [R], in tokens
    first_runs: np.ndarray  # int64 [n], first run of every sample


def row_blocks(store: TokenStore, block_tokens: int = BLOCK_TOKENS) -> Iterator[RowsOfStore]:
    """All rows in order, in blocks of at most `block_tokens`, or of one row that is longer.

    Raises `DataError` for ids outside the vocabulary.
    """
    row_lengths = store.row_lengths()
    row_ends = np.cumsum(row_lengths)
    first = 0
    while first < store.rows:
        most = int(row_ends[first] - row_lengths[first]) + block_tokens
        end = max(first + 1, int(np.searchsorted(row_ends, most, side="right")))
        yield read_rows(store, first, end)
        first = end


def runs_of(block: RowsOfStore, kind_of_id: np.ndarray) -> KindRuns:
    """The runs of a block; `kind_of_id` is uint8 `[vocabulary]`."""
    kinds = kind_of_id[block.tokens]
    sample_starts = block.sample_starts()
    begins = np.empty(len(kinds), dtype=np.bool_)
    np.not_equal(kinds[1:], kinds[:-1], out=begins[1:])
    begins[sample_starts] = True
    starts = np.flatnonzero(begins)
    return KindRuns(
        kinds=kinds[starts],
        starts=starts,
        lengths=np.diff(starts, append=len(kinds)),
        first_runs=np.searchsorted(starts, sample_starts),
    )


def read_rows(store: TokenStore, first: int, end: int) -> RowsOfStore:
    """The rows `[first, end)`, at least one; `DataError` for ids outside the vocabulary."""
    rows = [store.row(row_id) for row_id in range(first, end)]
    tokens = np.concatenate([row.tokens for row in rows])
    masks = [row.loss_mask for row in rows if row.loss_mask is not None]
    size = store.summary.vocabulary.size
    if int(tokens.max()) >= size or int(tokens.min()) < 0:
        raise DataError(
            f"{store.prefix}.bin: holds ids outside its vocabulary of {size}: the file changed since it was "
            "written; preprocess again or copy it again"
        )
    return RowsOfStore(
        first_row=first,
        row_lengths=np.array([len(row.tokens) for row in rows], dtype=np.int64),
        sample_lengths=np.concatenate([row.sample_lengths for row in rows], dtype=np.int64),
        tokens=tokens,
        loss_mask=np.concatenate(masks) if masks else None,
    )
