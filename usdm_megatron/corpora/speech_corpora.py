"""Aligned speech-text corpora from manifests, JSONL or Parquet.

A record is `{"id", "units", "words": [{"text", "start", "end"}], "duration"}`: units as a list of numbers or
a string of them, times in seconds, `duration` where it is known. Silences need not be listed.

A corpus is read in parts of bounded size, anywhere and in any order. What is wrong with one utterance makes
a `Rejection`; what is wrong with a file (no JSON, no UTF-8, no such column) is a `DataError`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from usdm_megatron.corpora.alignment import UNITS_MISSING, Rejected, Utterance, Word
from usdm_megatron.errors import DataError
from usdm_megatron.preprocess.parquet_rows import ParquetPart, reported_as_parquet
from usdm_megatron.preprocess.rows import refuse_repeated_columns
from usdm_megatron.preprocess.samples import Rejection
from usdm_megatron.preprocess.text_lines import LinePart, line_parts, natural_key, parse_json_lines

UNIT_OUT_OF_RANGE = "unit_out_of_range"
MALFORMED_UNITS = "malformed_units"
MALFORMED_WORDS = "malformed_words"
MALFORMED_DURATION = "malformed_duration"

PART_BYTES = 8 << 20  # of JSONL: about 2,000 utterances of 10 s
PART_ROWS = 2000  # of Parquet
_COLUMNS = ("id", "units", "words")
_OPTIONAL_COLUMN = "duration"
_NUMBERS = (int, float)  # compared with `type`: a bool is none


class Corpus(Protocol):
    """Utterances in order. Pickled to workers: hold paths, open files in `read`."""

    def files(self) -> list[tuple[str, Path]]:
        """Every input file as (name relative to the input, path)."""
        ...

    def parts(self) -> Sequence[Any]:
        """The parts, picklable, in order; they depend on the input alone."""
        ...

    def read(self, part: Any) -> Iterator[Utterance | Rejection]:
        """The utterances of one part, in order."""
        ...


class ManifestCorpus:
    """Manifest files, read in natural order: `*.parquet`, and anything else as JSONL."""

    def __init__(self, paths: Sequence[Path]) -> None:
        problems = [f"{path}: no such file; --manifest takes files" for path in paths if not path.is_file()]
        if not paths:
            problems.append("--manifest: no file given; it takes JSONL or Parquet files")
        if len(set(paths)) < len(paths):
            twice = sorted({str(path) for path in paths if paths.count(path) > 1})
            problems.append(f"--manifest: {', '.join(twice)} given twice")
        if problems:
            raise DataError(*problems)
        self._paths = sorted(paths, key=natural_key)
        self._parquet = _ParquetRows()

    def files(self) -> list[tuple[str, Path]]:
        return [(path.name, path) for path in self._paths]

    def parts(self) -> list[LinePart | ParquetPart]:
        return [
            part
            for path in self._paths
            for part in (
                _parquet_parts(path)
                if path.suffix == ".parquet"
                else line_parts(path, "an utterance", part_bytes=PART_BYTES)
            )
        ]

    def read(self, part: LinePart | ParquetPart) -> Iterator[Utterance | Rejection]:
        if isinstance(part, LinePart):
            return parse_json_lines(part, parse_record, "an utterance")
        return self._parquet.read(part)


def parse_record(record: Any, place: Callable[[], str]) -> Utterance | Rejection:
    """A record of a manifest; `place` names it in messages. `units` may also be an integer array.

    Raises `DataError` where there is no id to reject it under.
    """
    if not isinstance(record, dict):
        raise DataError(
            f"{place()}: {record!r:.60} is no utterance; it is an object with id, units and words"
        )
    utterance_id = _parse_id(record.get("id"), place)
    try:
        return Utterance(
            utterance_id,
            parse_units(record.get("units")),
            _parse_words(record.get("words")),
            _parse_duration(record.get("duration")),
        )
    except Rejected as rejected:
        return Rejection(utterance_id, rejected.reason, rejected.detail)


def parse_units(units: Any) -> np.ndarray:
    """Unit numbers, int32 `[N]`, from a list, a space-separated string or an integer array."""
    if isinstance(units, str):
        if units.encode("utf-8", "replace").translate(None, b"0123456789 \t\r\n"):
            raise Rejected(MALFORMED_UNITS, f"{units!r:.60}: units are decimal numbers, space separated")
        numbers = np.fromstring(units, dtype=np.int64, sep=" ") if units.strip() else np.array([], np.int64)
    elif isinstance(units, np.ndarray) and units.dtype.kind in "iu":
        numbers = units
    elif isinstance(units, list) and set(map(type, units)) <= {int}:
        try:
            numbers = np.array(units, dtype=np.int64)
        except OverflowError:
            raise Rejected(UNIT_OUT_OF_RANGE, "a unit is beyond 64 bits") from None
    elif units is None:
        raise Rejected(UNITS_MISSING, "no units")
    else:
        raise Rejected(MALFORMED_UNITS, f"{units!r:.60}: units are whole numbers, in a list or a string")
    if len(numbers) == 0:
        raise Rejected(UNITS_MISSING, "no units")
    if int(numbers.min()) < 0 or int(numbers.max()) > np.iinfo(np.int32).max:
        raise Rejected(UNIT_OUT_OF_RANGE, f"units from {numbers.min()} to {numbers.max()}")
    return numbers.astype(np.int32)


def _parse_id(utterance_id: Any, place: Callable[[], str]) -> str:
    if type(utterance_id) is int:
        return str(utterance_id)
    if not isinstance(utterance_id, str) or not utterance_id or not is_unicode(utterance_id):
        raise DataError(
            f"{place()}: id is {utterance_id!r:.60}; every utterance has a string or a number as its id"
        )
    return utterance_id


def _parse_words(words: Any) -> tuple[Word, ...]:
    if not isinstance(words, list):
        raise Rejected(MALFORMED_WORDS, f"words is {words!r:.60}, not a list")
    parsed = []
    for number, word in enumerate(words):
        try:
            text, start_s, end_s = word["text"], word["start"], word["end"]
            if type(text) is not str or type(start_s) not in _NUMBERS or type(end_s) not in _NUMBERS:
                raise TypeError
            parsed.append(Word(text, float(start_s), float(end_s)))
        except (TypeError, KeyError, OverflowError):
            raise Rejected(
                MALFORMED_WORDS,
                f"word {number} is {word!r:.80}; it has a text, and start and end in seconds",
            ) from None
    if not is_unicode("".join([word.text for word in parsed])):
        raise Rejected(MALFORMED_WORDS, "a word holds half a surrogate pair")
    return tuple(parsed)


def _parse_duration(duration_s: Any) -> float | None:
    if duration_s is None:
        return None
    if type(duration_s) not in _NUMBERS or not 0 < duration_s < float("inf"):
        raise Rejected(MALFORMED_DURATION, f"duration is {duration_s!r:.60}; it is in seconds")
    try:
        return float(duration_s)
    except OverflowError:
        raise Rejected(MALFORMED_DURATION, "duration is beyond a float") from None


def is_unicode(text: str) -> bool:
    """Whether text can be encoded: JSON spells lone surrogates, UTF-8 has none."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _parquet_parts(path: Path) -> Iterator[ParquetPart]:
    with reported_as_parquet(path):
        file = _pyarrow_parquet().ParquetFile(path, memory_map=True)
        missing = [name for name in _COLUMNS if name not in file.schema_arrow.names]
        group_rows = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
    if missing:
        raise DataError(
            f"{path}: no column {', '.join(missing)}, only {', '.join(file.schema_arrow.names)}; a manifest "
            f"has {', '.join(_COLUMNS)}, and perhaps {_OPTIONAL_COLUMN}"
        )
    refuse_repeated_columns(file.schema_arrow.names, (*_COLUMNS, _OPTIONAL_COLUMN), str(path))
    if sum(group_rows) == 0:
        raise DataError(f"{path}: holds no rows; remove it from --manifest or write it again")
    first_row = 0
    for group, rows in enumerate(group_rows):
        for start in range(0, rows, PART_ROWS):
            yield ParquetPart(
                path, group, start // PART_ROWS, PART_ROWS, first_row + start, min(PART_ROWS, rows - start)
            )
        first_row += rows


