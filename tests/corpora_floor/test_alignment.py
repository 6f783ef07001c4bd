"""Word times become unit spans: golden cases, and what must hold of every utterance."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from usdm_megatron.corpora.alignment import Rejected, Word, WordSpan, align

GOLDEN = json.loads((Path(__file__).parent.parent / "data" / "alignment_golden.json").read_text())["cases"]


def words_of(case: dict) -> list[Word]:
    return [Word(word["text"], word["start"], word["end"]) for word in case["words"]]


def in_row(*durations_s: float, first: str = "a") -> list[Word]:
    """Words a, b, c, … one right after the other."""
    ends = [round(sum(durations_s[: n + 1]), 6) for n in range(len(durations_s))]
    return [Word(chr(ord(first) + n), start, end) for n, (start, end) in enumerate(pairwise([0.0, *ends]))]


def spans(*items: tuple[str, int, int]) -> tuple[WordSpan, ...]:
    return tuple(WordSpan(*item) for item in items)


# ── the original's own results ──


@pytest.mark.parametrize("case", GOLDEN)
def test_golden(case: dict) -> None:
    expected = tuple(WordSpan(**segment) for segment in case["segments"])
    assert align(words_of(case), case["units"]) == expected


@pytest.mark.parametrize("case", GOLDEN)
def test_silences_need_not_be_listed(case: dict) -> None:
    spoken = [word for word in words_of(case) if word.text]
    expected = tuple(WordSpan(**segment) for segment in case["segments"])
    assert align(spoken, case["units"], duration_s=case["words"][-1]["end"]) == expected


# ── words shorter than a unit ──


@pytest.mark.parametrize(
    ("durations_s", "merged"),
    [
        ((0.004, 0.2, 0.2, 0.2), spans(("a b", 0, 10), ("c", 10, 20), ("d", 20, 30))),
        ((0.004, 0.004, 0.2, 0.2, 0.2), spans(("a b c", 0, 10), ("d", 10, 20), ("e", 20, 30))),
        ((0.2, 0.2, 0.2, 0.004), spans(("a", 0, 10), ("b", 10, 20), ("c d", 20, 30))),
        ((0.2, 0.004, 0.2, 0.2, 0.2), spans(("a b c", 0, 20), ("d", 20, 30), ("e", 30, 40))),
        ((0.2, 0.002, 0.002, 0.2, 0.2, 0.2), spans(("a b c d", 0, 20), ("e", 20, 30), ("f", 30, 40))),
        ((0.2, 0.2, 0.002, 0.002, 0.2), "fewer_than_3_words"),
        ((0.2, 0.2, 0.2, 0.002, 0.002), spans(("a", 0, 10), ("b", 10, 20), ("c d e", 20, 30))),
    ],
)
def test_words_without_units_join_their_neighbours(
    durations_s: tuple[float, ...], merged: tuple[WordSpan, ...] | str
) -> None:
    words = in_row(*durations_s)
    count = round(words[-1].end_s * 50)
    if isinstance(merged, str):
        with pytest.raises(Rejected) as caught:
            align(words, count)
        assert caught.value.reason == merged
    else:
        assert align(words, count) == merged


# ── every utterance ──


@st.composite
def utterances(draw: st.DrawFn) -> tuple[list[Word], int]:
    """Words of 10 ms to 600 ms with silences listed, one or two of them, or left out."""
    now = draw(st.integers(0, 40))
    words: list[Word] = [Word("", 0.0, now / 100)] if now and draw(st.booleans()) else []
    for number in range(draw(st.integers(3, 25))):
        end = now + draw(st.integers(1, 60) | st.integers(1, 2))
        words.append(Word(f"w{number}", now / 100, end / 100))
        now = end
        for _ in range(draw(st.sampled_from([0, 0, 1, 2]))):
            end = now + draw(st.integers(1, 50))
            if draw(st.booleans()):
                words.append(Word(draw(st.sampled_from(["", " "])), now / 100, end / 100))
            now = end
    return words, math.ceil(now / 2) - draw(st.integers(0, 1))


def shared_out(words: list[Word], total_s: float) -> list[float]:
    """The times at which one word gives way to the next, not rounded, and both ends."""
    spoken = [word for word in words if word.text.strip()]
    middles = [(before.end_s + after.start_s) / 2 for before, after in pairwise(spoken)]
    return [0.0, *middles, total_s]


@settings(deadline=None)
@given(utterances())
def test_spans_follow_one_another_and_keep_every_word(drawn: tuple[list[Word], int]) -> None:
    words, count = drawn
    total_s = max(count / 50, words[-1].end_s)
    bounds_s = shared_out(words, total_s)
    try:
        found = align(words, count)
    except Rejected as rejected:
        assert rejected.reason == "fewer_than_3_words"
        return
    assert (found[0].start_unit, found[-1].end_unit) == (0, count)
    assert all(before.end_unit == after.start_unit for before, after in pairwise(found))
    assert all(span.start_unit < span.end_unit for span in found)
    texts = " ".join(span.text for span in found).split(" ")
    assert texts == [word.text for word in words if word.text.strip()]
    first_words = [0]
    for span in found:
        first_words.append(first_words[-1] + len(span.text.split(" ")))
    for span, first_word in zip(found, first_words, strict=False):  # 10 ms of rounding, and half a unit
        assert abs(span.start_unit - bounds_s[first_word] * count / total_s) <= 0.005 * 50 + 0.5 + 1e-6


@settings(deadline=None)
@given(utterances())
def test_listed_silences_change_nothing(drawn: tuple[list[Word], int]) -> None:
    words, count = drawn
    spoken = [word for word in words if word.text.strip()]
    total_s = max(count / 50, words[-1].end_s)

    def outcome(some: list[Word]) -> object:
        try:
            return align(some, count, duration_s=total_s)
        except Rejected as rejected:
            return rejected.reason

    assert outcome(words) == outcome(spoken)


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.text("ab ", max_size=2), st.floats(), st.floats()), max_size=6),
    st.integers(0, 400),
    st.none() | st.floats(),
)
def test_any_times_are_aligned_or_rejected(
    drawn: list[tuple[str, float, float]], count: int, duration_s: float | None
) -> None:
    try:
        found = align([Word(*word) for word in drawn], count, duration_s=duration_s)
    except Rejected as rejected:
        assert rejected.detail
    else:
        assert found[-1].end_unit == count


@settings(deadline=None)
@given(st.lists(st.integers(1, 4000), min_size=6, max_size=30))
def test_times_finer_than_10_ms_stay_in_order(steps: list[int]) -> None:
    times = [sum(steps[:n]) / 1e4 for n in range(1, len(steps) + 1)]
    words = [Word("w", start, end) for start, end in zip(times[::2], times[1::2], strict=False)]
    try:
        found = align(words, max(1, round(times[-1] * 50)))
    except Rejected as rejected:
        assert rejected.reason == "fewer_than_3_words"
    else:
        assert all(span.start_unit < span.end_unit for span in found)


def test_the_middle_of_a_silence_is_rounded_to_10_ms() -> None:
    """0.495 s is 24.75 units; the original's 0.49 s is 24.5, and half rounds to even."""
    words = [Word("a", 0, 0.48), Word("b", 0.51, 0.9), Word("c", 0.9, 1.2)]
    assert align(words, 60) == spans(("a", 0, 24), ("b", 24, 45), ("c", 45, 60))


