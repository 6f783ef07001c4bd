"""Aligned words and units → one interleaved sample, by the rule of USDM's stage 2.

    W = words      N = units      S = N // 500 + 1 segments

A sample is `[bos]`, then every segment as text or as units, then perhaps `<|correspond|>` and the same
segment in the other modality, and `[eos]`. `<|continue|>` stands where a segment begins in another
modality than the one before ended in.

Every sample draws from a generator of its own, the same number of draws for the same N, so it depends
on nothing but (seed, epoch, utterance id). The original drew a fresh boundary for every candidate
while it looked for the nearest word; here a boundary is drawn once.
"""

from __future__ import annotations

import enum
import hashlib
import struct
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import NormalDist

import numpy as np

from usdm_megatron.corpora.alignment import WordSpan
from usdm_megatron.vocab import Vocabulary

UNITS_PER_SEGMENT = 500  # 10 s
_CUT_SIGMAS = 2.0  # the normal's std is half a segment, its cut a whole one
_NORMAL = NormalDist()
_LEAST_QUANTILE = _NORMAL.cdf(-_CUT_SIGMAS)


class Link(enum.Enum):
    """What stands between a run and the one before it."""

    NOTHING = enum.auto()  # the first run, or a segment that goes on in the same modality
    CONTINUE = enum.auto()
    CORRESPOND = enum.auto()


@dataclass(frozen=True, slots=True)
class Run:
    """The words `[first_word, end_word)` in one modality."""

    link: Link
    is_text: bool
    first_word: int
    end_word: int


@dataclass(frozen=True)
class Marks:
    """The ids that are no text and no unit, each as an int32 array of one."""

    bos: np.ndarray
    eos: np.ndarray
    before: dict[Link, tuple[np.ndarray, ...]]  # what a run begins with

    @classmethod
    def of(cls, vocabulary: Vocabulary) -> Marks:
        bos, eos, continued, corresponding = (
            np.array([token_id], dtype=np.int32)
            for token_id in (
                vocabulary.bos_id,
                vocabulary.eos_id,
                vocabulary.continue_id,
                vocabulary.correspond_id,
            )
        )
        before = {Link.NOTHING: (), Link.CONTINUE: (continued,), Link.CORRESPOND: (corresponding,)}
        return cls(bos, eos, before)


def sample_generator(seed: int, epoch: int, utterance_id: str) -> np.random.Generator:
    """The generator of one sample; `seed` and `epoch` are int64, `epoch` counts from 0."""
    key = hashlib.blake2b(utterance_id.encode(), digest_size=16, salt=struct.pack("<qq", seed, epoch))
    return np.random.Generator(np.random.Philox(key=np.frombuffer(key.digest(), dtype="<u8")))


def interleave(
    spans: Sequence[WordSpan],
    unit_ids: np.ndarray,
    encode_text: Callable[[str], Sequence[int] | np.ndarray],
    vocabulary: Vocabulary,
    rng: np.random.Generator,
) -> np.ndarray:
    """One sample, int32 token ids. `unit_ids` `[N]` are token ids; `encode_text` adds no bos."""
    starts = [*(span.start_unit for span in spans), spans[-1].end_unit]
    words = [span.text for span in spans]
    runs = draw_runs(starts, rng)
    texts = (np.asarray(encode_text(run_text(words, run)), dtype=np.int32) for run in runs if run.is_text)
    return np.concatenate(lay_out(runs, starts, unit_ids, texts, Marks.of(vocabulary)))


def draw_runs(starts: Sequence[int], rng: np.random.Generator) -> list[Run]:
    """Draw boundaries and modalities. `starts` `[W + 1]`: each word's first unit, and N; increasing.

    Boundaries that fall on one word, or on the ends of the utterance, leave fewer segments.
    """
    boundaries = starts[-1] // UNITS_PER_SEGMENT
    uniforms: list[float] = rng.random(boundaries + 2 * (boundaries + 1)).tolist()
    positions = boundary_positions(starts[-1], uniforms[:boundaries])
    cuts = sorted({0, len(starts) - 1, *(nearest_word(starts, position) for position in positions)})
    choices = iter(uniforms[boundaries:])
    runs: list[Run] = []
    for first_word, end_word in pairwise(cuts):
        is_text = next(choices) >= 0.5
        switches = bool(runs) and runs[-1].is_text != is_text
        runs.append(Run(Link.CONTINUE if switches else Link.NOTHING, is_text, first_word, end_word))
        if next(choices) >= 0.5:
            runs.append(Run(Link.CORRESPOND, not is_text, first_word, end_word))
    return runs


def boundary_positions(unit_count: int, uniforms: Sequence[float]) -> list[float]:
    """Where S - 1 segments end, in units: the even split moved by normals truncated at a segment.

    Mean N/S·k, std N/(2S), cut at ±N/S, by the inverse of the distribution function: exactly one of
    the S - 1 `uniforms` in [0, 1) each.
    """
    segment = unit_count / (len(uniforms) + 1)
    sigma = segment / _CUT_SIGMAS
    return [
        segment * number + sigma * _NORMAL.inv_cdf(_LEAST_QUANTILE + uniform * (1 - 2 * _LEAST_QUANTILE))
        for number, uniform in enumerate(uniforms, start=1)
    ]


def nearest_word(starts: Sequence[int], position: float) -> int:
    """Index of the start nearest to `position`, the lower one of two equally near."""
    above = bisect_left(starts, position)
    if above == 0:
        return 0
    if above == len(starts) or position - starts[above - 1] <= starts[above] - position:
        return above - 1
    return above


def run_text(words: Sequence[str], run: Run) -> str:
    """The text of a run."""
    return " ".join(words[run.first_word : run.end_word])


def lay_out(
    runs: Sequence[Run],
    starts: Sequence[int],
    unit_ids: np.ndarray,
    texts: Iterator[np.ndarray],
    marks: Marks,
) -> list[np.ndarray]:
    """The pieces of a sample, int32, to be concatenated; `texts` gives the ids of its text runs in order."""
    pieces = [marks.bos]
    for run in runs:
        pieces += marks.before[run.link]
        pieces.append(next(texts) if run.is_text else unit_ids[starts[run.first_word] : starts[run.end_word]])
    pieces.append(marks.eos)
    return pieces
