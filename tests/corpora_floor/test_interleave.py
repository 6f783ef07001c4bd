"""Interleaved samples: the grammar, every sample read back as its utterance, and the distributions."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from usdm_megatron.corpora.alignment import WordSpan
from usdm_megatron.corpora.interleave import (
    Link,
    boundary_positions,
    draw_runs,
    interleave,
    nearest_word,
    sample_generator,
)
from usdm_megatron.vocab import Vocabulary

VOCABULARY = Vocabulary(text_size=1000, unit_count=54_000)  # of 60 words of 900 units
FIRST_WORD_ID = 10  # word k of an utterance is encoded as the ids 10 + 2k, 11 + 2k


def utterance(word_units: list[int]) -> tuple[list[WordSpan], np.ndarray]:
    """Words w0, w1, … of so many units each; unit n of the utterance is unit number n."""
    starts = np.cumsum([0, *word_units]).tolist()
    spans = [WordSpan(f"w{number}", *span) for number, span in enumerate(pairwise(starts))]
    return spans, np.arange(starts[-1], dtype=np.int32) + VOCABULARY.first_unit_id


def encode(text: str) -> list[int]:
    numbers = [int(word[1:]) for word in text.split(" ")]
    return [FIRST_WORD_ID + 2 * number + half for number in numbers for half in (0, 1)]


@dataclass(frozen=True)
class ReadRun:
    """A stretch of one modality as a reader finds it; it may hold several segments."""

    link: int | None  # the id before it
    is_text: bool
    first_word: int
    end_word: int


def read_back(sample: np.ndarray, spans: list[WordSpan]) -> list[ReadRun]:
    """Parse ids alone; fails where they are not whole words in order."""
    ids = sample.tolist()
    assert (ids[0], ids[-1]) == (VOCABULARY.bos_id, VOCABULARY.eos_id)
    first_unit_of = {span.start_unit: number for number, span in enumerate(spans)}
    first_unit_of[spans[-1].end_unit] = len(spans)
    runs = []
    link: int | None = None
    at = 1
    while at < len(ids) - 1:
        if ids[at] in (VOCABULARY.continue_id, VOCABULARY.correspond_id):
            link = ids[at]
            at += 1
        is_text = ids[at] < VOCABULARY.text_size
        lowest = FIRST_WORD_ID if is_text else VOCABULARY.first_unit_id
        end = at
        while lowest <= ids[end] < (VOCABULARY.text_size if is_text else VOCABULARY.pad_id):
            end += 1
        first, last = ids[at] - lowest, ids[end - 1] - lowest
        assert ids[at:end] == list(range(ids[at], ids[end - 1] + 1))
        if is_text:
            assert (first % 2, last % 2) == (0, 1)
            runs.append(ReadRun(link, True, first // 2, last // 2 + 1))
        else:
            runs.append(ReadRun(link, False, first_unit_of[first], first_unit_of[last + 1]))
        link, at = None, end
    return runs


@settings(deadline=None)
@given(st.lists(st.integers(1, 60) | st.integers(1, 900), min_size=3, max_size=60), st.integers(0, 2**32))
def test_every_sample_reads_back_as_its_utterance(word_units: list[int], seed: int) -> None:
    spans, unit_ids = utterance(word_units)
    sample = interleave(spans, unit_ids, encode, VOCABULARY, sample_generator(seed, 0, "u"))
    assert sample.dtype == np.int32
    runs = read_back(sample, spans)
    assert runs[0].link is None
    said = 0  # words so far, in one modality at least
    for before, run in pairwise([None, *runs]):
        if run.link == VOCABULARY.correspond_id:
            # The last segment again in the other modality, which the next segment may go on in.
            assert before is not None and run.is_text != before.is_text
            assert before.first_word <= run.first_word < said == before.end_word <= run.end_word
            said = run.end_word
            continue
        assert run.first_word == said < run.end_word
        said = run.end_word
        if before is not None:
            assert run.link == VOCABULARY.continue_id  # else it were one run with the one before
            assert run.is_text != before.is_text
    assert said == len(spans)


@settings(deadline=None)
@given(st.lists(st.integers(1, 300), min_size=3, max_size=80), st.integers(0, 2**32))
def test_segments_come_once_and_are_never_empty(word_units: list[int], seed: int) -> None:
    starts = np.cumsum([0, *word_units]).tolist()
    runs = draw_runs(starts, sample_generator(seed, 0, "u"))
    segments = [(run.first_word, run.end_word) for run in runs if run.link is not Link.CORRESPOND]
    assert segments[0][0] == 0 and segments[-1][1] == len(word_units)
    assert all(first < end for first, end in segments)
    assert all(before[1] == after[0] for before, after in pairwise(segments))
    assert len(segments) <= starts[-1] // 500 + 1
    for before, run in pairwise(runs):
        switches = run.is_text != before.is_text
        if run.link is Link.CORRESPOND:
            assert switches and (run.first_word, run.end_word) == (before.first_word, before.end_word)
            assert before.link is not Link.CORRESPOND
        else:
            assert run.link is (Link.CONTINUE if switches else Link.NOTHING)


@pytest.mark.parametrize(("units", "segments"), [(3, 1), (499, 1), (500, 2), (999, 2), (1000, 3), (2600, 6)])
def test_a_segment_every_500_units(units: int, segments: int) -> None:
    most = max(
        sum(
            run.link is not Link.CORRESPOND
            for run in draw_runs(range(units + 1), sample_generator(0, n, "u"))
        )
        for n in range(20)
    )
    assert most == segments


def test_boundaries_on_one_word_leave_fewer_segments() -> None:
    """All of 2,600 units but the ends are one word: six segments can only be cut around it."""
    for epoch in range(200):
        runs = draw_runs([0, 2, 2598, 2600], sample_generator(0, epoch, "u"))
        segments = [run for run in runs if run.link is not Link.CORRESPOND]
        assert 1 <= len(segments) <= 3


@given(
    st.sets(st.integers(1, 200), min_size=2), st.floats(-10, 210) | st.integers(0, 400).map(lambda n: n / 2)
)
def test_nearest_word_against_brute_force(some: set[int], position: float) -> None:
    starts = [0, *sorted(some)]
    expected = min(range(len(starts)), key=lambda number: abs(starts[number] - position))
    assert nearest_word(starts, position) == expected


# ── distributions ──


def truncated_normal_cdf(x: np.ndarray, mean: float, std: float, cut: float) -> np.ndarray:
    """From the definition, by the error function."""

    def below(value: float) -> float:
        return 0.5 * (1 + math.erf((min(max(value, mean - cut), mean + cut) - mean) / (std * math.sqrt(2))))

    low, high = below(mean - cut), below(mean + cut)
    return np.array([(below(value) - low) / (high - low) for value in x])


def ks_distance(found: np.ndarray, mean: float, std: float, cut: float) -> float:
    found = np.sort(found)
    expected = truncated_normal_cdf(found, mean, std, cut)
    ranks = np.arange(len(found) + 1) / len(found)
    return float(max(np.max(ranks[1:] - expected), np.max(expected - ranks[:-1])))


@pytest.mark.parametrize(("unit_count", "segments"), [(731, 2), (1499, 3), (2600, 6)])
def test_boundaries_are_truncated_normals(unit_count: int, segments: int) -> None:
    uniforms = np.random.default_rng(unit_count).random((20_000, segments - 1))
    drawn = np.array([boundary_positions(unit_count, row) for row in uniforms])
    even = unit_count / segments
    for k in range(1, segments):
        distance = ks_distance(drawn[:, k - 1], mean=even * k, std=even / 2, cut=even)
        assert distance < 1.63 / math.sqrt(len(drawn))  # 1 % level
        assert distance > 0  # the oracle is not the code
        wrong = ks_distance(drawn[:, k - 1], mean=even * k, std=even / 2, cut=10 * even)
        assert wrong > 2.5 / math.sqrt(len(drawn))  # the test sees that the cut is there
    assert np.abs(np.atleast_2d(np.corrcoef(drawn.T))[np.triu_indices(segments - 1, 1)]).max(initial=0) < 0.03


def test_cuts_follow_the_same_distribution() -> None:
    """From generator to word: a word every unit, so that the nearest one is half a unit away at most."""
    unit_count, draws = 900, 5_000
    cuts = []
    for epoch in range(draws):
        runs = draw_runs(range(unit_count + 1), sample_generator(3, epoch, "utterance"))
        cuts.append(runs[0].end_word)  # the whole utterance where the boundary fell on its end
    half_a_unit = 0.5 * truncated_normal_cdf(np.array([451.0]), 450, 225, 450)[0] / 225
    distance = ks_distance(np.array(cuts), mean=450, std=225, cut=450)
    assert distance < 1.63 / math.sqrt(draws) + half_a_unit


def test_boundaries_reach_their_cuts_and_no_further() -> None:
    least, most = boundary_positions(900, [0.0])[0], boundary_positions(900, [math.nextafter(1, 0)])[0]
    assert (least, most) == pytest.approx((0, 900), abs=1e-6)


def test_choices_are_fair_and_independent() -> None:
    draws = 6_000
    counts = np.zeros((2, 2), dtype=int)  # first segment text, corresponding
    second = np.zeros((2, 2), dtype=int)  # first segment text, second text
    for epoch in range(draws):
        runs = draw_runs([0, 300, 310, 600], sample_generator(11, epoch, "fair"))
        corresponds = len(runs) > 1 and runs[1].link is Link.CORRESPOND
        counts[int(runs[0].is_text), int(corresponds)] += 1
        segments = [run for run in runs if run.link is not Link.CORRESPOND]
        if len(segments) > 1:
            second[int(segments[0].is_text), int(segments[1].is_text)] += 1
    for table in (counts, second):
        total = table.sum()
        assert total > draws / 2
        four_sigma = 4 * math.sqrt(total * 0.25 * 0.75)
        assert np.abs(table - total / 4).max() < four_sigma


# ── generators ──


def test_a_generator_for_every_seed_epoch_and_utterance() -> None:
    keys = [(seed, epoch, name) for seed in (0, 1, 2**40) for epoch in (0, 1) for name in ("a", "b", "ä/1")]
    first = {key: sample_generator(*key).random(3).tolist() for key in keys}
    assert len({tuple(draws) for draws in first.values()}) == len(keys)
    assert all(sample_generator(*key).random(3).tolist() == draws for key, draws in first.items())


def test_draws_are_the_same_on_every_machine() -> None:
    """Pinned: another numpy that draws otherwise would change every corpus without a word."""
    draws = sample_generator(42, 3, "84/121123/84_121123_000007").random(2).tolist()
    assert draws == [0.6276382581134023, 0.8820342335441753]


def test_a_sample_by_hand() -> None:
    spans, unit_ids = utterance([200, 200, 200])

    class Draws:
        def random(self, count: int) -> np.ndarray:
            assert count == 5  # a boundary, and two choices for either segment
            return np.array([0.5, 0.9, 0.9, 0.9, 0.1])

    sample = interleave(spans, unit_ids, encode, VOCABULARY, Draws())  # type: ignore[arg-type]  # a stand-in
    u = VOCABULARY.first_unit_id
    # The boundary at 300 is as near to 200 as to 400: the lower one. Text and units, then text alone.
    assert sample.tolist() == [
        *(VOCABULARY.bos_id, 10, 11, VOCABULARY.correspond_id, *range(u, u + 200)),
        *(VOCABULARY.continue_id, 12, 13, 14, 15, VOCABULARY.eos_id),
    ]
