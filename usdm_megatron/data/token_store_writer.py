"""Writes a token store so that its final names only ever show a whole one.

Everything goes to `P.bin.tmp`, `P.idx.tmp`, `P.json.tmp`, is synced and renamed, `.json` last.
`P.json.tmp` is also the lock: its holder is the one process that writes `P`, whoever finds it
unlocked may clean up after a killed run, and while it has content that run was renaming.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from usdm_megatron.data.file_writing import begin_sync, open_locked, reported, sync, sync_directory
from usdm_megatron.data.loss_mask import (
    MASK_DTYPE,
    LossMaskPaths,
    LossMaskSummary,
    mask_index_bytes,
    targets_per_row,
)
from usdm_megatron.data.token_index import LENGTH_DTYPE, index_bytes
from usdm_megatron.data.token_store import SourceFile, StorePaths, StoreSummary, token_dtype
from usdm_megatron.errors import DataError
from usdm_megatron.vocab import Vocabulary

_WRITE_OUT_BYTES = 8 << 20  # handed to the disk at a time, so that the sync at the end finds little to do


class _HashedFile:
    """A file under a temporary name, and the sha256 of what was written to it."""

    def __init__(self, final: Path) -> None:
        self._temporary = _temporary(final)
        self._file = self._temporary.open("wb")
        self._hash = hashlib.sha256()
        self._bytes = self._bytes_begun = 0

    def write(self, data: bytes | memoryview) -> None:
        with reported(self._temporary):
            self._file.write(data)
            self._bytes += memoryview(data).nbytes
            if self._bytes - self._bytes_begun >= _WRITE_OUT_BYTES:
                begin_sync(self._file, self._bytes_begun)
                self._bytes_begun = self._bytes
        self._hash.update(data)

    def finish(self) -> str:
        """Sync the file; its sha256."""
        with reported(self._temporary):
            sync(self._file)
        return self._hash.hexdigest()

    def close(self) -> None:
        with contextlib.suppress(OSError):  # a full disk fails once more when the buffer is flushed
            self._file.close()


class TokenStoreWriter:
    """Writes one store: `append` blocks of rows, `finish` once; the end of the `with` block publishes it.

    `with_loss_mask` writes the second pair, and every `append` then takes a mask. An exception inside
    the `with` block removes the temporary files and leaves the final names as they were. With several
    writers in one `with`, finish all of them inside it: then nothing is published unless everything
    is on disk.
    """

    def __init__(
        self,
        prefix: str | Path,
        vocabulary: Vocabulary,
        *,
        row_capacity: int,
        overwrite: bool = False,
        with_loss_mask: bool = False,
    ) -> None:
        self._prefix = prefix
        self._vocabulary = vocabulary
        self._row_capacity = row_capacity
        self._overwrite = overwrite
        self._with_loss_mask = with_loss_mask
        self._dtype = token_dtype(vocabulary)
        self._final = StorePaths.of(prefix)
        self._final_mask = LossMaskPaths.of(prefix)
        self._sample_lengths: list[np.ndarray] = []
        self._samples_per_row: list[np.ndarray] = []
        self._row_targets: list[np.ndarray] = []
        self._rows = self._tokens = self._longest_row = 0
        self._largest_id = -1
        self._open_files: list[_HashedFile] = []
        self._finished = False

    def __enter__(self) -> TokenStoreWriter:
        with reported(self._final.json):
            self._final.json.parent.mkdir(parents=True, exist_ok=True)
            self._json = open_locked(_temporary(self._final.json), self._prefix)
            try:
                self._clear_the_way()
                self._bin = self._create(self._final.bin)
                if self._with_loss_mask:
                    self._mask_bin = self._create(self._final_mask.bin)
            except BaseException:
                self._remove_temporaries()
                raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in self._open_files:
            file.close()
        if kind is not None or not self._finished:
            self._remove_temporaries()
            if kind is None:
                raise RuntimeError(f"{self._prefix}: the writer was left without finish()")
            return
        with reported(self._final.json):
            self._publish()

    def append(
        self,
        tokens: np.ndarray,
        sample_lengths: np.ndarray,
        samples_per_row: np.ndarray,
        place: Callable[[int], str] | None = None,
        loss_mask: np.ndarray | None = None,
    ) -> None:
        """Append whole rows: `tokens` `[T]` of any integer dtype, `sample_lengths` `[samples]` summing to T,
        `samples_per_row` `[R]` summing to samples, `loss_mask` `[T]` of 0 and 1, 0 where a sample begins.

        Ids are checked against the vocabulary and rows against the capacity; the `DataError` names the
        row, and `place(row of this block)` where it came from.
        """
        sample_ends = np.cumsum(sample_lengths, dtype=np.int64)
        row_ends = sample_ends[np.cumsum(samples_per_row, dtype=np.int64) - 1]
        if len(row_ends) == 0 or row_ends[-1] != len(tokens) or sample_ends[-1] != len(tokens):
            raise ValueError("tokens, sample_lengths and samples_per_row do not describe the same rows")
        if min(int(np.min(sample_lengths)), int(np.min(samples_per_row))) < 1:
            raise ValueError("a row holds at least one sample, and a sample at least one token")
        if (loss_mask is not None) != self._with_loss_mask:
            raise ValueError("a store has a loss mask for all its rows or for none")
        row_lengths = np.diff(row_ends, prepend=0)

        def where(row: int) -> str:
            return f"{self._prefix}: row {self._rows + row}" + (f" ({place(row)})" if place else "")

        largest_id = check_rows(tokens, row_lengths, where, self._vocabulary, self._row_capacity)
        if loss_mask is not None:
            self._append_mask(loss_mask, sample_ends, row_lengths)
        self._bin.write(np.ascontiguousarray(tokens, dtype=self._dtype).data)
        self._sample_lengths.append(np.array(sample_lengths, dtype=LENGTH_DTYPE))  # a copy: theirs may change
        self._samples_per_row.append(np.array(samples_per_row, dtype=np.int64))
        self._rows += len(row_ends)
        self._tokens += len(tokens)
        self._longest_row = max(self._longest_row, int(row_lengths.max()))
        self._largest_id = max(self._largest_id, largest_id)

    def _append_mask(self, mask: np.ndarray, sample_ends: np.ndarray, row_lengths: np.ndarray) -> None:
        if len(mask) != int(sample_ends[-1]) or int(mask.max()) > 1 or int(mask.min()) < 0:
            raise ValueError("a loss mask holds 0 or 1 for every token")
        if mask[0] or np.any(mask[sample_ends[:-1]]):
            raise ValueError("a sample's first token is no target: nothing of its own comes before it")
        stored = np.ascontiguousarray(mask, dtype=MASK_DTYPE)
        self._mask_bin.write(stored.data)
        self._row_targets.append(targets_per_row(stored, row_lengths))

    def finish(
        self,
        *,
        tokenizer_sha256: str | None = None,
        sources: Sequence[SourceFile] = (),
        options: Mapping[str, Any] | None = None,
        notices: Mapping[str, int] | None = None,
    ) -> StoreSummary:
        """Write the indices and the summary and sync all files; an empty store is a `DataError`."""
        if self._rows == 0:
            raise DataError(f"{self._prefix}: the input holds no rows; an empty store cannot be trained on")
        sample_lengths = np.concatenate(self._sample_lengths)
        samples_per_row = np.concatenate(self._samples_per_row)
        index = index_bytes(self._dtype, sample_lengths, samples_per_row)
        summary = StoreSummary(
            rows=self._rows,
            samples=len(sample_lengths),
            tokens=self._tokens,
            longest_row=self._longest_row,
            row_capacity=self._row_capacity,
            largest_id=self._largest_id,
            vocabulary=self._vocabulary,
            bin_bytes=self._tokens * self._dtype.itemsize,
            idx_bytes=len(index),
            bin_sha256=self._bin.finish(),
            idx_sha256=self._write_whole(self._final.idx, index),
            tokenizer_sha256=tokenizer_sha256,
            sources=tuple(sources),
            options=dict(options or {}),
            notices=dict(notices or {}),
            loss_mask=self._finish_mask(sample_lengths, samples_per_row) if self._with_loss_mask else None,
        )
        with reported(self._final.json):
            self._json.write(summary.to_json().encode())
            sync(self._json)
        self._finished = True
        return summary

    def _finish_mask(self, sample_lengths: np.ndarray, samples_per_row: np.ndarray) -> LossMaskSummary:
        row_targets = np.concatenate(self._row_targets)
        index = mask_index_bytes(sample_lengths, samples_per_row)
        return LossMaskSummary(
            targets=int(row_targets.sum(dtype=np.int64)),
            bin_sha256=self._mask_bin.finish(),
            idx_sha256=self._write_whole(self._final_mask.idx, index),
            targets_sha256=self._write_whole(self._final_mask.targets, row_targets.tobytes()),
        )

    def _create(self, final: Path) -> _HashedFile:
        with reported(final):
            self._open_files.append(_HashedFile(final))
        return self._open_files[-1]

    def _write_whole(self, final: Path, content: bytes) -> str:
        """Write and sync one temporary file; its sha256."""
        file = self._create(final)
        file.write(content)
        return file.finish()

    def _files(self) -> Iterator[Path]:
        """The final names of all that a store may have, `.json` last: it marks a whole store."""
        yield from self._final_mask
        yield from self._final

    def _clear_the_way(self) -> None:
        """Remove what a killed run left and refuse to replace a store unasked (the lock is held)."""
        killed_while_renaming = os.fstat(self._json.fileno()).st_size > 0 and not self._final.json.exists()
        for path in self._files():
            if path == self._final.json:
                break
            _temporary(path).unlink(missing_ok=True)
            if killed_while_renaming:
                path.unlink(missing_ok=True)
        self._json.truncate(0)
        refuse_foreign_json(self._prefix)
        existing = [path for path in self._files() if path.exists()]
        if existing and not self._overwrite:
            raise DataError(
                f"{self._prefix}: {', '.join(path.name for path in existing)} exists already; "
                "pass --overwrite to replace it or choose another --output-prefix"
            )

    def _publish(self) -> None:
        """Rename the files, `.json` last; when overwriting, the old `.json` goes first."""
        renamed: list[Path] = []
        try:
            self._final.json.unlink(missing_ok=True)
            for path in self._files():
                if not self._with_loss_mask and path in self._final_mask:
                    path.unlink(missing_ok=True)  # of the store that is replaced
                    continue
                os.replace(_temporary(path), path)
                renamed.append(path)
            sync_directory(self._final.json.parent)
        except BaseException:
            for path in renamed:
                path.unlink(missing_ok=True)
            self._remove_temporaries()
            raise
        self._json.close()

    def _remove_temporaries(self) -> None:
        for file in self._open_files:
            file.close()
        for path in self._files():  # .json.tmp, the lock, last
            _temporary(path).unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # a full disk fails once more when the buffer is flushed
            self._json.close()


def refuse_foreign_json(prefix: str | Path) -> None:
    """`--overwrite` replaces stores: stage 2, for one, keeps lengths where a store would keep its summary."""
    paths = StorePaths.of(prefix)
    if paths.json.exists() and not (paths.bin.exists() or paths.idx.exists()):
        raise DataError(
            f"{paths.json}: there is no {paths.bin.name} to it, so it is of no token store and not replaced; "
            "move it away, or choose another --output-prefix"
        )


def check_rows(
    tokens: np.ndarray,
    row_lengths: np.ndarray,
    where: Callable[[int], str],
    vocabulary: Vocabulary,
    row_capacity: int,
) -> int:
    """Compare rows (`tokens` `[T]`, `row_lengths` `[R]`) with capacity and vocabulary; the largest id.

    The `DataError` names the first bad row by `where(row)`.
    """
    if int(row_lengths.max()) > row_capacity:
        row = int(np.argmax(row_lengths > row_capacity))
        raise DataError(
            f"{where(row)} holds {row_lengths[row]} tokens, more than --seq-length {row_capacity}; "
            "pass a larger --seq-length or pack the rows again with --repack"
        )
    largest_id = largest_as_unsigned(tokens)
    if largest_id >= vocabulary.size:
        at = int(np.argmax((tokens < 0) | (tokens >= vocabulary.size)))
        row = int(np.searchsorted(np.cumsum(row_lengths), at, side="right"))
        raise DataError(
            f"{where(row)} holds id {int(tokens[at])}, outside the vocabulary of {vocabulary.size} ids "
            f"(0 to {vocabulary.size - 1}); it was made with another tokenizer: check --vocab and "
            "--text-vocab-size"
        )
    return largest_id


def largest_as_unsigned(tokens: np.ndarray) -> int:
    """The largest of `tokens` `[T]`, T at least 1; where one is below 0, a number above all ids."""
    wide = tokens.astype(np.int32) if tokens.dtype in (np.int8, np.int16) else tokens
    return int(wide.view(f"u{wide.dtype.itemsize}").max())


def _temporary(path: Path) -> Path:
    """Where a file is written before it is renamed: the same directory, one name per store."""
    return path.with_name(path.name + ".tmp")
