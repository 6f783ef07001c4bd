"""Megatron's `.idx` format (megatron-core 0.16.1, `core/datasets/indexed_dataset.py`), written and validated.

magic, u64 version, u8 dtype code, u64 sequences N, u64 documents D + 1,
int32 lengths [N], int64 byte pointers [N], int64 document indices [D + 1]
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from usdm_megatron.errors import DataError

INDEX_MAGIC = b"MMIDIDX\x00\x00"
INDEX_VERSION = 1
INDEX_HEADER = struct.Struct("<9sQBQQ")  # magic, version, dtype code, sequences, documents + 1
# by Megatron's dtype code
TOKEN_DTYPES: dict[int, np.dtype[Any]] = {8: np.dtype("<u2"), 4: np.dtype("<i4")}
MASK_DTYPES: dict[int, np.dtype[Any]] = {1: np.dtype("u1")}
LENGTH_DTYPE = np.dtype("<i4")
POINTER_DTYPE = np.dtype("<i8")
MOST_IDS = 1 << 31  # of a vocabulary, by the widest of `TOKEN_DTYPES`
MOST_ROW_TOKENS = (1 << 31) - 1  # by `LENGTH_DTYPE`
PREPROCESS_HINT = "write it with `python tools/preprocess_data.py`"


@dataclass(frozen=True)
class Index:
    """The arrays of an `.idx`, validated: N sequences, D documents."""

    dtype: np.dtype[Any]
    sample_lengths: np.ndarray  # int32 [N]
    row_samples: np.ndarray  # int64 [D + 1]: first sample of each row, then N
    row_tokens: np.ndarray  # int64 [D + 1]: first token of each row, then the number of tokens


def index_bytes(dtype: np.dtype[Any], sample_lengths: np.ndarray, samples_per_row: np.ndarray) -> bytes:
    """The `.idx` of samples (`sample_lengths` `[N]`) in rows (`samples_per_row` `[D]` summing to N)."""
    lengths = np.ascontiguousarray(sample_lengths, dtype=LENGTH_DTYPE)
    pointers = np.zeros(len(lengths), dtype=POINTER_DTYPE)
    np.cumsum(lengths[:-1], out=pointers[1:])
    pointers *= dtype.itemsize
    row_samples = np.zeros(len(samples_per_row) + 1, dtype=POINTER_DTYPE)
    np.cumsum(samples_per_row, out=row_samples[1:])
    code = next(code for code, known in {**TOKEN_DTYPES, **MASK_DTYPES}.items() if known == dtype)
    header = INDEX_HEADER.pack(INDEX_MAGIC, INDEX_VERSION, code, len(lengths), len(row_samples))
    return b"".join((header, lengths.tobytes(), pointers.tobytes(), row_samples.tobytes()))


def read_index(path: Path, bin_bytes: int, dtypes: dict[int, np.dtype[Any]] = TOKEN_DTYPES) -> Index:
    """Map and validate an `.idx` against the size of its `.bin`; every message names the rule that fails."""

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
    if code not in dtypes:
        expected_codes = " or ".join(f"{known} ({dtype.name})" for known, dtype in dtypes.items())
        raise damaged(f"dtype code is {code}, expected {expected_codes}")
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
    dtype = dtypes[code]
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
    return Index(dtype, lengths, row_samples, row_tokens)
