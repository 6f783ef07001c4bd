"""Text files by the line: byte ranges cut at line ends, and decimal ids parsed without a Python loop.

A range of a file can be read anywhere, in any order. Which line it begins with is counted only when a
message needs to say so.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import numpy as np

from usdm_megatron.errors import DataError

PART_BYTES = 8 << 20
LONGEST_LINE_BYTES = 64 << 20  # bounds the memory that a file without line ends can take
_PROBE_BYTES = 64 << 10
_MOST_PROBLEMS = 10  # of a part, reported at once
_CHUNK_BYTES = 64 << 10  # what numpy makes of it stays in the cache
LINE_END = b"\n"
_PADDING = 8  # line ends before a chunk; at most as many digits are read at once
_WORD = re.compile(rb"[^ \t\r\n]{1,40}")
Record = TypeVar("Record")


def natural_key(path: str | Path) -> list[tuple[int, int, str]]:
    """Sort key under which `part2.txt` comes before `part10.txt`."""
    pieces = re.split(r"([0-9]+)", str(path))
    return [(1, int(piece), "") if number % 2 else (0, 0, piece) for number, piece in enumerate(pieces)]


def input_files(paths: Sequence[Path], takes: str) -> list[Path]:
    """The files of `--input` in natural order; a `DataError` that says which are missing or given twice."""
    problems = [f"{path}: no such file; --input takes {takes}" for path in paths if not path.is_file()]
    if not paths:
        problems.append(f"--input: no file given; it takes {takes}")
    if len(set(paths)) < len(paths):
        twice = sorted({str(path) for path in paths if paths.count(path) > 1})
        problems.append(f"--input: {', '.join(twice)} given twice, and it would be trained on twice")
    if problems:
        raise DataError(*problems)
    return sorted(paths, key=natural_key)


@dataclass(frozen=True)
class LinePart:
    """Whole lines of a file: the bytes from `start` up to `end`."""

    path: Path
    start: int
    end: int


@dataclass(frozen=True)
class LinePlace:
    """Names a line of a `LinePart` by its number in the file: `place(0)` is the part's first line."""

    path: Path
    start: int  # byte where the part begins

    def __call__(self, line: int) -> str:
        return f"{self.path} line {self.lines_before + line + 1}"

    @cached_property
    def lines_before(self) -> int:
        return count_lines(self.path, self.start)


def line_parts(
    path: Path,
    holds: str,
    *,
    part_bytes: int = PART_BYTES,
    longest_line_bytes: int = LONGEST_LINE_BYTES,
) -> list[LinePart]:
    """Cut a file into parts of whole lines, of at least `part_bytes` bytes each but the last.

    `holds` says what a line holds, for messages. Raises `DataError` for an empty file and for a line
    longer than `longest_line_bytes`.
    """
    try:
        size = path.stat().st_size
        if size == 0:
            raise DataError(f"{path}: the file is empty; leave it out or write it again")
        starts = [0]
        with path.open("rb") as file:
            while starts[-1] + part_bytes < size:
                at = starts[-1] + part_bytes
                start = _next_line_start(file, at, size, longest_line_bytes)
                if start is None:
                    raise DataError(
                        f"{path} line {count_lines(path, at) + 1}: longer than "
                        f"{longest_line_bytes >> 20} MiB; a line holds {holds}"
                    )
                starts.append(start)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
    if starts[-1] == size:
        starts.pop()
    return [LinePart(path, start, end) for start, end in zip(starts, [*starts[1:], size], strict=True)]


def count_lines(path: Path, end: int) -> int:
    """Number of line ends in the first `end` bytes of a file."""
    count = 0
    with path.open("rb") as file:
        while end > 0 and (block := file.read(min(PART_BYTES, end))):
            count += block.count(b"\n")
            end -= len(block)
    return count


def read_lines(part: LinePart) -> bytes:
    """The bytes of a part; they end with a line end, also where the file does not."""
    try:
        with part.path.open("rb") as file:
            file.seek(part.start)
            text = file.read(part.end - part.start)
    except OSError as error:
        raise DataError(f"{part.path}: cannot be read ({error.strerror})") from error
    if len(text) < part.end - part.start:
        raise DataError(f"{part.path}: became shorter while it was read; start again when it is complete")
    return text if text.endswith(b"\n") else text + b"\n"


@dataclass(frozen=True)
class NumberLines:
    """Numbers of consecutive lines: `numbers` `[T]`, `lengths` int64 `[lines]`, each at least 1."""

    numbers: np.ndarray
    lengths: np.ndarray


def parse_id_lines(text: bytes, place: LinePlace, holds: str) -> NumberLines:
    """Parse lines of decimal ids separated by white space; `text` ends with a line end.

    Numbers are int32, or int64 where one has more than 8 digits; beyond int64 they saturate, and are then
    outside of any vocabulary. Raises `DataError` for anything but digits and white space, and for a line
    without ids.
    """
    return _parse(text, place, holds, b" \t\r\n")


def parse_numbers(text: bytes, place: LinePlace, holds: str) -> NumberLines:
    """The same with a `-` before some of the numbers."""
    return _parse(text, place, holds, b" \t\r\n-")


