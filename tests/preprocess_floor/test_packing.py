"""Packing: every sample once, no row too full, as few rows as the textbook's, mixed, and always the same."""

from __future__ import annotations

import itertools
from typing import get_args

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from usdm_megatron.errors import ConfigError, DataError
from usdm_megatron.preprocess.packing import Packing, PackingMethod, best_fit_decreasing, pack

METHODS: tuple[PackingMethod, ...] = get_args(PackingMethod)


def rows_of(packing: Packing) -> list[list[int]]:
    return [packing.order[a:b].tolist() for a, b in itertools.pairwise(packing.row_starts.tolist())]


def check_valid(packing: Packing, lengths: np.ndarray, capacity: int) -> None:
    assert packing.order.dtype == packing.row_starts.dtype == np.int64
    assert sorted(packing.order.tolist()) == list(range(len(lengths)))
    rows = rows_of(packing)
    assert packing.rows == len(rows) and all(rows)
    assert sum(map(len, rows)) == len(lengths)
    tokens = [int(lengths[row].sum()) for row in rows]
    assert max(tokens, default=0) <= capacity
    assert packing.row_tokens(lengths).tolist() == tokens


def textbook_best_fit(lengths: list[int], capacity: int, room: list[int]) -> list[int]:
    """One sample at a time into the fullest row that still holds it; the room that every row has left."""
    room = list(room)
    for length in sorted(lengths, reverse=True):
        holds = [row for row in range(len(room)) if room[row] >= length]
        if holds:
            room[min(holds, key=room.__getitem__)] -= length
        else:
            room.append(capacity - length)
    return room


def fewest_rows(lengths: list[int], capacity: int) -> int:
    """By trying every assignment, the longest sample first, never two rows with equal room."""

    def fits(position: int, room: tuple[int, ...]) -> bool:
        if position == len(longest_first):
            return True
        length = longest_first[position]
        choices = {left: row for row, left in enumerate(room) if left >= length}
        return any(
            fits(position + 1, (*room[:row], left - length, *room[row + 1 :]))
            for left, row in choices.items()
        )

    longest_first = sorted(lengths, reverse=True)
    return next(rows for rows in itertools.count(1) if fits(0, (capacity,) * rows))


def plain_next_fit(lengths: list[int], capacity: int) -> list[int]:
    starts, used = [], capacity + 1
    for sample, length in enumerate(lengths):
        if used + length > capacity:
            starts.append(sample)
            used = 0
        used += length
    return starts


def speech_like(samples: int, mean: float = 600, sigma: float = 0.75) -> np.ndarray:
    log_mean = np.log(mean) - sigma**2 / 2
    return np.random.default_rng(0).lognormal(log_mean, sigma, samples).astype(np.int64).clip(1, 8192)


@st.composite
def cases(draw: st.DrawFn, most: int = 60) -> tuple[np.ndarray, int]:
    capacity = draw(st.integers(1, 40))
    lengths = draw(st.lists(st.integers(1, capacity), min_size=1, max_size=most))
    return np.array(lengths), capacity


@given(cases(), st.sampled_from(METHODS), st.integers(0, 2), st.data())
def test_every_sample_once_no_row_too_full_and_no_two_groups_in_a_row(
    case: tuple[np.ndarray, int], method: PackingMethod, seed: int, data: st.DataObject
) -> None:
    lengths, capacity = case
    groups = np.array(data.draw(st.lists(st.integers(0, 3), min_size=len(lengths), max_size=len(lengths))))
    packing = pack(lengths, capacity, method=method, groups=groups.astype(np.int32), seed=seed)
    check_valid(packing, lengths, capacity)
    group_of_row = [set(groups[row].tolist()) for row in rows_of(packing)]
    assert all(len(found) == 1 for found in group_of_row)
    in_order = [found.pop() for found in group_of_row]
    assert in_order == sorted(in_order)


