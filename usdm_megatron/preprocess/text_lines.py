"""Text files by the line: byte ranges cut at line ends, and decimal ids parsed without a Python loop.

A range of a file can be read anywhere, in any order. Which line it begins with is counted only when a
message needs to say so.
"""

from __future__ import annotations

import codecs
import contextlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from io import BufferedReader
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import numpy as np

from usdm_megatron.errors import DataError

PART_BYTES = 8 << 20
LONGEST_LINE_BYTES = 64 << 20  # bounds the memory that a file without line ends can take
_PROBE_BYTES = 64 << 10
_MOST_PROBLEMS = 10  # of a part, reported at once
_CHUNK_BYTES = 128 << 10  # what numpy makes of it stays in the cache
LINE_END = b"\n"
_MOST_DIGITS = 8  # of a number that is read at speed
_WHITE_SPACE = b" \t\r\n"
_GAP = re.compile(b"[" + _WHITE_SPACE + b"]")
_LONGEST_WORD_BYTES = 64  # that a chunk can end with without being read again
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
    with _opened(part) as file:
        text = file.read(part.end - part.start)
    if len(text) < part.end - part.start:
        raise _became_shorter(part)
    return text if text.endswith(LINE_END) else text + LINE_END


@contextlib.contextmanager
def _opened(part: LinePart) -> Iterator[BufferedReader]:
    try:
        with part.path.open("rb") as file:
            file.seek(part.start)
            yield file
    except OSError as error:
        raise DataError(f"{part.path}: cannot be read ({error.strerror})") from error


def _became_shorter(part: LinePart) -> DataError:
    return DataError(f"{part.path}: became shorter while it was read; start again when it is complete")


@dataclass(frozen=True)
class NumberLines:
    """Numbers of consecutive lines: `numbers` `[T]`, `lengths` int64 `[lines]`, each at least 1."""

    numbers: np.ndarray
    lengths: np.ndarray


def parse_id_lines(text: bytes, place: LinePlace, holds: str) -> NumberLines:
    """Parse lines of decimal ids separated by white space; `text` ends with a line end.

    Numbers are uint16, int32 or int64, as they need; beyond int64 they saturate, and are then outside of
    any vocabulary. Raises `DataError` for anything but digits and white space, and for a line without ids.
    """
    return _parse(_chunks(text), lambda: text, place, f"ids; every line is {holds}", _WHITE_SPACE)


def parse_label_lines(text: bytes, place: LinePlace, holds: str) -> NumberLines:
    """The same of labels, int64, with a `-` before some of them."""
    return _parse(_chunks(text), lambda: text, place, f"labels; every line is {holds}", _WHITE_SPACE + b"-")


def parse_id_part(part: LinePart, holds: str) -> NumberLines:
    """`parse_id_lines` of a part, whose text is never in memory as a whole."""
    place = LinePlace(part.path, part.start)
    return _parse(
        _chunks_of_file(part), lambda: read_lines(part), place, f"ids; every line is {holds}", _WHITE_SPACE
    )


def _parse(
    chunks: Iterator[np.ndarray],
    whole_text: Callable[[], bytes],
    place: LinePlace,
    lacks: str,
    separators: bytes,
) -> NumberLines:
    numbers, line_ends = [], []
    count = 0
    for characters in chunks:
        chunk = _parse_chunk(characters, separators)
        if chunk is None:
            raise _stray_byte(whole_text(), place, separators)
        numbers.append(chunk.numbers)
        line_ends.append(count + chunk.until_line_ends)
        count += len(chunk.numbers)
    lines = NumberLines(np.concatenate(numbers), np.diff(np.concatenate(line_ends), prepend=0))
    if int(lines.lengths.min()) == 0:
        raise DataError(f"{place(int(lines.lengths.argmin()))}: the line holds no {lacks}: remove it")
    return lines


def _chunks(text: bytes) -> Iterator[np.ndarray]:
    """Pieces of a text, uint8, that end with white space as it does."""
    at = 0
    while at < len(text):
        gap = _GAP.search(text, at + _CHUNK_BYTES)
        end = gap.end() if gap else len(text)
        yield np.frombuffer(text, np.uint8, end - at, at)
        at = end