def _parse(text: bytes, place: LinePlace, holds: str, separators: bytes) -> NumberLines:
    numbers, lengths = [], []
    at = 0
    while at < len(text):
        end = text.find(LINE_END, at + _CHUNK_BYTES) + 1 or len(text)
        padded = np.frombuffer(LINE_END * _PADDING + text[at:end], dtype=np.uint8)
        is_digit = padded >= ord("0")
        gaps = np.flatnonzero(~is_digit)[_PADDING - 1 :]  # before the first number, then behind each one
        ends, widths = gaps[1:], np.diff(gaps) - 1
        behind = padded.take(ends)
        if int(padded.max()) > ord("9") or behind.tobytes().translate(None, separators):
            raise _stray_byte(text, place, separators)
        line_ends = np.flatnonzero(behind == ord("\n")) + 1
        if int(widths.min()) == 0:  # two separators side by side
            is_number = widths > 0
            line_ends = np.cumsum(is_number, dtype=np.int64)[line_ends - 1]
            ends, widths = ends[is_number], widths[is_number]
        lengths.append(np.diff(line_ends, prepend=0))
        numbers.append(_decimals(padded, is_digit, ends, widths))
        if b"-" in separators:
            numbers[-1][padded.take(ends - widths - 1) == ord("-")] *= -1
        at = end
    lines = NumberLines(np.concatenate(numbers), np.concatenate(lengths))
    if int(lines.lengths.min()) == 0:
        raise DataError(
            f"{place(int(lines.lengths.argmin()))}: the line holds no ids; every line is {holds}: remove it"
        )
    return lines


def _decimals(padded: np.ndarray, is_digit: np.ndarray, ends: np.ndarray, widths: np.ndarray) -> np.ndarray:
    """The decimal numbers of `widths` digits before the positions `ends`, all at least `_PADDING`.

    Every two neighbouring digits are joined at once, then a number's pairs are gathered: three times the
    speed of `np.fromstring`.
    """
    widest = int(widths.max(initial=0))
    if widest > _PADDING:  # the text mode of fromstring, which is not deprecated
        return np.fromstring(padded.tobytes().replace(b"-", b" "), dtype=np.int64, sep=" ")
    digits = padded & np.uint8(15)
    digits *= is_digit.view(np.uint8)
    pairs = digits[:-1] * np.uint8(10)
    pairs += digits[1:]  # pairs[i] ends at position i + 2
    at = ends - 2
    numbers = pairs.take(at).astype(np.int32)
    narrow_widths = widths.astype(np.uint8)
    for power in range(2, widest, 2):
        at -= 2
        higher = pairs.take(at)
        higher *= (narrow_widths > power).view(np.uint8)
        numbers += higher * np.int32(10**power)
    return numbers


def _stray_byte(text: bytes, place: LinePlace, separators: bytes) -> DataError:
    stray = re.search(b"[^0-9" + re.escape(separators) + b"]", text)
    at = stray.start() if stray else 0
    return DataError(
        f"{place(text.count(LINE_END, 0, at))}: {word_around(text, at)!r} is no token id; "
        "ids are decimal numbers, space separated"
    )


def word_around(text: bytes, at: int) -> str:
    """The word that a malformed byte stands in, for a message."""
    begin = max(text.rfind(separator, 0, at) for separator in (b" ", b"\t", LINE_END, b"\r")) + 1
    word = _WORD.match(text, begin)
    return word[0].decode("utf-8", "backslashreplace") if word else ""


def parse_json_lines(
    part: LinePart, parse: Callable[[Any, Callable[[], str]], Record], holds: str
) -> Iterator[Record]:
    """`parse(content, place)` of every line that is not blank; `holds` says what a line is: `a dialog`.

    Raises a `DataError` at the end with all that is wrong (at most ten problems): bytes that are no UTF-8 or
    no JSON, and what `parse` raises.
    """
    place = LinePlace(part.path, part.start)
    problems: list[str] = []
    for number, line in enumerate(read_lines(part).split(LINE_END)):
        if not line.strip():
            continue
        try:
            record = parse(json.loads(line.decode("utf-8")), partial(place, number))
        except UnicodeDecodeError as error:
            problems.append(f"{place(number)}: byte {error.start + 1} is not UTF-8; save the file as UTF-8")
        except (ValueError, RecursionError) as error:
            problems.append(f"{place(number)}: not JSON ({error}); every line is {holds}, one object")
        except DataError as error:
            problems += error.problems
        else:
            yield record
        if len(problems) >= _MOST_PROBLEMS:
            break
    if problems:
        raise DataError(*problems)


def _next_line_start(file: BinaryIO, at: int, size: int, longest_line_bytes: int) -> int | None:
    """Where the first line at or after `at` begins, or `size`; None when the line before it is too long."""
    position = at - 1  # a line end just before `at` counts
    file.seek(position)
    while position - at <= longest_line_bytes and (block := file.read(_PROBE_BYTES)):
        found = block.find(b"\n")
        position += found + 1 if found >= 0 else len(block)
        if found >= 0:
            break
    return min(position, size) if position - at <= longest_line_bytes else None