class _ParquetRows:
    """Reads the parts of Parquet files; a row group forwards only, going on where the last part ended."""

    def __init__(self) -> None:
        self._next: tuple[Path, int, int] | None = None  # file, row group, batch
        self._batches: Iterator[Any] = iter(())

    def __getstate__(self) -> dict[str, Any]:
        return {"_next": None, "_batches": iter(())}

    def read(self, part: ParquetPart) -> Iterator[Utterance | Rejection]:
        with reported_as_parquet(part.path):
            batch = self._batch(part)
            if batch is None or batch.num_rows != part.rows:
                raise DataError(
                    f"{part.path}: row group {part.row_group} has not the rows it says; write it again"
                )
            units = _unit_rows(batch.column("units"))
            records = batch.drop_columns(["units"]).to_pylist()
        for row, (record, unit_numbers) in enumerate(zip(records, units, strict=True)):
            record["units"] = unit_numbers
            duration_s = record.get(_OPTIONAL_COLUMN)
            if isinstance(duration_s, float) and math.isnan(duration_s):
                record[_OPTIONAL_COLUMN] = None  # how pandas writes that a number is missing
            yield parse_record(record, partial("{} row {}".format, part.path, part.first_row + row))

    def _batch(self, part: ParquetPart) -> Any:
        path, group, position = self._next or (None, -1, 0)
        if (path, group) != (part.path, part.row_group) or position > part.batch:
            file = _pyarrow_parquet().ParquetFile(part.path, memory_map=True)
            columns = [name for name in (*_COLUMNS, _OPTIONAL_COLUMN) if name in file.schema_arrow.names]
            self._batches = file.iter_batches(
                part.batch_rows, row_groups=[part.row_group], columns=columns, use_threads=False
            )
            position = 0
        for _ in range(position, part.batch):
            next(self._batches, None)
        self._next = (part.path, part.row_group, part.batch + 1)
        return next(self._batches, None)


def _unit_rows(column: Any) -> list[Any]:
    """The units of every row: views of one array where they are lists of integers, else Python's values."""
    import pyarrow

    kind = column.type
    is_list = pyarrow.types.is_list(kind) or pyarrow.types.is_large_list(kind)
    values = column.flatten() if is_list else None  # of a sliced column only its own part; skips nulls
    if values is None or values.null_count or not pyarrow.types.is_integer(kind.value_type):
        return list(column.to_pylist())
    lengths = column.value_lengths().fill_null(0).to_numpy(zero_copy_only=False)
    return np.split(values.to_numpy(), np.cumsum(lengths)[:-1])


def _pyarrow_parquet() -> Any:
    """`pyarrow.parquet`, which takes a while to import."""
    import pyarrow.parquet

    return pyarrow.parquet