def test_float_noise_is_no_silence() -> None:
    """Else the bound of 0.385 s would be rounded to 0.39 s, one unit later."""
    words = in_row(0.2, 0.185, 0.3, 0.315)
    noisy = [*words[:2], Word("c", 0.385 + 1e-12, 0.685), Word("d", 0.685 - 1e-12, 1.0)]
    expected = spans(("a", 0, 10), ("b", 10, 19), ("c", 19, 34), ("d", 34, 50))
    assert align(words, 50) == align(noisy, 50) == expected


# ── what is rejected ──

FINE = in_row(0.4, 0.4, 0.4, 0.4)
TEN_SECONDS = [Word(word.text, word.start_s * 6.25, word.end_s * 6.25) for word in FINE]


@pytest.mark.parametrize(
    ("words", "count", "duration_s", "reason", "detail"),
    [
        ([], 80, None, "fewer_than_3_words", "0 words"),
        (FINE[:2], 40, None, "fewer_than_3_words", "2 words"),
        ([*FINE[:2], Word("", 0.8, 1.6)], 80, None, "fewer_than_3_words", "2 words"),
        (FINE, 0, None, "units_missing", "no units"),
        ([FINE[1], FINE[0], *FINE[2:]], 80, None, "times_not_increasing", "word 1 ('a') is from 0.0 s"),
        ([*FINE[:3], Word("d", 1.2, 1.2)], 80, None, "times_not_increasing", "word 3"),
        ([*FINE[:3], Word("d", 1.1, 1.6)], 80, None, "times_not_increasing", "after 1.2 s"),
        ([Word("z", -0.1, 0.4), *FINE[1:]], 80, None, "times_not_increasing", "from -0.1 s"),
        ([*FINE[:3], Word("d", 1.2, math.inf)], 80, None, "times_not_increasing", "inf"),
        ([*FINE[:3], Word("d", math.nan, 1.6)], 80, None, "times_not_increasing", "nan"),
        (FINE, 40, None, "units_do_not_fit_duration", "40 units in 1.6 s, expected about 80"),
        (FINE, 80, 4.0, "units_do_not_fit_duration", "expected about 200"),
        (
            FINE,
            80 * 50,
            None,
            "units_do_not_fit_duration",
            "units last 80 s, words 1.6 s: state",
        ),
        (FINE, 181, None, "units_do_not_fit_duration", "units last 3.62 s"),  # 2 s of silence and a unit
        (TEN_SECONDS, 1001, None, "units_do_not_fit_duration", "units last 20.02 s, words 10 s"),
        (TEN_SECONDS, 751, None, "units_do_not_fit_duration", "units last 15.02 s, words 10 s"),
        (FINE, 80, math.inf, "units_do_not_fit_duration", "inf"),
        (FINE, 80, math.nan, "units_do_not_fit_duration", "nan"),
    ],
)
def test_rejections(
    words: list[Word], count: int, duration_s: float | None, reason: str, detail: str
) -> None:
    with pytest.raises(Rejected) as caught:
        align(words, count, duration_s=duration_s)
    assert caught.value.reason == reason
    assert detail in caught.value.detail


def test_other_unit_rates() -> None:
    assert align(FINE, 40, units_per_second=25) == spans(
        ("a", 0, 10), ("b", 10, 20), ("c", 20, 30), ("d", 30, 40)
    )
    with pytest.raises(Rejected, match="units last 20 s, words 10 s"):  # 50 a second in truth
        align(TEN_SECONDS, 500, units_per_second=25)
    for words, most in ((FINE, 180), (TEN_SECONDS, 750)):  # silence behind the words
        assert align(words, most)[-1].end_unit == most
    silence = Word("", 10.0, 20.0)  # one that is listed is as long as it likes
    assert align([*TEN_SECONDS, silence], 1000) == align(TEN_SECONDS, 1000, duration_s=20.0)
    assert align(FINE, 100)[-1] == WordSpan("d", 60, 100)  # nothing after 1.6 s is said: 2 s by the units