@given(cases(), st.data())
def test_bulk_best_fit_leaves_what_the_textbooks_leaves(
    case: tuple[np.ndarray, int], data: st.DataObject
) -> None:
    lengths, capacity = case
    room = data.draw(st.lists(st.integers(0, capacity), max_size=12))
    longest_first = np.sort(lengths)[::-1].copy()
    found = best_fit_decreasing(longest_first, capacity, np.array(room, dtype=np.int64))
    used = np.bincount(found.row_of_sample, weights=longest_first, minlength=found.rows)
    left = np.array(room + [capacity] * (found.rows - len(room))) - used
    assert sorted(left.tolist()) == sorted(textbook_best_fit(lengths.tolist(), capacity, room))


def test_bulk_best_fit_equals_the_textbooks_on_speech_like_lengths() -> None:
    lengths = np.sort(speech_like(3000))[::-1].copy()
    found = best_fit_decreasing(lengths, 8192)
    used = np.bincount(found.row_of_sample, weights=lengths)
    assert sorted((8192 - used).tolist()) == sorted(textbook_best_fit(lengths.tolist(), 8192, []))


@given(cases(), st.integers(0, 2))
def test_best_fit_needs_no_more_rows_than_the_textbook(case: tuple[np.ndarray, int], seed: int) -> None:
    lengths, capacity = case
    assert pack(lengths, capacity, seed=seed).rows <= len(textbook_best_fit(lengths.tolist(), capacity, []))


@given(cases(most=9))
def test_best_fit_is_near_the_fewest_rows(case: tuple[np.ndarray, int]) -> None:
    lengths, capacity = case
    fewest = fewest_rows(lengths.tolist(), capacity)
    assert fewest <= pack(lengths, capacity).rows <= 11 / 9 * fewest + 1


@pytest.mark.parametrize("sigma", [0.5, 0.75, 1.0])
def test_speech_like_rows_are_full_and_mixed(sigma: float) -> None:
    lengths = speech_like(200_000, sigma=sigma)
    packing = pack(lengths, 8192)
    assert np.bincount(packing.order, minlength=len(lengths)).tolist() == [1] * len(lengths)
    row_tokens = packing.row_tokens(lengths)
    assert row_tokens.max() <= 8192
    assert lengths.sum() / (packing.rows * 8192) >= 0.995
    samples_in_row = np.diff(packing.row_starts)
    in_order = lengths[packing.order]
    inside_rows = (in_order - np.repeat(row_tokens / samples_in_row, samples_in_row)).var()
    assert inside_rows >= 0.6 * lengths.var()  # best-fit-decreasing alone: 0.12
    # Neither rows nor the samples in them are in any order of length.
    half = packing.rows // 2
    mean_length = row_tokens / samples_in_row
    assert mean_length[:half].mean() == pytest.approx(mean_length[half:].mean(), rel=0.02)
    first, last = in_order[packing.row_starts[:-1]], in_order[packing.row_starts[1:] - 1]
    assert first.mean() == pytest.approx(last.mean(), rel=0.05)


@pytest.mark.parametrize("shape", ["uniform", "two lengths", "long", "all equal"])
def test_other_lengths_cost_at_most_a_thousandth_more_rows_than_best_fit_decreasing(shape: str) -> None:
    generator = np.random.default_rng(0)
    lengths = {
        "uniform": generator.integers(1, 8193, 50_000),
        "two lengths": np.where(generator.random(50_000) < 0.02, 7000, 100),
        "long": generator.integers(3000, 5000, 50_000),
        "all equal": np.full(50_000, 700),
    }[shape]
    decreasing = best_fit_decreasing(np.sort(lengths)[::-1].copy(), 8192).rows
    assert pack(lengths, 8192).rows <= decreasing * 1.001


@given(cases(), st.integers(0, 2))
def test_next_fit_closes_rows_as_a_plain_loop_does(case: tuple[np.ndarray, int], seed: int) -> None:
    lengths, capacity = case
    packing = pack(lengths, capacity, method="next-fit", seed=seed)
    expected = plain_next_fit(lengths[packing.order].tolist(), capacity)
    assert packing.row_starts.tolist() == [*expected, len(lengths)]


