"""Which samples share a row, from their lengths alone, and in which order the rows are written.

Everything here is a pure function of lengths, groups, capacity, method and seed. Random numbers are raw
PCG64 draws, whose stream numpy promises for ever (NEP 19): the same input gives the same rows anywhere.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import numpy as np

from usdm_megatron.errors import ConfigError, DataError

PackingMethod = Literal["best-fit", "next-fit", "none"]

# Best-fit-decreasing alone opens rows with equally long samples: the variance of lengths inside a row is
# 12 % of that of all lengths. Packing within windows of shuffled samples hardly changes that (14 to 30 % in
# windows of 200, at 96 % fill). So the first samples in shuffled order begin rows, and best fit completes
# these with the others: 65 to 85 %, where rows at random have 80 to 90 %, at the same fill.
_BEGINNING_SHARE_OF_SAMPLES = 0.65
_BEGINNING_SHARE_OF_ROW = 0.75  # leaves less room than the other samples need: no begun row stays unfinished
# Long samples are short of partners if rows begin without a choice. Where beginning rows so would cost more
# than one row in a thousand, plain best-fit-decreasing is taken (its rows are then mixed anyway).
_EXTRA_ROWS_DIVISOR = 1000

_KEY_BITS = 63  # of an int64 that is at least 0


@dataclass(frozen=True)
class Packing:
    """Samples in the order in which they are written, cut into rows: n samples, r rows."""

    order: np.ndarray  # int64 [n], sample indices, each exactly once, row after row
    row_starts: np.ndarray  # int64 [r + 1], row k holds order[row_starts[k] : row_starts[k + 1]]

    @property
    def rows(self) -> int:
        return len(self.row_starts) - 1

    def row_tokens(self, lengths: np.ndarray) -> np.ndarray:
        """Tokens in each row, int64 `[r]`."""
        ends = np.concatenate([[0], np.cumsum(lengths[self.order], dtype=np.int64)])
        return np.diff(ends[self.row_starts])


def pack(
    lengths: np.ndarray,
    capacity: int,
    *,
    method: PackingMethod = "best-fit",
    groups: np.ndarray | None = None,
    seed: int = 42,
) -> Packing:
    """Lay samples into rows of at most `capacity` tokens.

    `lengths` int `[n]`, tokens of each sample; `groups` int `[n]`, counted from 0: samples of different
    groups (epochs) never share a row, so that an utterance occurs at most once in it. All rows of group 0
    come first, then those of group 1: training reads rows once and in order, and so goes through each
    epoch. (The original shuffles all epochs together: there an utterance may meet itself in a row.)

    `best-fit`: never more than a thousandth more rows than best-fit-decreasing, never more at all below
    1,000 rows; rows and the samples in them are shuffled. `next-fit`: the original's: samples in shuffled
    order, a row ends before the sample that no longer fits. `none`: a sample a row, shuffled.

    O(n log n) time, about 60 bytes of memory a sample. No samples give no rows. Raises `DataError` for
    samples that are empty or longer than a row.
    """
    if method not in get_args(PackingMethod):
        raise ValueError(f"packing method {method!r} is none of {', '.join(get_args(PackingMethod))}")
    _check(lengths, capacity, groups, seed)
    order = np.empty(len(lengths), dtype=np.int64)
    row_starts = [np.zeros(1, dtype=np.int64)]
    begin = 0
    for group, samples in _samples_of_groups(groups, len(lengths)):
        draws = np.random.PCG64(np.random.SeedSequence([seed, group]))
        packing = _pack_group(samples, lengths, capacity, method, draws)
        order[begin : begin + len(samples)] = packing.order
        row_starts.append(packing.row_starts[1:] + begin)
        begin += len(samples)
    return Packing(order, np.concatenate(row_starts))


def _check(lengths: np.ndarray, capacity: int, groups: np.ndarray | None, seed: int) -> None:
    if lengths.ndim != 1 or lengths.dtype.kind not in "iu":
        raise ValueError(f"lengths are {lengths.dtype} {list(lengths.shape)}, not integers [n]")
    if groups is not None and (groups.shape != lengths.shape or groups.dtype.kind not in "iu"):
        raise ValueError(f"groups are {groups.dtype} {list(groups.shape)} for {len(lengths)} samples")
    if groups is not None and len(groups) and groups.min() < 0:
        raise ValueError(f"group {groups.min()}: groups are counted from 0")
    names = (("row capacity", capacity, 1), ("seed", seed, 0))
    wrong = [
        f"packing: {name} is {value}, the least is {least}" for name, value, least in names if value < least
    ]
    if wrong:
        raise ConfigError(*wrong)
    problems = []
    if too_long := np.count_nonzero(lengths > capacity):
        longest = int(lengths.argmax())
        problems.append(
            f"packing: {too_long} of {len(lengths)} samples are longer than a row of {capacity} tokens "
            f"(the longest, index {longest}, has {lengths[longest]}); leave them out or make the rows longer"
        )
    if empty := np.count_nonzero(lengths < 1):
        first = int((lengths < 1).argmax())
        problems.append(
            f"packing: {empty} of {len(lengths)} samples hold no token (the first at index {first}); "
            "leave them out"
        )
    if problems:
        raise DataError(*problems)


def _samples_of_groups(groups: np.ndarray | None, samples: int) -> Iterator[tuple[int, np.ndarray]]:
    """Each group, ascending, with the indices of its samples."""
    in_order = np.arange(samples, dtype=np.int64)
    if groups is None:
        yield 0, in_order
        return
    by_group = _sort_by(groups.astype(np.int64), in_order)
    for begin, end in _runs(groups[by_group]):
        yield int(groups[by_group[begin]]), by_group[begin:end]


def _pack_group(
    samples: np.ndarray, lengths: np.ndarray, capacity: int, method: PackingMethod, draws: np.random.PCG64
) -> Packing:
    samples = _shuffled(samples, draws)
    lengths = lengths[samples].astype(np.int64, copy=False)
    if method == "none":
        return Packing(samples, np.arange(len(samples) + 1, dtype=np.int64))
    if method == "next-fit":
        return Packing(samples, _next_fit(lengths, capacity))
    assignment = _best_fit(lengths, capacity)
    row = _shuffled(np.arange(assignment.rows, dtype=np.int64), draws)[assignment.row_of_sample]
    row_starts = np.concatenate([[0], np.cumsum(np.bincount(row, minlength=assignment.rows))])
    # Best fit leaves the samples of a row sorted by length as it does the rows: shuffle both.
    random_bits = _KEY_BITS - _bits(samples) - assignment.rows.bit_length()
    row <<= random_bits
    row |= _random(len(samples), random_bits, draws)
    return Packing(_sort_by(row, samples), row_starts)


def _next_fit(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """Starts of rows, int64 `[r + 1]`: a row ends before the sample that would take it above `capacity`.

    A sample that is longer than `capacity` has a row of its own.
    """
    row_starts = np.empty(len(lengths) + 1, dtype=np.int64)
    write = row_starts.data  # plain integers: as fast as a search for each row's end, in less memory
    rows = 0
    room = -1
    for sample, length in enumerate(lengths.data):
        room -= length
        if room < 0:
            write[rows] = sample
            rows += 1
            room = max(0, capacity - length)
    write[rows] = len(lengths)
    return row_starts[: rows + 1].copy()


@dataclass(frozen=True)
class RowAssignment:
    """The row of each sample, counted from 0."""

    row_of_sample: np.ndarray  # int32 [n]
    rows: int


def _best_fit(lengths: np.ndarray, capacity: int) -> RowAssignment:
    """Rows begun in the given order, completed by best fit; best-fit-decreasing where that is fuller."""
    mixed = _begin_in_order(lengths, capacity)
    least_rows = -(-int(lengths.sum()) // capacity)
    if mixed.rows <= least_rows + least_rows // _EXTRA_ROWS_DIVISOR:
        return mixed
    longest_first = _sort_by(capacity - lengths, np.arange(len(lengths), dtype=np.int64))
    decreasing = best_fit_decreasing(lengths[longest_first], capacity)
    if mixed.rows <= decreasing.rows + decreasing.rows // _EXTRA_ROWS_DIVISOR:
        return mixed
    row_of_sample = np.empty(len(lengths), dtype=np.int32)
    row_of_sample[longest_first] = decreasing.row_of_sample
    return RowAssignment(row_of_sample, decreasing.rows)


def _begin_in_order(lengths: np.ndarray, capacity: int) -> RowAssignment:
    """The first samples, laid end to end, are cut into rows at a fixed stride; the others complete these."""
    laid = lengths[: int(_BEGINNING_SHARE_OF_SAMPLES * len(lengths))]
    stride = max(1, int(_BEGINNING_SHARE_OF_ROW * capacity))
    nth_stride = (np.cumsum(laid) - laid) // stride  # in which each sample starts
    row_starts = np.flatnonzero(np.diff(nth_stride, prepend=-1))
    row_ends = np.append(row_starts[1:], len(laid))
    tokens = np.add.reduceat(laid, row_starts)
    too_long = tokens > capacity  # by the last sample, which reaches beyond the stride: it is laid elsewhere
    left_over = row_ends[too_long] - 1
    tokens[too_long] -= laid[left_over]
    others = np.concatenate([left_over, np.arange(len(laid), len(lengths))])
    others = _sort_by(capacity - lengths[others], others)
    completed = best_fit_decreasing(lengths[others], capacity, capacity - tokens)
    row_of_sample = np.empty(len(lengths), dtype=np.int32)
    row_of_sample[: len(laid)] = np.repeat(np.arange(len(tokens), dtype=np.int32), row_ends - row_starts)
    row_of_sample[others] = completed.row_of_sample
    return RowAssignment(row_of_sample, completed.rows)


def best_fit_decreasing(
    longest_first: np.ndarray, capacity: int, room: np.ndarray | None = None
) -> RowAssignment:
    """Each sample in turn into the row with the least room that still holds it, else into a new one.

    `longest_first` int `[n]` is sorted; `room` int `[b]` is what rows 0 .. b-1, begun before, have left.

    Done in bulk, for all samples of a length and all rows of a room at once: a row that was the tightest
    stays so while the same length fits, so it takes room // length samples, and its room at least halves.
    Hence O((distinct lengths + distinct rooms) log capacity) steps, whatever the number of samples.
    """
    open_rows = _RowsByRoom(np.empty(0, dtype=np.int64) if room is None else room)
    rows = 0 if room is None else len(room)
    row_of_sample = np.empty(len(longest_first), dtype=np.int32)
    for begin, stop in _runs(longest_first):
        length = int(longest_first[begin])
        while begin < stop:
            tightest = open_rows.take(length)
            if tightest is None:
                new = -(-(stop - begin) // (capacity // length))
                tightest = _Alike(capacity, np.arange(rows, rows + new, dtype=np.int32))
                rows += new
            per_row = tightest.room // length
            full = min((stop - begin) // per_row, len(tightest.rows))
            filled, unfilled = tightest.rows[:full], tightest.rows[full:]
            row_of_sample[begin : begin + full * per_row] = filled.repeat(per_row)
            open_rows.put(tightest.room - per_row * length, filled)
            begin += full * per_row
            if begin < stop and len(unfilled):  # fewer samples are left than one more row takes
                row_of_sample[begin:stop] = unfilled[0]
                open_rows.put(tightest.room - (stop - begin) * length, unfilled[:1])
                unfilled = unfilled[1:]
                begin = stop
            open_rows.put(tightest.room, unfilled)
    return RowAssignment(row_of_sample, rows)


class _Alike(NamedTuple):
    """Rows with the same room left."""

    room: int
    rows: np.ndarray  # int32


class _RowsByRoom:
    """Open rows, found by the room that they have left."""

    def __init__(self, room: np.ndarray) -> None:
        self._rooms: list[int] = []  # ascending, each a key of
        self._rows: dict[int, list[np.ndarray]] = {}
        by_room = _sort_by(room.copy(), np.arange(len(room), dtype=np.int64))
        for begin, stop in _runs(room[by_room]):
            self.put(int(room[by_room[begin]]), by_room[begin:stop].astype(np.int32))

    def put(self, room: int, rows: np.ndarray) -> None:
        if not len(rows):
            return
        if room in self._rows:
            self._rows[room].append(rows)
        else:
            insort(self._rooms, room)
            self._rows[room] = [rows]

    def take(self, length: int) -> _Alike | None:
        """Some of the rows with the least room that holds `length`; None where no row does."""
        found = bisect_left(self._rooms, length)
        if found == len(self._rooms):
            return None
        room = self._rooms[found]
        rows = self._rows[room].pop()
        if not self._rows[room]:
            del self._rows[room], self._rooms[found]
        return _Alike(room, rows)


def _shuffled(values: np.ndarray, draws: np.random.PCG64) -> np.ndarray:
    return _sort_by(_random(len(values), _KEY_BITS - _bits(values), draws), values)


def _random(count: int, bits: int, draws: np.random.PCG64) -> np.ndarray:
    """Random numbers below 2^bits, int64 `[count]`."""
    numbers = draws.random_raw(count)
    numbers >>= np.uint64(64 - bits)
    return numbers.view(np.int64)


def _sort_by(keys: np.ndarray, values: np.ndarray) -> np.ndarray:
    """`values` in the order of their keys, equal keys in the order of values; int64 `[n]`, at least 0.

    Overwrites `keys`. Key and value are sorted as one integer: numpy's vectorized in-place sort is many
    times faster than `argsort`, and no gather follows it.
    """
    value_bits = _bits(values)
    if _bits(keys) + value_bits > _KEY_BITS:
        raise ValueError(f"keys up to {keys.max()} and values up to {values.max()} exceed {_KEY_BITS} bits")
    keys <<= value_bits
    keys |= values
    keys.sort()
    keys &= (1 << value_bits) - 1
    return keys


def _bits(values: np.ndarray) -> int:
    return int(values.max()).bit_length() if len(values) else 0


def _runs(values: np.ndarray) -> Iterator[tuple[int, int]]:
    """Begin and end of each run of equal values."""
    if len(values):
        edges = np.flatnonzero(values[1:] != values[:-1]) + 1
        yield from zip([0, *edges.tolist()], [*edges.tolist(), len(values)], strict=True)
