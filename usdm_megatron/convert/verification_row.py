"""The packed row on which `verify` compares logits: every edge of the window, every kind of token."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from usdm_megatron.vocab import Vocabulary

IDS_PER_KIND = 256
_WINDOW_WITHOUT = 64  # sample lengths for a model that attends to everything


@dataclass(frozen=True)
class VerificationRow:
    """Packed samples: `tokens` is `[sum(sample_lengths)]`, each sample starts with bos."""

    tokens: tuple[int, ...]
    sample_lengths: tuple[int, ...]


def build_verification_row(vocabulary: Vocabulary, window: int | None, seed: int) -> VerificationRow:
    """Samples of 1, W-1, W, W+1 and 3W tokens, holding at least 256 random ids of every kind.

    Kinds that have fewer ids appear with all of them; first and last text id, first and last
    unit, control tokens and pad are always there. Further samples of 3W tokens follow when a
    short window leaves too little room. The same seed gives the same row.
    """
    w = _WINDOW_WITHOUT if window is None else window
    rng = np.random.default_rng(seed)
    required = _required_ids(vocabulary, rng)
    lengths = [length for length in (1, w - 1, w, w + 1, 3 * w) if length > 0]
    while sum(lengths) - len(lengths) < len(required):  # the first of each sample is bos
        lengths.append(max(3 * w, 2))
    starts = np.cumsum([0, *lengths[:-1]])
    tokens = rng.integers(0, vocabulary.size, size=sum(lengths))
    inner = np.setdiff1d(np.arange(tokens.size), starts)
    tokens[rng.permutation(inner)[: required.size]] = required
    tokens[starts] = vocabulary.bos_id
    return VerificationRow(tuple(tokens.tolist()), tuple(lengths))


def _required_ids(vocabulary: Vocabulary, rng: np.random.Generator) -> np.ndarray:
    """Up to 256 ids of every kind, and the ids at the edges of the vocabulary's parts."""
    kinds = vocabulary.kind_of_id()
    chosen = [0, vocabulary.text_size - 1, vocabulary.pad_id]
    if vocabulary.has_speech:
        chosen += [vocabulary.first_unit_id, vocabulary.first_unit_id + vocabulary.unit_count - 1]
    for kind in np.unique(kinds):
        ids = np.flatnonzero(kinds == kind)
        chosen += rng.choice(ids, size=min(IDS_PER_KIND, ids.size), replace=False).tolist()
    return np.unique(chosen)
