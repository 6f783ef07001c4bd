"""The packed token store: Megatron's `.bin`/`.idx` pair with a `.json` that says what is in it.

    P.bin   token ids, little-endian uint16 (int32 where the vocabulary is larger), rows one after another
    P.idx   magic, u64 version, u8 dtype code, u64 sequences N, u64 documents D + 1,
            int32 lengths [N], int64 byte pointers [N], int64 document indices [D + 1]
    P.json  `StoreSummary`: counts, vocabulary, origin, checksums; renamed last, so it marks a whole store

document = packed row, sequence = sample. Megatron-core's `IndexedDataset` (0.16.1,
`core/datasets/indexed_dataset.py`) reads the same files, but checks nothing and closes its map
under live arrays; this reader validates everything that costs no pass over the tokens.
Written by `token_store_writer.TokenStoreWriter`.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

from usdm_megatron.errors import DataError
from usdm_megatron.vocab import Vocabulary

FORMAT_VERSION = 1
INDEX_MAGIC = b"MMIDIDX\x00\x00"
INDEX_VERSION = 1
INDEX_HEADER = struct.Struct("<9sQBQQ")  # magic, version, dtype code, sequences, documents + 1
TOKEN_DTYPES: dict[int, np.dtype[Any]] = {8: np.dtype("<u2"), 4: np.dtype("<i4")}  # by Megatron's dtype code
LENGTH_DTYPE = np.dtype("<i4")
POINTER_DTYPE = np.dtype("<i8")
CHUNK_TOKENS = 1 << 22  # tokens read at a time where the whole store is scanned
PREPROCESS_HINT = "write it with `python tools/preprocess_data.py`"


@dataclass(frozen=True)
class StorePaths:
    """The three files of the store `prefix`."""

    bin: Path
    idx: Path
    json: Path

    @classmethod
    def of(cls, prefix: str | Path) -> StorePaths:
        return cls(*(Path(f"{prefix}.{suffix}") for suffix in ("bin", "idx", "json")))

    def temporary(self) -> StorePaths:
        """Where the files are written before they are renamed: the same directory, one name per store."""
        return StorePaths(*(path.with_name(path.name + ".tmp") for path in (self.bin, self.idx, self.json)))

    def __iter__(self) -> Iterator[Path]:
        return iter((self.bin, self.idx, self.json))


def token_dtype(vocabulary: Vocabulary) -> np.dtype[Any]:
    """The smallest dtype of `TOKEN_DTYPES` that holds every id."""
    return TOKEN_DTYPES[8] if vocabulary.size <= 1 << 16 else TOKEN_DTYPES[4]


@dataclass(frozen=True)
class SourceFile:
    """A file that a store was made from; `name` is relative to the input, so bytes don't depend on places."""

    name: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class StoreSummary:
    """What `P.json` records. `row_capacity` is `--seq-length`; lengths and counts are in tokens."""

    rows: int
    samples: int
    tokens: int
    longest_row: int
    row_capacity: int
    largest_id: int
    vocabulary: Vocabulary
    bin_bytes: int
    idx_bytes: int
    bin_sha256: str
    idx_sha256: str
    tokenizer_sha256: str | None = None
    sources: tuple[SourceFile, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)
    notices: dict[str, int] = field(default_factory=dict)  # oddities that were accepted, with their counts

    @property
    def fill(self) -> float:
        """Mean row length over the row capacity."""
        return self.tokens / (self.rows * self.row_capacity)

    def to_json(self) -> str:
        record = {"format_version": FORMAT_VERSION, "fill": self.fill, **asdict(self)}
        return json.dumps(record, indent=1) + "\n"

    @classmethod
    def from_json(cls, path: Path) -> StoreSummary:
        """Read `P.json`; a `DataError` for anything that `to_json` does not write."""
        try:
            record = json.loads(path.read_bytes())
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}: not JSON ({error}); {PREPROCESS_HINT} again") from error
        if not isinstance(record, dict) or "format_version" not in record:
            raise DataError(f"{path}: not the summary of a token store; {PREPROCESS_HINT} again")
        if record["format_version"] != FORMAT_VERSION:
            raise DataError(
                f"{path}: format version {record['format_version']!r}, this package reads {FORMAT_VERSION}; "
                f"{PREPROCESS_HINT} again"
            )
        try:
            return cls._from_record(record)
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise DataError(
                f"{path}: a field is missing or malformed ({error!r}); {PREPROCESS_HINT} again"
            ) from error

    @classmethod
    def _from_record(cls, record: dict[str, Any]) -> StoreSummary:
        values = {entry.name: record[entry.name] for entry in fields(cls)}
        for entry in fields(cls):
            if entry.type == "int" and (type(values[entry.name]) is not int or values[entry.name] < 0):
                raise ValueError(f"{entry.name}: {values[entry.name]!r} is no count")
            if entry.type == "str | None" and not isinstance(values[entry.name], str | None):
                raise ValueError(f"{entry.name}: {values[entry.name]!r} is no string")
            if entry.type == "str" and not isinstance(values[entry.name], str):
                raise ValueError(f"{entry.name}: {values[entry.name]!r} is no string")
        if values["row_capacity"] < 1 or values["rows"] < 1:
            raise ValueError("rows and row_capacity start at 1")
        values["vocabulary"] = Vocabulary.from_dict(values["vocabulary"])
        values["sources"] = tuple(SourceFile(**source) for source in values["sources"])
        values["options"] = dict(values["options"])
        values["notices"] = dict(values["notices"])
        return cls(**values)