def test_no_packing_is_a_sample_a_row_in_shuffled_order() -> None:
    packing = pack(np.full(100, 3), 8, method="none")
    assert packing.row_starts.tolist() == list(range(101))
    assert sorted(packing.order.tolist()) == list(range(100)) != packing.order.tolist()


@pytest.mark.parametrize("method", METHODS)
def test_the_same_input_gives_the_same_rows_and_another_seed_others(method: PackingMethod) -> None:
    lengths = speech_like(2000)
    groups = np.arange(2000) % 2

    def order(**changes: object) -> list[int]:
        options = {"lengths": lengths, "capacity": 8192, "groups": groups, "seed": 1} | changes
        return pack(**options, method=method).order.tolist()  # type: ignore[arg-type]  # a parameter

    assert order() == order() == order(lengths=lengths.astype(np.uint16), groups=groups.astype(np.int8))
    assert order() == order(lengths=lengths.astype(">i4"))
    assert order() != order(seed=2)
    # Epochs are shuffled apart from each other: the same utterances do not meet again.
    twice = pack(np.tile(lengths, 2), 8192, method=method, groups=np.repeat([0, 1], 2000)).order
    assert (twice[2000:] - 2000).tolist() != twice[:2000].tolist()


def test_packed_order_is_frozen() -> None:
    """Golden: a rerun of a preprocessing must give the same bytes under any later version."""
    lengths = np.array([5, 3, 8, 1, 2, 7, 4, 4, 6, 2])
    groups = np.array([0, 0, 0, 0, 0, 1, 1, 1, 1, 1])
    assert [rows_of(pack(lengths, 8, method=method, groups=groups)) for method in METHODS] == GOLDEN_ROWS


GOLDEN_ROWS = [
    [[0], [4, 3, 1], [2], [6, 7], [8, 9], [5]],
    [[4, 1, 3], [0], [2], [6, 7], [8], [5], [9]],
    [[4], [1], [3], [0], [2], [6], [7], [8], [5], [9]],
]


@pytest.mark.parametrize("method", METHODS)
def test_edges(method: PackingMethod) -> None:
    assert rows_of(pack(np.array([8]), 8, method=method)) == [[0]]
    assert pack(np.full(5, 8), 8, method=method).rows == 5
    assert pack(np.full(10, 3), 8, method=method).rows == (10 if method == "none" else 5)
    assert pack(np.full(7, 1), 1, method=method).rows == 7
    empty = pack(np.empty(0, dtype=np.int64), 8, method=method)
    assert (empty.rows, len(empty.order)) == (0, 0)
    assert empty.row_tokens(np.empty(0, dtype=np.int64)).tolist() == []


def test_samples_that_cannot_be_packed_are_refused_together() -> None:
    with pytest.raises(DataError) as caught:
        pack(np.array([4, 0, 9, -2, 11]), 8)
    too_long, empty = caught.value.problems
    assert "2 of 5 samples are longer than a row of 8 tokens (the longest, index 4, has 11)" in too_long
    assert "2 of 5 samples hold no token (the first at index 1)" in empty


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"capacity": 0}, ConfigError, "row capacity is 0, the least is 1"),
        ({"seed": -1}, ConfigError, "seed is -1, the least is 0"),
        ({"lengths": np.array([1.5])}, ValueError, "lengths are float64"),
        ({"lengths": np.array([[1]])}, ValueError, r"\[1, 1\], not integers \[n\]"),
        ({"groups": np.array([0])}, ValueError, r"groups are int64 \[1\] for 2 samples"),
        ({"groups": np.array([0, -1])}, ValueError, "group -1: groups are counted from 0"),
        ({"method": "worst-fit"}, ValueError, "'worst-fit' is none of best-fit, next-fit, none"),
    ],
)
def test_impossible_calls(changes: dict[str, object], error: type[Exception], message: str) -> None:
    options: dict[str, object] = {"lengths": np.array([1, 2]), "capacity": 8}
    with pytest.raises(error, match=message):
        pack(**(options | changes))  # type: ignore[arg-type]  # wrong on purpose
