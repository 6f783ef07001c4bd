"""Figures of a token store, counted from its tokens and lengths."""

from __future__ import annotations

import enum
from dataclasses import dataclass

import numpy as np

from usdm_megatron.data.token_runs import BLOCK_TOKENS, KindRuns, row_blocks, runs_of
from usdm_megatron.data.token_store import TokenStore
from usdm_megatron.vocab import TargetKind

_TENTHS = 10  # bins of row lengths


class Pattern(enum.Enum):
    """What a sample holds; every sample is of one pattern."""

    TEXT_ONLY = "text only"
    UNIT_ONLY = "units only"
    CONTINUE = "continue"
    CORRESPOND = "correspond"
    CONTINUE_AND_CORRESPOND = "continue and correspond"
    UNMARKED = "text and units, no mark"
    EMPTY = "no text, no units"

    @property
    def label(self) -> str:
        return self.name.lower()


@dataclass(frozen=True)
class Lengths:
    """How long samples or rows are, in tokens: `counts[k]` are from `edges[k]` to below `edges[k + 1]`."""

    shortest: int
    median: float
    mean: float
    percentile_90: float
    percentile_99: float
    longest: int
    edges: tuple[int, ...]
    counts: tuple[int, ...]


@dataclass(frozen=True)
class StoreStatistics:
    """Counts of tokens by kind and of samples by pattern; of targets where the store has a loss mask."""

    tokens_by_kind: dict[TargetKind, int]
    targets_by_kind: dict[TargetKind, int] | None
    rows_without_target: int | None
    samples_by_pattern: dict[Pattern, int]
    sample_lengths: Lengths
    row_lengths: Lengths
    largest_id: int
    text_ids_in_use: int  # different ones; bos, eos and marks are not among them
    units_in_use: int


def count_tokens(store: TokenStore, block_tokens: int = BLOCK_TOKENS) -> StoreStatistics:
    """Read all tokens once, in bounded memory; `DataError` for ids outside the vocabulary."""
    vocabulary = store.summary.vocabulary
    kind_of_id = vocabulary.kind_of_id()
    count_by_id = np.zeros(vocabulary.size, dtype=np.int64)
    targets = np.zeros(len(TargetKind), dtype=np.int64)
    patterns = np.zeros(len(_PATTERN_OF_PRESENCE), dtype=np.int64)
    for block in row_blocks(store, block_tokens):
        count_by_id += np.bincount(block.tokens, minlength=vocabulary.size)
        runs = runs_of(block, kind_of_id)
        patterns += np.bincount(_presence(runs), minlength=len(patterns))
        if block.loss_mask is not None:
            in_run = np.add.reduceat(block.loss_mask, runs.starts, dtype=np.int64)
            targets += np.bincount(runs.kinds, in_run, len(targets)).astype(np.int64)
    ids_in_use = np.bincount(kind_of_id[count_by_id > 0], minlength=len(TargetKind))
    row_targets = store.row_targets()
    return StoreStatistics(
        tokens_by_kind=_by_kind(np.bincount(kind_of_id, count_by_id, len(TargetKind))),
        targets_by_kind=None if row_targets is None else _by_kind(targets),
        rows_without_target=None if row_targets is None else int(np.count_nonzero(row_targets == 0)),
        samples_by_pattern={
            pattern: int(patterns[[found is pattern for found in _PATTERN_OF_PRESENCE]].sum())
            for pattern in Pattern
        },
        sample_lengths=_by_powers_of_two(store.sample_lengths()),
        row_lengths=_by_tenths(store.row_lengths(), store.summary.row_capacity),
        largest_id=int(np.flatnonzero(count_by_id)[-1]),
        text_ids_in_use=int(ids_in_use[TargetKind.TEXT]),
        units_in_use=int(ids_in_use[TargetKind.UNIT]),
    )


def _by_kind(counts: np.ndarray) -> dict[TargetKind, int]:
    return {kind: int(counts[kind]) for kind in TargetKind}


def _presence(runs: KindRuns) -> np.ndarray:
    """For every sample the set of kinds in it, as bits `1 << kind`."""
    return np.bitwise_or.reduceat(np.left_shift(1, runs.kinds, dtype=np.uint8), runs.first_runs)


def _pattern(presence: int) -> Pattern:
    text, units, continues, corresponds = (
        bool(presence >> kind & 1)
        for kind in (TargetKind.TEXT, TargetKind.UNIT, TargetKind.CONTINUE, TargetKind.CORRESPOND)
    )
    if continues or corresponds:
        both = Pattern.CONTINUE_AND_CORRESPOND
        return both if continues and corresponds else Pattern.CONTINUE if continues else Pattern.CORRESPOND
    if text or units:
        return Pattern.UNMARKED if text and units else Pattern.TEXT_ONLY if text else Pattern.UNIT_ONLY
    return Pattern.EMPTY


_PATTERN_OF_PRESENCE = [_pattern(presence) for presence in range(1 << len(TargetKind))]


def _by_powers_of_two(lengths: np.ndarray) -> Lengths:
    lowest, highest = (int(length).bit_length() for length in (lengths.min(), lengths.max()))
    return _lengths(lengths, 1 << np.arange(lowest - 1, highest + 1))


def _by_tenths(lengths: np.ndarray, capacity: int) -> Lengths:
    """Bins of a tenth of the capacity; a row that is full lies in the last one."""
    full = max(capacity, int(lengths.max()))
    return _lengths(lengths, np.unique([1 + full * tenth // _TENTHS for tenth in range(_TENTHS + 1)]))


def _lengths(lengths: np.ndarray, edges: np.ndarray) -> Lengths:
    bins = np.searchsorted(edges, lengths, side="right") - 1
    median, percentile_90, percentile_99 = np.percentile(lengths, (50, 90, 99))
    return Lengths(
        shortest=int(lengths.min()),
        median=float(median),
        mean=float(lengths.mean()),
        percentile_90=float(percentile_90),
        percentile_99=float(percentile_99),
        longest=int(lengths.max()),
        edges=tuple(edges.tolist()),
        counts=tuple(np.bincount(bins, minlength=len(edges) - 1).tolist()),
    )
