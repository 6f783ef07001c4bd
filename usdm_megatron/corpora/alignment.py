"""Words with times → spans of speech units, as stage 2 of the original computes them.

    W = words of an utterance      N = its speech units

Silence belongs to no word and is shared out: before the first word to it, after the last to it, between
two words half to each. What is a silence follows from the words alone, so a manifest need not list any.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

UNITS_PER_SECOND = 50.0  # XLS-R features every 20 ms
FEWEST_WORDS = 3
TIME_NOISE_S = 1e-6  # what decimal times lose as floats: neither a silence nor an overlap
# How far units and times may disagree before they cannot be of one recording.
_RATE_TOLERANCE = 0.1
_RATE_SLACK_UNITS = 5
# How much longer than the words units may last, in silence at the end, where nobody states the duration.
_TRAILING_SILENCE_SHARE = 0.5
_TRAILING_SILENCE_S = 2.0

# Reasons, by which rejected utterances are counted.
FEWER_THAN_3_WORDS = "fewer_than_3_words"
TIMES_NOT_INCREASING = "times_not_increasing"
UNITS_MISSING = "units_missing"
UNITS_DO_NOT_FIT_DURATION = "units_do_not_fit_duration"


class Rejected(Exception):
    """An utterance gives no sample; `reason` is one of few words, `detail` says what was found."""

    def __init__(self, reason: str, detail: str = "") -> None:
        self.reason = reason
        self.detail = detail
        super().__init__(f"{reason}: {detail}")


@dataclass(frozen=True, slots=True)
class Word:
    """A word and when it is said; without text it is a silence."""

    text: str
    start_s: float
    end_s: float


@dataclass(frozen=True, slots=True)
class Utterance:
    """What a corpus knows of one recording; `units` are int32 unit numbers, from 0."""

    id: str
    units: np.ndarray
    words: tuple[Word, ...]
    duration_s: float | None = None  # None: as long as its units, and its words


@dataclass(frozen=True, slots=True)
class WordSpan:
    """One word, or several that could not be told apart, and its units `[start_unit, end_unit)`."""

    text: str
    start_unit: int
    end_unit: int


def align(
    words: Sequence[Word],
    unit_count: int,
    *,
    duration_s: float | None = None,
    units_per_second: float = UNITS_PER_SECOND,
) -> tuple[WordSpan, ...]:
    """Give every unit to a word; the spans follow one another from 0 to `unit_count`, none is empty.

    Times become unit indices by the ratio of `unit_count` to the duration: `duration_s`, or where it is
    None `unit_count / units_per_second`, and never less than where the last word or silence ends.
    Without `duration_s` units may outlast the words by 2 s, or half of the time that these take.
    Raises `Rejected` for what cannot be aligned. Source: naver-ai/usdm, `pre-training/stage2.py`.
    """
    _check_times(words)
    spoken = [(text, word.start_s, word.end_s) for word in words if (text := word.text.strip())]
    if len(spoken) < FEWEST_WORDS:
        raise Rejected(FEWER_THAN_3_WORDS, f"{len(spoken)} words")
    if unit_count == 0:
        raise Rejected(UNITS_MISSING, "no units")
    if duration_s is None:
        duration_s = unit_count / units_per_second
        _check_trailing_silence(duration_s, words[-1].end_s)
    total_s = max(duration_s, words[-1].end_s)
    _check_rate(unit_count, total_s, units_per_second)
    ratio = unit_count / total_s
    # Python's round, here and below, as the original's: half to even, and exact in decimals.
    bounds = [0, *(round(bound_s * ratio) for bound_s in _inner_bounds_s(spoken)), unit_count]
    texts = [text for text, _, _ in spoken]
    _merge_empty(texts, bounds)
    if len(texts) < FEWEST_WORDS:
        raise Rejected(FEWER_THAN_3_WORDS, f"{len(texts)} after words shorter than a unit were merged")
    return tuple(WordSpan(text, *span) for text, span in zip(texts, pairwise(bounds), strict=True))


def _check_times(words: Sequence[Word]) -> None:
    previous_end_s = 0.0
    for number, word in enumerate(words):
        # Written so that NaN fails.
        if not (previous_end_s - TIME_NOISE_S <= word.start_s < word.end_s < math.inf):
            raise Rejected(
                TIMES_NOT_INCREASING,
                f"word {number} ({word.text!r}) is from {word.start_s} s to {word.end_s} s, "
                f"after {previous_end_s} s",
            )
        previous_end_s = word.end_s


def _check_rate(unit_count: int, total_s: float, units_per_second: float) -> None:
    expected = total_s * units_per_second
    tolerance = max(_RATE_SLACK_UNITS, _RATE_TOLERANCE * expected)
    if not (math.isfinite(expected) and abs(unit_count - expected) <= tolerance):
        raise Rejected(
            UNITS_DO_NOT_FIT_DURATION,
            f"{unit_count} units in {total_s:g} s, expected about {expected:.0f} "
            f"({units_per_second:g} units a second)",
        )


def _check_trailing_silence(units_s: float, words_s: float) -> None:
    if units_s - words_s > max(_TRAILING_SILENCE_S, _TRAILING_SILENCE_SHARE * words_s):
        raise Rejected(
            UNITS_DO_NOT_FIT_DURATION,
            f"units last {units_s:g} s, words {words_s:g} s: state the duration if the rest is silence",
        )


def _inner_bounds_s(spoken: Sequence[tuple[str, float, float]]) -> list[float]:
    """Where each word but the last gives way to the next, in seconds [W - 1], never decreasing."""
    bounds_s: list[float] = []
    earliest_s = 0.0
    for (_, _, end_s), (_, start_s, next_end_s) in pairwise(spoken):
        silence_s = start_s - end_s
        bound_s = end_s
        if silence_s > TIME_NOISE_S:
            # To 10 ms, as the original; times finer than that must not leave their words by it.
            bound_s = min(max(round(end_s + silence_s / 2, 2), earliest_s), next_end_s)
        bounds_s.append(bound_s)
        earliest_s = bound_s
    return bounds_s


def _merge_empty(texts: list[str], bounds: list[int]) -> None:
    """Join words without units to their neighbours, in place; `bounds` `[len(texts) + 1]`.

    The first word takes the next one, the last one goes to the one before. In the middle all three
    become one, for nothing says where the outer two part; unless the next one is empty too, which is
    then joined in its turn.
    """
    if len(set(bounds)) == len(bounds):  # nearly always
        return
    at = 0
    while at < len(texts) and len(texts) > 1:
        last = len(texts) - 1
        if bounds[at] != bounds[at + 1]:
            at += 1
            continue
        next_is_empty = at < last and bounds[at + 1] == bounds[at + 2]
        begin = max(at - 1, 0)
        end = 1 if at == 0 else at if at == last or next_is_empty else at + 1
        texts[begin : end + 1] = [" ".join(texts[begin : end + 1])]
        del bounds[begin + 1 : end + 1]
