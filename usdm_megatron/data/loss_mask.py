"""The second pair of a store for fine-tuning: which tokens are targets.

    P_loss_mask.bin          uint8, 1 where the token is a target: to be predicted from the tokens before it
    P_loss_mask.idx          as P.idx, the same samples and rows
    P_loss_mask.targets      int32 [rows], little-endian: targets of every row, so that counting a step's
                             reads no mask

A sample's first token is never a target: nothing of its own sample comes before it. So a row has as
many targets whether or not the loss crosses sample boundaries.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from usdm_megatron.data.token_index import MASK_DTYPES, PREPROCESS_HINT, Index, index_bytes, read_index
from usdm_megatron.errors import DataError

MASK_DTYPE = np.dtype("u1")
TARGETS_DTYPE = np.dtype("<i4")
_CHUNK_BYTES = 1 << 22


@dataclass(frozen=True)
class LossMaskPaths:
    """The three files of the loss mask of the store `prefix`."""

    bin: Path
    idx: Path
    targets: Path

    @classmethod
    def of(cls, prefix: str | Path) -> LossMaskPaths:
        return cls(*(Path(f"{prefix}_loss_mask.{suffix}") for suffix in ("bin", "idx", "targets")))

    def __iter__(self) -> Iterator[Path]:
        return iter((self.bin, self.idx, self.targets))


@dataclass(frozen=True)
class LossMaskSummary:
    """What `P.json` records of the mask."""

    targets: int
    bin_sha256: str
    idx_sha256: str
    targets_sha256: str

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> LossMaskSummary:
        summary = cls(**record)
        digests = (summary.bin_sha256, summary.idx_sha256, summary.targets_sha256)
        if type(summary.targets) is not int or not all(isinstance(digest, str) for digest in digests):
            raise ValueError(f"loss_mask: {record!r} is no summary of a mask")
        return summary

    def to_record(self) -> dict[str, Any]:
        return asdict(self)


def without_first_tokens(mask: np.ndarray, sample_lengths: np.ndarray) -> np.ndarray:
    """A copy of `mask` (uint8 `[T]`) that is 0 at the first token of every sample."""
    cleared = mask.astype(MASK_DTYPE, copy=True)
    cleared[np.cumsum(sample_lengths) - sample_lengths] = 0
    return cleared


def targets_per_row(mask: np.ndarray, row_lengths: np.ndarray) -> np.ndarray:
    """Targets of every row, int32 `[R]`, of a mask of 0 and 1 over rows laid end to end."""
    if len(row_lengths) == 0:
        return np.zeros(0, dtype=TARGETS_DTYPE)
    return np.add.reduceat(mask, np.cumsum(row_lengths) - row_lengths, dtype=TARGETS_DTYPE)


def mask_index_bytes(sample_lengths: np.ndarray, samples_per_row: np.ndarray) -> bytes:
    """`P_loss_mask.idx`."""
    return index_bytes(MASK_DTYPE, sample_lengths, samples_per_row)


class LossMask:
    """The validated, read-only loss mask of a store."""

    def __init__(
        self, prefix: str | Path, summary: LossMaskSummary, values: np.ndarray, row_targets: np.ndarray
    ) -> None:
        self._paths = LossMaskPaths.of(prefix)
        self._summary = summary
        self.values = values  # uint8 [tokens of the store]
        self.row_targets = row_targets  # int64 [rows]

    @classmethod
    def open(cls, prefix: str | Path, summary: LossMaskSummary, tokens: Index) -> LossMask:
        """Open the mask of the store whose tokens have the index `tokens`; reads no mask.

        `DataError` if a file is missing or damaged, or describes other samples or rows.
        """
        paths = LossMaskPaths.of(prefix)
        missing = [path.name for path in paths if not path.is_file()]
        if missing:
            raise DataError(
                f"{prefix}: {', '.join(missing)} not found, but its tokens come with a loss mask: without it "
                f"the instruction would be trained on; copy all files of the store, or {PREPROCESS_HINT}"
            )
        index = read_index(paths.idx, paths.bin.stat().st_size, MASK_DTYPES)
        for name in ("sample_lengths", "row_samples"):
            if not np.array_equal(getattr(index, name), getattr(tokens, name)):
                raise DataError(
                    f"{paths.idx}: describes other samples or rows than {prefix}.idx: the files are from "
                    f"different stores; {PREPROCESS_HINT} again"
                )
        row_targets = _read_targets(paths.targets, np.diff(tokens.row_tokens), summary.targets)
        values = np.memmap(paths.bin, dtype=MASK_DTYPE, mode="r").view(np.ndarray)
        return cls(prefix, summary, values, row_targets)

    def problems(self, index: Index) -> list[str]:
        """Read every byte: what is wrong with checksums, values or counts, as full sentences."""
        digest, largest = hashlib.sha256(), 0
        for start in range(0, len(self.values), _CHUNK_BYTES):
            chunk = self.values[start : start + _CHUNK_BYTES]
            digest.update(chunk.data)
            largest = max(largest, int(chunk.max()))
        found = []
        for path, sha256, recorded in (
            (self._paths.bin, digest.hexdigest(), self._summary.bin_sha256),
            (self._paths.idx, _sha256(self._paths.idx), self._summary.idx_sha256),
            (self._paths.targets, _sha256(self._paths.targets), self._summary.targets_sha256),
        ):
            if sha256 != recorded:
                found.append(
                    f"{path}: sha256 is {sha256}, the store's .json records {recorded}: the file changed "
                    "since it was written; preprocess again or copy it again"
                )
        if largest > 1:
            found.append(f"{self._paths.bin}: holds {largest}, a mask is 0 or 1; {PREPROCESS_HINT} again")
        elif not np.array_equal(targets_per_row(self.values, np.diff(index.row_tokens)), self.row_targets):
            found.append(
                f"{self._paths.targets}: does not count the targets of {self._paths.bin.name}; "
                f"{PREPROCESS_HINT} again"
            )
        return found


def _read_targets(path: Path, row_lengths: np.ndarray, recorded: int) -> np.ndarray:
    if path.stat().st_size != TARGETS_DTYPE.itemsize * len(row_lengths):
        raise DataError(
            f"{path}: {path.stat().st_size} bytes, but the counts of {len(row_lengths)} rows take "
            f"{TARGETS_DTYPE.itemsize * len(row_lengths)}; {PREPROCESS_HINT} again or copy it again"
        )
    targets = np.fromfile(path, dtype=TARGETS_DTYPE).astype(np.int64)
    wrong = (targets < 0) | (targets >= row_lengths)
    if np.any(wrong):
        row = int(np.argmax(wrong))
        raise DataError(
            f"{path}: counts {targets[row]} targets in row {row} of {row_lengths[row]} tokens; "
            f"{PREPROCESS_HINT} again"
        )
    if int(targets.sum()) != recorded:
        raise DataError(
            f"{path}: counts {int(targets.sum())} targets, the store's .json records {recorded}: the files "
            f"are from different stores; {PREPROCESS_HINT} again"
        )
    return targets


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
