"""What the rows of a step amount to, from the indices alone: targets, tokens, attention pairs.

Every rank can count the whole global batch without reading a token or asking another rank.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from usdm_megatron.data.batch import CrossSampleAttention
from usdm_megatron.data.blend import TrainRows, place_of, stores_of
from usdm_megatron.data.order import EMPTY_ROW
from usdm_megatron.data.token_store import PackedRow


@dataclass(frozen=True)
class StepWork:
    """Sizes of one step over all ranks; padding is not counted."""

    rows: int
    tokens: int
    targets: int  # tokens that carry a loss
    attention_pairs: int  # query-key pairs inside the causal window, per head


class StepCounter:
    """Counts `StepWork` for lists of row ids of one store, or of one blend, with loss masks or without."""

    def __init__(
        self,
        store: TrainRows,
        *,
        window: int | None,
        train_sample_boundaries: bool,
        cross_sample_attention: CrossSampleAttention,
    ) -> None:
        self._store = store
        counts = [part.row_targets() for part in stores_of(store)]
        self._masked_targets = [count for count in counts if count is not None]  # of every row, by store
        assert len(self._masked_targets) in (0, len(counts)), "stores with and without a loss mask"
        self._window = window
        self._train_sample_boundaries = train_sample_boundaries
        self._isolated = cross_sample_attention == "masked"

    def count(self, row_ids: np.ndarray) -> StepWork:
        """The work of these rows (`EMPTY_ROW` entries are nothing)."""
        ids = [row_id for row_id in row_ids.ravel().tolist() if row_id != EMPTY_ROW]
        rows = [self._store.row(row_id) for row_id in ids]
        tokens = sum(len(row.tokens) for row in rows)
        segments = [row.sample_lengths if self._isolated else np.array([len(row.tokens)]) for row in rows]
        return StepWork(
            rows=len(rows),
            tokens=tokens,
            targets=self._targets(ids, rows),
            attention_pairs=_causal_pairs(segments, self._window),
        )

    def _targets(self, ids: list[int], rows: list[PackedRow]) -> int:
        if self._masked_targets:
            places = [place_of(self._store, row_id) for row_id in ids]
            return int(sum(self._masked_targets[place.store][place.row] for place in places))
        # the last token of a row has no next one; of a sample, only another sample's bos
        samples = sum(len(row.sample_lengths) for row in rows)
        return sum(len(row.tokens) for row in rows) - (
            len(rows) if self._train_sample_boundaries else samples
        )


def _causal_pairs(segments: list[np.ndarray], window: int | None) -> int:
    if not segments:
        return 0
    lengths = np.concatenate(segments).astype(np.int64)
    full = lengths if window is None else np.minimum(lengths, window)
    return int((full * (full + 1) // 2 + (lengths - full) * full).sum())
