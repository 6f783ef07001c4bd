"""Packed rows in Parquet files: lists of ids in the column `input_ids`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from usdm_megatron.errors import DataError
from usdm_megatron.preprocess.rows import (
    ID_COLUMN,
    RowBlock,
    RowPlace,
    RowSource,
    check_id_column,
    rows_of_column,
)

if TYPE_CHECKING:
    import pyarrow.parquet

# Of a row group, encoded but not compressed: a thousand rows of 8,192 int64, as `datasets` cuts its row
# groups. Ids take 2 bytes (dictionary) to 8, so a part takes at most four times as much in memory.
PART_BYTES = 64 << 20
_LARGEST_GROUP_BYTES = 1 << 40  # what is above is damage, and would make parts without end
_MOST_GROUP_ROWS = 1 << 31


@dataclass(frozen=True)
class ParquetPart:
    """Batch `batch` of a row group that is read `batch_rows` rows at a time."""

    path: Path
    row_group: int
    batch: int
    batch_rows: int
    first_row: int  # of the file, for messages
    rows: int


class ParquetSource(RowSource):
    """Parquet files, in the order given. Row groups too large for memory are read in batches."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = tuple(paths)
        for path in self._paths:
            with _opened(path) as file:
                check_id_column(file.schema_arrow, file.metadata.num_rows, str(path))
        self._position: tuple[Path, int, int] | None = None
        self._batches: Iterator[Any] = iter(())

    def __getstate__(self) -> dict[str, Any]:
        return {"_paths": self._paths, "_position": None, "_batches": iter(())}

    def files(self) -> list[tuple[str, Path]]:
        return [(path.name, path) for path in self._paths]

    def parts(self) -> list[ParquetPart]:
        return [part for path in self._paths for part in _parts(path)]

    def read(self, part: ParquetPart) -> RowBlock:
        with reported_as_parquet(part.path):
            batch = self._batch(part)
        if batch is None or batch.num_rows != part.rows:
            raise DataError(
                f"{part.path}: row group {part.row_group} has not the rows it says; write it again"
            )
        return rows_of_column(batch.column(ID_COLUMN), RowPlace(str(part.path), part.first_row))

    def _batch(self, part: ParquetPart) -> Any:
        """The record batch of a part. A row group is read forwards only: ascending parts go on where the
        last one ended."""
        import pyarrow.parquet

        path, group, position = self._position or (None, -1, 0)
        if (path, group) != (part.path, part.row_group) or position > part.batch:
            file = pyarrow.parquet.ParquetFile(part.path, memory_map=True, page_checksum_verification=True)
            self._batches = file.iter_batches(
                part.batch_rows, row_groups=[part.row_group], columns=[ID_COLUMN], use_threads=False
            )
            position = 0
        for _ in range(position, part.batch):
            next(self._batches, None)
        self._position = (part.path, part.row_group, part.batch + 1)
        return next(self._batches, None)


def _parts(path: Path) -> Iterator[ParquetPart]:
    with _opened(path) as file:
        groups = [file.metadata.row_group(number) for number in range(file.metadata.num_row_groups)]
        first_row = 0
        for number, group in enumerate(groups):
            if not 0 <= group.total_byte_size < _LARGEST_GROUP_BYTES or group.num_rows > _MOST_GROUP_ROWS:
                raise DataError(
                    f"{path}: row group {number} says that it holds {group.num_rows} rows in "
                    f"{group.total_byte_size} bytes; write the file again"
                )
            # Not by the ids a column says it has: pyarrow (26) aborts over damaged facts of a column.
            parts = -(-group.total_byte_size // PART_BYTES)
            batch_rows = max(1, group.num_rows // max(1, parts))
            for start in range(0, group.num_rows, batch_rows):
                rows = min(batch_rows, group.num_rows - start)
                yield ParquetPart(path, number, start // batch_rows, batch_rows, first_row + start, rows)
            first_row += group.num_rows


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[pyarrow.parquet.ParquetFile]:
    import pyarrow.parquet

    with (
        reported_as_parquet(path),
        pyarrow.parquet.ParquetFile(path, memory_map=True, page_checksum_verification=True) as file,
    ):
        yield file


@contextlib.contextmanager
def reported_as_parquet(path: Path) -> Iterator[None]:
    """Whatever pyarrow raises for damaged files, as a `DataError`."""
    import pyarrow

    try:
        yield
    except (OSError, ValueError, pyarrow.ArrowException) as error:  # ArrowInvalid is a ValueError
        raise DataError(
            f"{path}: cannot be read as Parquet ({str(error).strip()}); write it again"
        ) from error
