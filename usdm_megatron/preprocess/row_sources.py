"""Readers of packed rows: datasets on disk (stage 4 of the original), Parquet and `part*.txt` (stage 3).

All give `RowBlock`s, rows in order, tokens as one flat numpy array a block; nothing loops over tokens
in Python. Ids are only parsed here: the store's writer compares them with the vocabulary.
Nothing is unpickled and no foreign code is run (`datasets.load_from_disk` reads JSON and Arrow).
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from usdm_megatron.errors import DataError
from usdm_megatron.preprocess.parquet_rows import ParquetSource
from usdm_megatron.preprocess.rows import (
    ID_COLUMN,
    RowBlock,
    RowPlace,
    RowSource,
    check_id_column,
    no_rows_message,
    rows_of_column,
)
from usdm_megatron.preprocess.text_lines import (
    LinePart,
    LinePlace,
    input_files,
    line_parts,
    natural_key,
    parse_id_part,
)

if TYPE_CHECKING:
    import datasets

TEXT_BLOCK_BYTES = 8 << 20
LONGEST_LINE_BYTES = 64 << 20  # bounds the memory that a file without line ends can take
CACHE_BLOCK_ROWS = 512  # x 8,192 tokens = 4 M tokens at a time
_SPLIT_NAME = re.compile(r"\w[\w.-]*")  # becomes part of a file name: no separators
_HUB_FILE = re.compile(r"(\w[\w.-]*)-\d{5}-of-\d{5}\.parquet")


class PackedTextSource(RowSource):
    """`part*.txt`: a row a line, decimal ids separated by spaces. Files are read in natural order."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = input_files(paths, "the part*.txt files of stage 3")

    def files(self) -> list[tuple[str, Path]]:
        return [(path.name, path) for path in self._paths]

    def parts(self) -> list[LinePart]:
        limits = {"part_bytes": TEXT_BLOCK_BYTES, "longest_line_bytes": LONGEST_LINE_BYTES}
        return [
            part for path in self._paths for part in line_parts(path, "the ids of one packed row", **limits)
        ]

    def read(self, part: LinePart) -> RowBlock:
        lines = parse_id_part(part, "a packed row")
        return RowBlock(lines.numbers, lines.lengths, LinePlace(part.path, part.start))


class CacheSource(RowSource):
    """One `datasets.Dataset` on disk; `name` says which in messages, e.g. `cache train`."""

    is_memory: ClassVar[bool] = True

    def __init__(self, dataset: datasets.Dataset, directory: Path, name: str) -> None:
        check_id_column(dataset.data.schema, len(dataset), name)
        self._dataset = dataset.select_columns([ID_COLUMN]).with_format("arrow")
        self._directory = directory
        self._name = name

    def files(self) -> list[tuple[str, Path]]:
        paths = [Path(entry["filename"]) for entry in self._dataset.cache_files]
        root = self._directory.resolve()
        return [
            (path.relative_to(root).as_posix() if path.is_relative_to(root) else path.name, path)
            for path in (path.resolve() for path in paths)
        ]

    def parts(self) -> list[range]:
        rows = len(self._dataset)
        starts = range(0, rows, CACHE_BLOCK_ROWS)
        return [range(start, min(start + CACHE_BLOCK_ROWS, rows)) for start in starts]

    def read(self, part: range) -> RowBlock:
        column = self._dataset[part.start : part.stop].column(ID_COLUMN)
        lists = column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
        return rows_of_column(lists, RowPlace(self._name, part.start))


def open_cache(path: Path) -> dict[str, RowSource]:
    """What stage 4 saved, by split; a single one has the key ''.

    `path` is a directory of `datasets.save_to_disk`, one of Parquet files, or a Parquet file. Parquet files
    named as on the Hub (`train-00000-of-00002.parquet`) are divided by split where there is more than one.
    """
    if path.is_file() and path.suffix == ".parquet":
        return {"": ParquetSource([path])}
    if not path.is_dir():
        raise DataError(
            f"{path}: no such directory; --input takes what stage 4 saved with save_to_disk, or Parquet files"
        )
    if any((path / name).is_file() for name in ("dataset_dict.json", "state.json")):
        return _open_saved(path)
    files = sorted(path.glob("*.parquet"), key=natural_key)
    if not files:
        raise DataError(
            f"{path}: neither dataset_dict.json nor state.json in it, so it is no dataset on disk, and no "
            "*.parquet; --input takes what datasets.DatasetDict.save_to_disk wrote"
        )
    splits = [found.group(1) for file in files if (found := _HUB_FILE.fullmatch(file.name))]
    if len(splits) < len(files) or len(set(splits)) == 1:
        return {"": ParquetSource(files)}
    by_split: dict[str, list[Path]] = {}
    for split, file in zip(splits, files, strict=True):
        by_split.setdefault(split, []).append(file)
    return {split: ParquetSource(some) for split, some in by_split.items()}


def _open_saved(directory: Path) -> dict[str, RowSource]:
    is_dict = (directory / "dataset_dict.json").is_file()
    _refuse_empty_datasets(directory)
    import datasets  # takes a second

    try:
        loaded: Any = datasets.load_from_disk(str(directory))
    except Exception as error:  # whatever datasets and pyarrow raise for damaged files
        raise DataError(
            f"{directory}: datasets cannot read it ({type(error).__name__}: {error}); save it again"
        ) from error
    splits = dict(loaded) if is_dict else {"": loaded}
    if not splits:
        raise DataError(f"{directory}: holds no splits; the original's cache has train and test")
    for split in splits:
        if split and not _SPLIT_NAME.fullmatch(split):
            raise DataError(f"{directory}: split name {split!r} cannot be part of a file name; rename it")
    return {
        split: CacheSource(dataset, directory, f"{directory} {split}".rstrip())
        for split, dataset in splits.items()
    }


def _refuse_empty_datasets(directory: Path) -> None:
    """Name a dataset without rows, for which `load_from_disk` (5.2) fails with an `IndexError`."""
    for state in (directory / "state.json", *sorted(directory.glob("*/state.json"))):
        with contextlib.suppress(OSError, ValueError, AttributeError):  # datasets says what is wrong
            if json.loads(state.read_bytes()).get("_data_files") == []:
                raise DataError(no_rows_message(str(state.parent)))