def _chunks_of_file(part: LinePart) -> Iterator[np.ndarray]:
    """The same of what `read_lines` would give; the next chunk takes the memory of the last one."""
    buffer = bytearray(_CHUNK_BYTES)
    held, left = 0, part.end - part.start
    with _opened(part) as file:
        while left:
            if held == len(buffer):  # no white space in it
                buffer = buffer + bytes(len(buffer))
            got = file.readinto(memoryview(buffer)[held:][:left])
            if not got:
                raise _became_shorter(part)
            held, left = held + got, left - got
            if left:
                begin = max(0, held - _LONGEST_WORD_BYTES)
                end = 1 + max(buffer.rfind(gap, begin, held) for gap in _WHITE_SPACE)
            else:
                if not buffer.endswith(LINE_END, 0, held):
                    buffer, held = buffer[:held] + LINE_END, held + 1
                end = held
            if end:
                yield np.frombuffer(buffer, np.uint8, end)
                buffer[: held - end] = buffer[end:held]
                held -= end


@dataclass(frozen=True)
class _Chunk:
    numbers: np.ndarray
    until_line_ends: np.ndarray  # int64 [lines], how many numbers there are before each line end


def _parse_chunk(characters: np.ndarray, separators: bytes) -> _Chunk | None:
    """None for a byte that is neither a digit nor a separator; the last one is white space."""
    words = _find_words(characters, separators)
    if words is None:
        return None
    numbers = _decimals(words)
    if b"-" in separators:
        before = characters[words.ends - words.spans]  # of the first number: the last character
        numbers = np.where(before == ord("-"), -numbers.astype(np.int64), numbers)
    return _Chunk(numbers, words.until_line_ends)


@dataclass(frozen=True)
class _Words:
    """Where in some text the numbers are: n of them."""

    characters: np.ndarray  # uint8 [C]
    pairs: np.ndarray  # uint8 [_MOST_DIGITS + C], the two digits that end at each character, as a number
    ends: np.ndarray  # int64 [n], of the character behind each number
    spans: np.ndarray  # int64 [n], a number's digits and the character behind them
    until_line_ends: np.ndarray  # as of a `_Chunk`


def _find_words(characters: np.ndarray, separators: bytes) -> _Words | None:
    """The numbers' places and digits: one pass finds the separators, which takes a third of all time; the
    others handle a byte a character.
    """
    (ends,) = (characters < ord("0")).nonzero()
    behind = characters.take(ends, mode="clip")
    (not_space,) = (behind != ord(" ")).nonzero()
    others = behind[not_space]
    if int(characters.max()) > ord("9") or others.tobytes().translate(None, separators):
        return None
    digits = np.zeros(len(characters) + 1, np.uint8)  # a zero before the first
    np.bitwise_and(characters, 15, out=digits[1:])  # 0 for a space
    digits[ends[not_space] + 1] = 0
    pairs = np.empty(len(characters) + _MOST_DIGITS, np.uint8)
    np.multiply(digits[:-1], 10, out=pairs[_MOST_DIGITS:])
    pairs[_MOST_DIGITS:] += digits[1:]
    spans = np.empty_like(ends)
    spans[0] = ends[0] + 1
    np.subtract(ends[1:], ends[:-1], out=spans[1:])
    until_line_ends = not_space[others == ord("\n")] + 1
    if int(spans.min()) == 1:  # two separators side by side
        is_number = spans > 1
        until_line_ends = np.cumsum(is_number, dtype=np.int64)[until_line_ends - 1]
        ends, spans = ends[is_number], spans[is_number]
    return _Words(characters, pairs, ends, spans, until_line_ends)


def _decimals(words: _Words) -> np.ndarray:
    """The numbers, from their pairs of digits: uint16 where that holds them, else int32 or int64."""
    most_digits = int(words.spans.max(initial=1)) - 1
    if most_digits > _MOST_DIGITS:  # the text mode of fromstring, which is not deprecated
        return np.fromstring(words.characters.tobytes().replace(b"-", b" "), dtype=np.int64, sep=" ")
    spans = words.spans.astype(np.uint8)

    def pair_at(power: int) -> np.ndarray:
        pair = words.pairs[_MOST_DIGITS - 1 - power :].take(words.ends, mode="clip")
        pair *= (spans > power + 1).view(np.uint8)  # else it is of the number before
        return pair

    numbers = np.multiply(pair_at(2), 100, dtype=np.uint16)
    numbers += pair_at(0)
    if most_digits <= 4:
        return numbers
    high = pair_at(4)
    if most_digits <= 6 and int(high.max()) * 10_000 + 9999 < 1 << 16:
        numbers += np.multiply(high, 10_000, dtype=np.uint16)
        return numbers
    wide = numbers.astype(np.int32) + high * np.int32(10**4)
    return wide + pair_at(6) * np.int32(10**6) if most_digits > 6 else wide


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
    text = read_lines(part)
    if part.start == 0:
        text = text.removeprefix(codecs.BOM_UTF8)  # as Windows begins a file that is UTF-8
    for number, line in enumerate(text.split(LINE_END)):
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
