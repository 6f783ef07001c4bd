"""Packed rows on their way into a store: blocks of them, what gives them, and Arrow columns as blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import numpy as np

from usdm_megatron.errors import DataError

if TYPE_CHECKING:
    import pyarrow

ID_COLUMN = "input_ids"


@dataclass(frozen=True)
class RowBlock:
    """Some consecutive rows: `tokens` `[T]`, `row_lengths` int64 `[R]` summing to T, each at least 1."""

    tokens: np.ndarray
    row_lengths: np.ndarray
    place: Callable[[int], str]  # row of this block → where it came from, for messages; picklable


class RowSource(Protocol):
    """Rows in order, in parts that workers can read in any order.

    Sources, parts and blocks can be pickled.
    """

    is_memory: ClassVar[bool] = False
    """Whether the rows lie in a memory map as they are: then it takes longer to fetch them from a worker."""

    def files(self) -> list[tuple[str, Path]]:
        """The files the rows come from, as (name relative to the input, path)."""
        ...

    def parts(self) -> Sequence[Any]:
        """What `read` takes, in the order of the rows; depends on the input alone."""
        ...

    def read(self, part: Any) -> RowBlock:
        """The rows of one part."""
        ...

    def blocks(self) -> Iterator[RowBlock]:
        """All rows, in order."""
        return map(self.read, self.parts())


@dataclass(frozen=True)
class RowPlace:
    """Names a row of a block by its number in the dataset `name`."""

    name: str
    first_row: int

    def __call__(self, row: int) -> str:
        return f"{self.name} row {self.first_row + row}"


def no_rows_message(name: str) -> str:
    return f"{name}: holds no rows, and an empty store cannot be trained on; fill the split or leave it out"


def refuse_repeated_columns(found: Sequence[str], wanted: Sequence[str], name: str) -> None:
    """Parquet allows several columns of one name; which one is meant nobody can say."""
    repeated = [f"{one!r} {found.count(one)} times" for one in wanted if found.count(one) > 1]
    if repeated:
        raise DataError(f"{name}: has column {', '.join(repeated)}; write it again with each of them once")


def check_id_column(schema: pyarrow.Schema, row_count: int, name: str) -> None:
    """Raise a `DataError` unless a table has rows, and lists of integers in the column `input_ids`."""
    import pyarrow.types as is_type

    if ID_COLUMN not in schema.names:
        raise DataError(
            f"{name}: no column {ID_COLUMN!r}, only {', '.join(schema.names) or 'none'}; "
            "save the packed rows as lists of ids in that column"
        )
    refuse_repeated_columns(schema.names, [ID_COLUMN], name)
    if row_count == 0:
        raise DataError(no_rows_message(name))
    kind = schema.field(ID_COLUMN).type
    is_list = is_type.is_list(kind) or is_type.is_large_list(kind) or is_type.is_fixed_size_list(kind)
    if not is_list or not is_type.is_integer(kind.value_type):
        raise DataError(f"{name}: column {ID_COLUMN!r} is {kind}; a row is a list of integer ids")


def rows_of_column(lists: pyarrow.Array, place: RowPlace) -> RowBlock:
    """A list array as numpy views of its values and offsets (no copy)."""
    if lists.null_count:
        row = int(np.argmax(lists.is_null().to_numpy(zero_copy_only=False)))
        raise DataError(f"{place(row)}: is null; every row is a list of ids")
    values = lists.flatten()  # of a sliced chunk only its own part
    row_lengths = lists.value_lengths().to_numpy(zero_copy_only=False).astype(np.int64)
    if int(row_lengths.min()) == 0:
        raise DataError(f"{place(int(row_lengths.argmin()))}: holds no ids; remove empty rows")
    if values.null_count:
        at = int(np.argmax(values.is_null().to_numpy(zero_copy_only=False)))
        row = int(np.searchsorted(np.cumsum(row_lengths), at, side="right"))
        raise DataError(f"{place(row)}: holds a null; ids are numbers")
    return RowBlock(values.to_numpy(), row_lengths, place)


@dataclass(frozen=True)
class SampleCuts:
    """Where rows are cut into samples."""

    sample_lengths: np.ndarray  # int64 [samples]
    samples_per_row: np.ndarray  # int64 [R]
    rows_without_bos: int  # rows whose head is a sample without bos


def cut_samples(tokens: np.ndarray, row_lengths: np.ndarray, bos_id: int) -> SampleCuts:
    """Cut rows (`tokens` `[T]`, `row_lengths` `[R]` summing to T, each at least 1) at every bos.

    What comes before the first bos of a row is a sample of its own (the rest of one that a packer cut);
    such rows are accepted and counted, as the original reads them too.
    """
    row_starts = np.cumsum(row_lengths) - row_lengths
    is_start = tokens == bos_id
    rows_without_bos = len(row_starts) - int(np.count_nonzero(is_start[row_starts]))
    is_start[row_starts] = True
    starts = np.flatnonzero(is_start)
    return SampleCuts(
        sample_lengths=np.diff(starts, append=len(tokens)),
        samples_per_row=np.diff(np.searchsorted(starts, row_starts), append=len(starts)),
        rows_without_bos=rows_without_bos,
    )
