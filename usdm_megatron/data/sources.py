"""Readers of packed rows: datasets on disk (stage 4 of the original) and `part*.txt` (stage 3).

Both give `RowBlock`s, rows in order, tokens as one flat numpy array a block; nothing loops over tokens
in Python. Ids are only parsed here: the store's writer compares them with the vocabulary.
Nothing is unpickled and no foreign code is run (`datasets.load_from_disk` reads JSON and Arrow).
"""

from __future__ import annotations

import contextlib
import json
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from usdm_megatron.data.token_store import SourceFile
from usdm_megatron.errors import DataError
from usdm_megatron.file_reading import file_sha256

if TYPE_CHECKING:
    import datasets
    import pyarrow  # type: ignore[import-untyped]

TEXT_BLOCK_BYTES = 8 << 20
LONGEST_LINE_BYTES = 64 << 20  # bounds the memory that a file without line ends can take
CACHE_BLOCK_ROWS = 512  # x 8,192 tokens = 4 M tokens at a time
CACHE_COLUMN = "input_ids"
_SPLIT_NAME = re.compile(r"\w[\w.-]*")  # becomes part of a file name: no separators
_STRAY_BYTE = re.compile(rb"[^0-9 \t\r\n]")


@dataclass(frozen=True)
class RowBlock:
    """Some consecutive rows: `tokens` `[T]`, `row_lengths` int64 `[R]` summing to T, each at least 1."""

    tokens: np.ndarray
    row_lengths: np.ndarray
    place: Callable[[int], str]  # row of this block → where it came from, for messages


class RowSource(Protocol):
    """Rows in order, and the files they come from as (name relative to the input, path)."""

    def files(self) -> list[tuple[str, Path]]: ...

    def blocks(self) -> Iterator[RowBlock]: ...


def natural_key(path: str | Path) -> list[tuple[int, int, str]]:
    """Sort key under which `part2.txt` comes before `part10.txt`."""
    pieces = re.split(r"([0-9]+)", str(path))
    return [(1, int(piece), "") if number % 2 else (0, 0, piece) for number, piece in enumerate(pieces)]


class PackedTextSource:
    """`part*.txt`: a row a line, decimal ids separated by spaces. Files are read in natural order."""

    def __init__(self, paths: Sequence[Path]) -> None:
        problems = [
            f"{path}: no such file; --input takes the part*.txt files of stage 3"
            for path in paths
            if not path.is_file()
        ]
        if not paths:
            problems.append("--input: no file given; it takes the part*.txt files of stage 3")
        if len(set(paths)) < len(paths):
            twice = sorted({str(path) for path in paths if paths.count(path) > 1})
            problems.append(
                f"--input: {', '.join(twice)} given twice, and its rows would be trained on twice"
            )
        if problems:
            raise DataError(*problems)
        self._paths = sorted(paths, key=natural_key)

    def files(self) -> list[tuple[str, Path]]:
        return [(path.name, path) for path in self._paths]

    def blocks(self) -> Iterator[RowBlock]:
        for path in self._paths:
            yield from _text_blocks(path)


def _text_blocks(path: Path) -> Iterator[RowBlock]:
    line = 1
    kept: list[bytes] = []  # the beginning of a line that the last read cut
    with path.open("rb") as file:
        while data := file.read(TEXT_BLOCK_BYTES):
            cut = data.rfind(b"\n") + 1
            if cut:
                text = b"".join((*kept, data[:cut]))
                yield _parse_text(text, path, line)
                line += text.count(b"\n")
                kept = []
            kept.append(data[cut:])
            if sum(map(len, kept)) > LONGEST_LINE_BYTES:
                raise DataError(
                    f"{path} line {line}: longer than {LONGEST_LINE_BYTES >> 20} MiB; "
                    "a line holds the ids of one packed row"
                )
    text = b"".join(kept)
    if text:
        yield _parse_text(text + b"\n", path, line)
    elif line == 1:
        raise DataError(f"{path}: the file is empty; remove it from --input or write it again")


def _parse_text(text: bytes, path: Path, first_line: int) -> RowBlock:
    """Parse whole lines (`text` ends with a newline); `first_line` counts from 1."""
    if text.translate(None, b"0123456789 \t\r\n"):
        raise _malformed_id(text, path, first_line)
    characters = np.frombuffer(text, dtype=np.uint8)
    is_digit = characters >= ord("0")  # only digits and white space are left
    begins_id = is_digit.copy()
    begins_id[1:] &= ~is_digit[:-1]
    line_starts = np.flatnonzero(characters == ord("\n")) + 1
    line_starts = np.concatenate(([0], line_starts[:-1]))
    ids = np.flatnonzero(begins_id)
    row_lengths = np.diff(np.searchsorted(ids, line_starts), append=len(ids))
    if int(row_lengths.min()) == 0:
        raise DataError(
            f"{path} line {first_line + int(row_lengths.argmin())}: the line holds no ids; "
            "every line is a packed row: remove it"
        )
    # Text mode of fromstring (a separator is given) is not deprecated; 40 M ids/s. Ids beyond int64
    # saturate, and are then outside of any vocabulary.
    tokens = np.fromstring(text, dtype=np.int64, sep=" ")
    return RowBlock(tokens, row_lengths, lambda row: f"{path} line {first_line + row}")


