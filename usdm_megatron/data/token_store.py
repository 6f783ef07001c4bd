"""The packed token store: Megatron's `.bin`/`.idx` pair with a `.json` that says what is in it.

    P.bin   token ids, little-endian uint16 (int32 where the vocabulary is larger), rows one after another
    P.idx   lengths of samples, and which samples are a row (`token_index.py`)
    P.json  `StoreSummary`: counts, vocabulary, origin, checksums; renamed last, so it marks a whole store
    P_loss_mask.bin, .idx, .targets  for fine-tuning: which tokens are targets (`loss_mask.py`)

document = packed row, sequence = sample. Megatron-core's `IndexedDataset` (0.16.1,
`core/datasets/indexed_dataset.py`) reads the same files, but checks nothing and closes its map
under live arrays; this reader validates everything that costs no pass over the tokens.
Written by `token_store_writer.TokenStoreWriter`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

from usdm_megatron.data.loss_mask import LossMask, LossMaskSummary
from usdm_megatron.data.token_index import MOST_IDS, PREPROCESS_HINT, TOKEN_DTYPES, Index, read_index
from usdm_megatron.errors import DataError
from usdm_megatron.vocab import Vocabulary

FORMAT_VERSION = 1
MASKED_FORMAT_VERSION = 2  # with a loss mask: a reader that knows of none must not train on all tokens
CHUNK_TOKENS = 1 << 22  # tokens read at a time where the whole store is scanned


@dataclass(frozen=True)
class StorePaths:
    """The three files of the store `prefix`; a loss mask has its own (`LossMaskPaths`)."""

    bin: Path
    idx: Path
    json: Path

    @classmethod
    def of(cls, prefix: str | Path) -> StorePaths:
        return cls(*(Path(f"{prefix}.{suffix}") for suffix in ("bin", "idx", "json")))

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
    hash: str  # with its algorithm: "xxh128:0123…"

    @classmethod
    def with_xxh128(cls, name: str, size_bytes: int, digest: str) -> SourceFile:
        return cls(name, size_bytes, f"xxh128:{digest}")

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> SourceFile:
        """As JSON holds it; some stores have `sha256` instead of `hash`."""
        if "sha256" in record:
            return cls(record["name"], record["bytes"], f"sha256:{record['sha256']}")
        return cls(**record)


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
    loss_mask: LossMaskSummary | None = None  # None: every token is a target

    @property
    def fill(self) -> float:
        """Mean row length over the row capacity."""
        return self.tokens / (self.rows * self.row_capacity)

    @property
    def identity(self) -> str:
        """A hash of the store's content: equal for equal tokens, samples, rows and targets, anywhere."""
        digests = f"{self.bin_sha256} {self.idx_sha256}"
        if self.loss_mask:
            digests += f" {self.loss_mask.bin_sha256}"
        return hashlib.sha256(digests.encode()).hexdigest()

    def to_json(self) -> str:
        version = MASKED_FORMAT_VERSION if self.loss_mask else FORMAT_VERSION
        record = {"format_version": version, "fill": self.fill, **asdict(self)}
        record["vocabulary"] = self.vocabulary.to_dict()
        if self.loss_mask is None:
            del record["loss_mask"]
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
        if record["format_version"] not in (FORMAT_VERSION, MASKED_FORMAT_VERSION):
            raise DataError(
                f"{path}: format version {record['format_version']!r}, this package reads {FORMAT_VERSION} "
                f"and {MASKED_FORMAT_VERSION}; {PREPROCESS_HINT} again"
            )
        try:
            return cls._from_record(record)
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise DataError(
                f"{path}: a field is missing or malformed ({error!r}); {PREPROCESS_HINT} again"
            ) from error

    @classmethod
    def _from_record(cls, record: dict[str, Any]) -> StoreSummary:
        record = {"loss_mask": None} | record if record["format_version"] == FORMAT_VERSION else record
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
        _check_ids(values["vocabulary"])
        values["sources"] = tuple(SourceFile.from_record(source) for source in values["sources"])
        values["options"] = dict(values["options"])
        values["notices"] = dict(values["notices"])
        for name, count in values["notices"].items():
            if type(count) is not int:
                raise ValueError(f"notices: {name} is {count!r}, no count")
        if (values["loss_mask"] is None) != (record["format_version"] == FORMAT_VERSION):
            raise ValueError(f"format version {record['format_version']} and loss_mask disagree")
        if values["loss_mask"] is not None:
            values["loss_mask"] = LossMaskSummary.from_record(values["loss_mask"])
        return cls(**values)