@dataclass(frozen=True)
class PackedRow:
    """One row: `tokens` `[T]` (a read-only view of the map), `sample_lengths` int32 `[samples]`, sum T."""

    tokens: np.ndarray
    sample_lengths: np.ndarray


@dataclass(frozen=True)
class _Index:
    """The arrays of `P.idx`, validated: N sequences, D documents."""

    dtype: np.dtype[Any]
    sample_lengths: np.ndarray  # int32 [N]
    row_samples: np.ndarray  # int64 [D + 1]: first sample of each row, then N
    row_tokens: np.ndarray  # int64 [D + 1]: first token of each row, then the number of tokens


class TokenStore:
    """A validated, read-only token store.

    Rows are views of the memory map and keep it alive. Opening reads the index but no tokens
    (10^9 tokens in well under 0.1 s); `verify` reads every byte.
    """

    def __init__(self, prefix: str, summary: StoreSummary, index: _Index, tokens: np.ndarray) -> None:
        self.prefix = prefix
        self.summary = summary
        self._index = index
        self._tokens = tokens

    @classmethod
    def open(cls, prefix: str | Path) -> TokenStore:
        """Open the store `prefix` (`prefix.bin`, `.idx`, `.json`); `DataError` if it is not whole."""
        paths = StorePaths.of(prefix)
        missing = [path for path in paths if not path.is_file()]
        if missing:
            raise DataError(_missing_files_message(prefix, paths, missing))
        summary = StoreSummary.from_json(paths.json)
        bin_bytes = paths.bin.stat().st_size
        index = _read_index(paths.idx, bin_bytes)
        _compare_with_summary(paths, summary, index, bin_bytes)
        # A plain ndarray over the map: slicing a memmap object costs microseconds a row.
        tokens = np.memmap(paths.bin, dtype=index.dtype, mode="r").view(np.ndarray)
        return cls(str(prefix), summary, index, tokens)

    @property
    def rows(self) -> int:
        return self.summary.rows

    @property
    def tokens(self) -> int:
        return self.summary.tokens

    @property
    def longest_row(self) -> int:
        return self.summary.longest_row

    @property
    def identity(self) -> str:
        """A hash of the store's content: equal for equal tokens, samples and rows, wherever it lies."""
        digests = f"{self.summary.bin_sha256} {self.summary.idx_sha256}"
        return hashlib.sha256(digests.encode()).hexdigest()

    def __len__(self) -> int:
        return self.rows

    def row(self, row_id: int) -> PackedRow:
        """Row `row_id`, counted from 0; `IndexError` outside the store (no negative indices)."""
        if not 0 <= row_id < self.rows:
            raise IndexError(f"{self.prefix}: row {row_id} of {self.rows}")
        index = self._index
        tokens = self._tokens[index.row_tokens[row_id] : index.row_tokens[row_id + 1]]
        lengths = index.sample_lengths[index.row_samples[row_id] : index.row_samples[row_id + 1]]
        return PackedRow(tokens, lengths)

    def sample_lengths(self) -> np.ndarray:
        """Tokens of every sample of the store, int32 `[samples]`, in order."""
        return self._index.sample_lengths

    def row_lengths(self) -> np.ndarray:
        """Tokens of every row, int64 `[rows]`."""
        return np.diff(self._index.row_tokens)

    def token_chunks(self, chunk_tokens: int = CHUNK_TOKENS) -> Iterator[np.ndarray]:
        """All tokens in order, as views of at most `chunk_tokens`."""
        for start in range(0, self.tokens, chunk_tokens):
            yield self._tokens[start : start + chunk_tokens]

    def verify(self) -> None:
        """Read every byte: checksums as recorded and every id inside the vocabulary; else `DataError`."""
        problems = []
        paths = StorePaths.of(self.prefix)
        bin_hash, largest, smallest = hashlib.sha256(), -1, 0
        for chunk in self.token_chunks():
            bin_hash.update(chunk.data)
            largest = max(largest, int(chunk.max()))
            smallest = min(smallest, int(chunk.min()))
        for path, found, recorded in (
            (paths.bin, bin_hash.hexdigest(), self.summary.bin_sha256),
            (paths.idx, hashlib.sha256(paths.idx.read_bytes()).hexdigest(), self.summary.idx_sha256),
        ):
            if found != recorded:
                problems.append(
                    f"{path}: sha256 is {found}, {paths.json.name} records {recorded}: the file changed "
                    "since it was written; preprocess again or copy it again"
                )
        size = self.summary.vocabulary.size
        if largest >= size or smallest < 0:
            problems.append(
                f"{paths.bin}: id {largest if largest >= size else smallest} is outside the vocabulary "
                f"of {size} ids; {PREPROCESS_HINT} again"
            )
        elif largest != self.summary.largest_id:
            problems.append(
                f"{paths.bin}: the largest id is {largest}, {paths.json.name} records "
                f"{self.summary.largest_id}; {PREPROCESS_HINT} again"
            )
        if problems:
            raise DataError(*problems)