def _malformed_id(text: bytes, path: Path, first_line: int) -> DataError:
    match = _STRAY_BYTE.search(text)
    at = match.start() if match else 0
    begin = max(text.rfind(separator, 0, at) for separator in (b" ", b"\t", b"\n", b"\r")) + 1
    word = text[begin : begin + 40].split()[0].decode("utf-8", "backslashreplace")
    line = first_line + text.count(b"\n", 0, at)
    return DataError(f"{path} line {line}: {word!r} is no token id; ids are decimal numbers, space separated")


class CacheSource:
    """One `datasets.Dataset` on disk; `name` says which in messages, e.g. `cache train`."""

    def __init__(self, dataset: datasets.Dataset, directory: Path, name: str) -> None:
        _check_cache_column(dataset, name)
        self._dataset = dataset
        self._directory = directory
        self._name = name

    def files(self) -> list[tuple[str, Path]]:
        paths = [Path(entry["filename"]) for entry in self._dataset.cache_files]
        root = self._directory.resolve()
        return [
            (path.relative_to(root).as_posix() if path.is_relative_to(root) else path.name, path)
            for path in (path.resolve() for path in paths)
        ]

    def blocks(self) -> Iterator[RowBlock]:
        first_row = 0
        column_only = self._dataset.select_columns([CACHE_COLUMN]).with_format("arrow")
        for table in column_only.iter(batch_size=CACHE_BLOCK_ROWS):
            for chunk in table.column(CACHE_COLUMN).chunks:
                if len(chunk):
                    yield _arrow_block(chunk, self._name, first_row)
                first_row += len(chunk)


def open_cache(directory: Path) -> dict[str, CacheSource]:
    """The datasets of `datasets.save_to_disk(directory)` by split; a single `Dataset` has the key ''."""
    if not directory.is_dir():
        raise DataError(f"{directory}: no such directory; --input takes what stage 4 saved with save_to_disk")
    is_dict = (directory / "dataset_dict.json").is_file()
    if not is_dict and not (directory / "state.json").is_file():
        raise DataError(
            f"{directory}: neither dataset_dict.json nor state.json in it, so it is no dataset on disk; "
            "--input takes what datasets.DatasetDict.save_to_disk wrote"
        )
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
                raise DataError(_no_rows_message(str(state.parent)))


def _no_rows_message(name: str) -> str:
    return f"{name}: holds no rows, and an empty store cannot be trained on; fill the split or leave it out"


def _check_cache_column(dataset: datasets.Dataset, name: str) -> None:
    import pyarrow

    columns = dataset.column_names
    if CACHE_COLUMN not in columns:
        raise DataError(
            f"{name}: no column {CACHE_COLUMN!r}, only {', '.join(columns) or 'none'}; "
            "save the packed rows as lists of ids in that column"
        )
    if len(dataset) == 0:
        raise DataError(_no_rows_message(name))
    kind = dataset.data.schema.field(CACHE_COLUMN).type
    is_list = any(
        test(kind)
        for test in (pyarrow.types.is_list, pyarrow.types.is_large_list, pyarrow.types.is_fixed_size_list)
    )
    if not is_list or not pyarrow.types.is_integer(kind.value_type):
        raise DataError(f"{name}: column {CACHE_COLUMN!r} is {kind}; a row is a list of integer ids")


def _arrow_block(chunk: pyarrow.Array, name: str, first_row: int) -> RowBlock:
    """A list array as numpy views of its values and offsets (no copy)."""

    def place(row: int) -> str:
        return f"{name} row {first_row + row}"

    if chunk.null_count:
        row = int(np.argmax(chunk.is_null().to_numpy(zero_copy_only=False)))
        raise DataError(f"{place(row)}: is null; every row is a list of ids")
    values = chunk.flatten()  # of a sliced chunk only its own part
    row_lengths = chunk.value_lengths().to_numpy(zero_copy_only=False).astype(np.int64)
    if int(row_lengths.min()) == 0:
        raise DataError(f"{place(int(row_lengths.argmin()))}: holds no ids; remove empty rows")
    if values.null_count:
        at = int(np.argmax(values.is_null().to_numpy(zero_copy_only=False)))
        row = int(np.searchsorted(np.cumsum(row_lengths), at, side="right"))
        raise DataError(f"{place(row)}: holds a null; ids are numbers")
    return RowBlock(values.to_numpy(), row_lengths, place)


class SourceHasher:
    """Hashes source files in a thread while their rows are read: hashing is as slow as all the rest."""

    def __init__(self, files: Sequence[tuple[str, Path]]) -> None:
        self._files = files
        self._stopped = threading.Event()
        self._found: list[SourceFile] = []
        self._error: OSError | None = None
        self._thread = threading.Thread(target=self._run, name="source-hasher", daemon=True)

    def __enter__(self) -> SourceHasher:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._thread.join()

    def result(self) -> tuple[SourceFile, ...]:
        """Wait for the hashes, in the order of the files."""
        self._thread.join()
        if self._error is not None:
            raise DataError(f"{self._error.filename}: cannot read ({self._error.strerror})") from self._error
        return tuple(self._found)

    def _run(self) -> None:
        try:
            for name, path in self._files:
                size = path.stat().st_size
                self._found.append(SourceFile(name, size, file_sha256(path, self._stopped)))
        except OSError as error:
            self._error = error