def _check_ids(vocabulary: Vocabulary) -> None:
    """A `ValueError` for a vocabulary that no store was written with."""
    sizes = (vocabulary.text_size, vocabulary.unit_count)
    special = (vocabulary.bos_id, vocabulary.eos_id)
    if min(sizes + special) < 0 or max(special) >= vocabulary.size or vocabulary.size > MOST_IDS:
        raise ValueError(f"vocabulary: {vocabulary.to_dict()!r:.200} has ids outside of itself or of int32")


@dataclass(frozen=True)
class PackedRow:
    """One row: `tokens` `[T]` and `loss_mask` uint8 `[T]` (read-only views of the maps; None: all are
    targets), `sample_lengths` int32 `[samples]`, sum T."""

    tokens: np.ndarray
    sample_lengths: np.ndarray
    loss_mask: np.ndarray | None = None


class TokenStore:
    """A validated, read-only token store.

    Rows are views of the memory map and keep it alive. Opening reads the index but no tokens
    (10^9 tokens in well under 0.1 s); `verify` reads every byte.
    """

    def __init__(
        self,
        prefix: str,
        summary: StoreSummary,
        index: Index,
        tokens: np.ndarray,
        loss_mask: LossMask | None = None,
    ) -> None:
        self.prefix = prefix
        self.summary = summary
        self._index = index
        self._tokens = tokens
        self._loss_mask = loss_mask

    @classmethod
    def open(cls, prefix: str | Path) -> TokenStore:
        """Open the store `prefix` (`prefix.bin`, `.idx`, `.json`); `DataError` if it is not whole."""
        paths = StorePaths.of(prefix)
        missing = [path for path in paths if not path.is_file()]
        if missing:
            raise DataError(_missing_files_message(prefix, paths, missing))
        summary = StoreSummary.from_json(paths.json)
        bin_bytes = paths.bin.stat().st_size
        index = read_index(paths.idx, bin_bytes)
        _compare_with_summary(paths, summary, index, bin_bytes)
        # A plain ndarray over the map: slicing a memmap object costs microseconds a row.
        tokens = np.memmap(paths.bin, dtype=index.dtype, mode="r").view(np.ndarray)
        mask = LossMask.open(prefix, summary.loss_mask, index) if summary.loss_mask else None
        return cls(str(prefix), summary, index, tokens, mask)

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
        """`StoreSummary.identity`."""
        return self.summary.identity

    def __len__(self) -> int:
        return self.rows

    def row(self, row_id: int) -> PackedRow:
        """Row `row_id`, counted from 0; `IndexError` outside the store (no negative indices)."""
        if not 0 <= row_id < self.rows:
            raise IndexError(f"{self.prefix}: row {row_id} of {self.rows}")
        index = self._index
        span = slice(index.row_tokens[row_id], index.row_tokens[row_id + 1])
        lengths = index.sample_lengths[index.row_samples[row_id] : index.row_samples[row_id + 1]]
        mask = self._loss_mask.values[span] if self._loss_mask else None
        return PackedRow(self._tokens[span], lengths, mask)

    def sample_lengths(self) -> np.ndarray:
        """Tokens of every sample of the store, int32 `[samples]`, in order."""
        return self._index.sample_lengths

    def row_lengths(self) -> np.ndarray:
        """Tokens of every row, int64 `[rows]`."""
        return np.diff(self._index.row_tokens)

    def row_targets(self) -> np.ndarray | None:
        """Targets of every row by the loss mask, int64 `[rows]`, read without the mask; None without one."""
        return self._loss_mask.row_targets if self._loss_mask else None

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
        if self._loss_mask:
            problems += self._loss_mask.problems(self._index)
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


def _compare_with_summary(paths: StorePaths, summary: StoreSummary, index: Index, bin_bytes: int) -> None:
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
    if summary.longest_row > summary.row_capacity:
        problems.append(
            f"{paths.json}: records longest_row {summary.longest_row}, above its row_capacity of "
            f"{summary.row_capacity}; {PREPROCESS_HINT} again"
        )
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