def _missing_files_message(prefix: str | Path, paths: StorePaths, missing: list[Path]) -> str:
    if missing == [paths.json]:
        return (
            f"{paths.json}: missing, so {prefix} was not written by this project or not to its end; "
            f"{PREPROCESS_HINT} (cache or packed, --output-prefix {prefix} --overwrite)"
        )
    hint = f"a store is named by its prefix, without .bin; {PREPROCESS_HINT} (--output-prefix {prefix})"
    return f"{prefix}: no token store, {', '.join(path.name for path in missing)} not found; {hint}"


def _read_index(path: Path, bin_bytes: int) -> _Index:
    """Map and validate `P.idx` against the size of `P.bin`; every message names the rule that fails."""

    def damaged(why: str) -> DataError:
        return DataError(f"{path}: {why}; the file is damaged or not ours: {PREPROCESS_HINT} again")

    idx_bytes = path.stat().st_size
    if idx_bytes < INDEX_HEADER.size:
        raise damaged(f"{idx_bytes} bytes, shorter than the header of {INDEX_HEADER.size}")
    with path.open("rb") as file:
        header = INDEX_HEADER.unpack(file.read(INDEX_HEADER.size))
    magic, version, code, sequences, document_indices = header
    if magic != INDEX_MAGIC:
        raise damaged(f"magic is {magic!r}, not {INDEX_MAGIC!r}")
    if version != INDEX_VERSION:
        raise damaged(f"version is {version}, this package reads {INDEX_VERSION}")
    if code not in TOKEN_DTYPES:
        raise damaged(f"dtype code is {code}, expected 8 (uint16) or 4 (int32)")
    if sequences < 1 or document_indices < 2:
        raise damaged(f"{sequences} samples in {max(0, document_indices - 1)} rows: the store is empty")
    expected = INDEX_HEADER.size + 12 * sequences + 8 * document_indices
    if idx_bytes != expected:
        raise damaged(
            f"{idx_bytes} bytes, but {sequences} samples and {document_indices - 1} rows take {expected}"
        )

    raw = np.memmap(path, dtype=np.uint8, mode="r").view(np.ndarray)[INDEX_HEADER.size :]
    lengths = raw[: 4 * sequences].view(LENGTH_DTYPE)
    pointers = raw[4 * sequences : 12 * sequences].view(POINTER_DTYPE)
    row_samples = raw[12 * sequences :].view(POINTER_DTYPE)
    if int(lengths.min()) < 1:
        raise damaged(f"sample {int(lengths.argmin())} has {int(lengths.min())} tokens, the least is 1")
    dtype = TOKEN_DTYPES[code]
    ends = np.cumsum(lengths, dtype=np.int64)
    tokens = int(ends[-1])
    if bin_bytes != tokens * dtype.itemsize:
        raise DataError(
            f"{path.with_suffix('.bin')}: {bin_bytes} bytes, but {path.name} describes {tokens} tokens of "
            f"{dtype.itemsize} bytes = {tokens * dtype.itemsize}: truncated, or from another store; "
            f"{PREPROCESS_HINT} again or copy it again"
        )
    if int(pointers[0]) != 0 or not np.array_equal(pointers[1:], ends[:-1] * dtype.itemsize):
        raise damaged("the pointers are not the cumulated sample lengths")
    if int(row_samples[0]) != 0 or int(row_samples[-1]) != sequences or int(np.diff(row_samples).min()) < 1:
        raise damaged(f"the row starts do not rise from 0 to {sequences} samples")
    row_tokens = np.append(pointers[row_samples[:-1]] // dtype.itemsize, tokens)
    return _Index(dtype, lengths, row_samples, row_tokens)


def _compare_with_summary(paths: StorePaths, summary: StoreSummary, index: _Index, bin_bytes: int) -> None:
    found = {
        "rows": len(index.row_samples) - 1,
        "samples": len(index.sample_lengths),
        "tokens": int(index.row_tokens[-1]),
        "longest_row": int(np.diff(index.row_tokens).max()),
        "bin_bytes": bin_bytes,
        "idx_bytes": paths.idx.stat().st_size,
    }
    problems = [
        f"{paths.json}: records {name} {getattr(summary, name)}, but {paths.bin.name} and {paths.idx.name} "
        f"hold {value}: the files are from different stores; {PREPROCESS_HINT} again"
        for name, value in found.items()
        if getattr(summary, name) != value
    ]
    if token_dtype(summary.vocabulary) != index.dtype:
        problems.append(
            f"{paths.idx}: tokens are {index.dtype.name}, but {summary.vocabulary.size} ids are stored as "
            f"{token_dtype(summary.vocabulary).name}; {PREPROCESS_HINT} again"
        )
    if summary.largest_id >= summary.vocabulary.size:
        problems.append(
            f"{paths.json}: records largest_id {summary.largest_id}, outside its vocabulary of "
            f"{summary.vocabulary.size} ids; {PREPROCESS_HINT} again"
        )
    if problems:
        raise DataError(*problems)
