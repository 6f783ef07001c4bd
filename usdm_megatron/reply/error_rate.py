"""Word and unit error rates: insertions, deletions and substitutions over the length of the reference."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class ErrorCount:
    """Edits, and words or units of the references; counts of several texts add up."""

    edits: int = 0
    reference: int = 0

    def __add__(self, other: ErrorCount) -> ErrorCount:
        return ErrorCount(self.edits + other.edits, self.reference + other.reference)

    @property
    def rate(self) -> float:
        """Edits over the reference; above 1 where more was said than asked for.

        An empty reference: 0 without edits, else infinite.
        """
        if self.reference:
            return self.edits / self.reference
        return float("inf") if self.edits else 0.0


def total(counts: Iterable[ErrorCount]) -> ErrorCount:
    """The sum: a long text weighs more than a short one."""
    return sum(counts, ErrorCount())


def word_errors(reference: str, hypothesis: str) -> ErrorCount:
    """Words are what white space separates."""
    known: dict[str, int] = {}
    said, heard = (
        np.array([known.setdefault(word, len(known)) for word in text.split()], dtype=np.int64)
        for text in (reference, hypothesis)
    )
    return unit_errors(said, heard)


def unit_errors(reference: np.ndarray, hypothesis: np.ndarray) -> ErrorCount:
    """Of two arrays of numbers, `[N]` and `[M]`."""
    return ErrorCount(edit_distance(reference, hypothesis), len(reference))


def edit_distance(one: np.ndarray, other: np.ndarray) -> int:
    """Levenshtein distance of two arrays `[N]` and `[M]`: N steps over rows of M + 1 numbers.

    A row is min over k ≤ j of (what reaches column k from above) + (j - k) insertions; taking j off each
    side turns that into a running minimum.
    """
    columns = np.arange(len(other) + 1)
    distances = columns
    for element in one:
        above = distances + 1
        above[1:] = np.minimum(above[1:], distances[:-1] + (other != element))
        distances = np.minimum.accumulate(above - columns) + columns
    return int(distances[-1])
