"""Writes a token store so that its final names only ever show a whole one.

Everything goes to `P.bin.tmp`, `P.idx.tmp`, `P.json.tmp`, is synced and renamed, `.json` last.
`P.json.tmp` is also the lock: its holder is the one process that writes `P`, whoever finds it
unlocked may clean up after a killed run, and while it has content that run was renaming.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np

from usdm_megatron.data.token_store import (
    INDEX_HEADER,
    INDEX_MAGIC,
    INDEX_VERSION,
    LENGTH_DTYPE,
    POINTER_DTYPE,
    TOKEN_DTYPES,
    SourceFile,
    StorePaths,
    StoreSummary,
    token_dtype,
)
from usdm_megatron.errors import DataError
from usdm_megatron.vocab import Vocabulary


class TokenStoreWriter:
    """Writes one store: `append` blocks of rows, `finish` once; the end of the `with` block publishes it.

    An exception inside the `with` block removes the temporary files and leaves the final names as
    they were. With several writers in one `with`, finish all of them inside it: then nothing is
    published unless everything is on disk.
    """

    def __init__(
        self, prefix: str | Path, vocabulary: Vocabulary, *, row_capacity: int, overwrite: bool = False
    ) -> None:
        self._prefix = prefix
        self._vocabulary = vocabulary
        self._row_capacity = row_capacity
        self._overwrite = overwrite
        self._dtype = token_dtype(vocabulary)
        self._final = StorePaths.of(prefix)
        self._temporary = self._final.temporary()
        self._bin_hash = hashlib.sha256()
        self._sample_lengths: list[np.ndarray] = []
        self._samples_per_row: list[np.ndarray] = []
        self._rows = self._tokens = self._longest_row = 0
        self._largest_id = -1
        self._finished = False

    def __enter__(self) -> TokenStoreWriter:
        with _reported(self._final.json):
            self._final.json.parent.mkdir(parents=True, exist_ok=True)
            self._json = _open_locked(self._temporary.json, self._prefix)
            try:
                self._clear_the_way()
                self._bin = self._temporary.bin.open("wb")
            except BaseException:
                self._remove_temporaries()
                raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bin.close()
        if kind is not None or not self._finished:
            self._remove_temporaries()
            if kind is None:
                raise RuntimeError(f"{self._prefix}: the writer was left without finish()")
            return
        with _reported(self._final.json):
            self._publish()

    def append(
        self,
        tokens: np.ndarray,
        sample_lengths: np.ndarray,
        samples_per_row: np.ndarray,
        place: Callable[[int], str] | None = None,
    ) -> None:
        """Append whole rows: `tokens` `[T]` of any integer dtype, `sample_lengths` `[samples]` summing to T,
        `samples_per_row` `[R]` summing to samples.

        Ids are checked against the vocabulary and rows against the capacity; the `DataError` names the
        row, and `place(row of this block)` where it came from.
        """
        sample_ends = np.cumsum(sample_lengths, dtype=np.int64)
        row_ends = sample_ends[np.cumsum(samples_per_row, dtype=np.int64) - 1]
        row_lengths = np.diff(row_ends, prepend=0)
        if len(row_ends) == 0 or row_ends[-1] != len(tokens) or sample_ends[-1] != len(tokens):
            raise ValueError("tokens, sample_lengths and samples_per_row do not describe the same rows")
        if min(int(np.min(sample_lengths)), int(np.min(samples_per_row))) < 1:
            raise ValueError("a row holds at least one sample, and a sample at least one token")

        def where(row: int) -> str:
            return f"row {self._rows + row}" + (f" ({place(row)})" if place else "")

        longest = int(row_lengths.max())
        if longest > self._row_capacity:
            row = int(np.argmax(row_lengths > self._row_capacity))
            raise DataError(
                f"{self._prefix}: {where(row)} holds {row_lengths[row]} tokens, more than --seq-length "
                f"{self._row_capacity}; pass a larger --seq-length or pack the rows again"
            )
        largest, smallest = int(tokens.max()), int(tokens.min())
        if largest >= self._vocabulary.size or smallest < 0:
            at = int(np.argmax((tokens < 0) | (tokens >= self._vocabulary.size)))
            row = int(np.searchsorted(row_ends, at, side="right"))
            raise DataError(
                f"{self._prefix}: {where(row)} holds id {int(tokens[at])}, outside the vocabulary of "
                f"{self._vocabulary.size} ids (0 to {self._vocabulary.size - 1}); it was made with another "
                "tokenizer: check --vocab and --text-vocab-size"
            )
        stored = np.ascontiguousarray(tokens, dtype=self._dtype)
        with _reported(self._temporary.bin):
            self._bin.write(stored.data)
        self._bin_hash.update(stored.data)
        self._sample_lengths.append(np.asarray(sample_lengths, dtype=LENGTH_DTYPE))
        self._samples_per_row.append(np.asarray(samples_per_row, dtype=np.int64))
        self._rows += len(row_ends)
        self._tokens += len(tokens)
        self._longest_row = max(self._longest_row, longest)
        self._largest_id = max(self._largest_id, largest)

    def finish(
        self,
        *,
        tokenizer_sha256: str | None = None,
        sources: Sequence[SourceFile] = (),
        options: Mapping[str, Any] | None = None,
        notices: Mapping[str, int] | None = None,
    ) -> StoreSummary:
        """Write the index and the summary and sync all three files; an empty store is a `DataError`."""
        if self._rows == 0:
            raise DataError(f"{self._prefix}: the input holds no rows; an empty store cannot be trained on")
        index = self._index_bytes()
        summary = StoreSummary(
            rows=self._rows,
            samples=sum(map(len, self._sample_lengths)),
            tokens=self._tokens,
            longest_row=self._longest_row,
            row_capacity=self._row_capacity,
            largest_id=self._largest_id,
            vocabulary=self._vocabulary,
            bin_bytes=self._tokens * self._dtype.itemsize,
            idx_bytes=len(index),
            bin_sha256=self._bin_hash.hexdigest(),
            idx_sha256=hashlib.sha256(index).hexdigest(),
            tokenizer_sha256=tokenizer_sha256,
            sources=tuple(sources),
            options=dict(options or {}),
            notices=dict(notices or {}),
        )
        with _reported(self._final.json):
            _sync(self._bin)
            with self._temporary.idx.open("wb") as file:
                file.write(index)
                _sync(file)
            self._json.write(summary.to_json().encode())
            _sync(self._json)
        self._finished = True
        return summary

    def _index_bytes(self) -> bytes:
        lengths = np.concatenate(self._sample_lengths)
        pointers = np.zeros(len(lengths), dtype=POINTER_DTYPE)
        np.cumsum(lengths[:-1], out=pointers[1:])
        pointers *= self._dtype.itemsize
        row_samples = np.zeros(self._rows + 1, dtype=POINTER_DTYPE)
        np.cumsum(np.concatenate(self._samples_per_row), out=row_samples[1:])
        code = next(code for code, dtype in TOKEN_DTYPES.items() if dtype == self._dtype)
        header = INDEX_HEADER.pack(INDEX_MAGIC, INDEX_VERSION, code, len(lengths), len(row_samples))
        return b"".join((header, lengths.tobytes(), pointers.tobytes(), row_samples.tobytes()))

    def _clear_the_way(self) -> None:
        """Remove what a killed run left and refuse to replace a store unasked (the lock is held)."""
        killed_while_renaming = os.fstat(self._json.fileno()).st_size > 0 and not self._final.json.exists()
        if killed_while_renaming:
            self._final.bin.unlink(missing_ok=True)
            self._final.idx.unlink(missing_ok=True)
        self._json.truncate(0)
        self._temporary.bin.unlink(missing_ok=True)
        self._temporary.idx.unlink(missing_ok=True)
        existing = [path for path in self._final if path.exists()]
        if existing and not self._overwrite:
            raise DataError(
                f"{self._prefix}: {', '.join(path.name for path in existing)} exists already; "
                "pass --overwrite to replace it or choose another --output-prefix"
            )

    def _publish(self) -> None:
        """Rename the three files, `.json` last; when overwriting, the old `.json` goes first."""
        renamed: list[Path] = []
        try:
            self._final.json.unlink(missing_ok=True)
            for temporary, final in zip(self._temporary, self._final, strict=True):
                os.replace(temporary, final)
                renamed.append(final)
            _sync_directory(self._final.json.parent)
        except BaseException:
            for path in renamed:
                path.unlink(missing_ok=True)
            self._remove_temporaries()
            raise
        self._json.close()

    def _remove_temporaries(self) -> None:
        for path in self._temporary:  # .json.tmp, the lock, last
            path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # a full disk fails once more when the buffer is flushed
            self._json.close()


def _open_locked(path: Path, prefix: str | Path) -> BinaryIO:
    """Open `path` for writing, keeping its content, as its one owner; `DataError` if there is another."""
    while True:
        file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666), "r+b")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise DataError(f"{prefix}: another process is writing it now; wait for its end") from None
        except OSError:
            pass  # a file system without locks (some Lustre mounts): two writers are the user's care
        # The owner before us may have renamed or removed the file between open and lock.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                return file
        file.close()


@contextlib.contextmanager
def _reported(path: Path) -> Iterator[None]:
    """Turn an `OSError` (disk full, read-only directory) into a `DataError` that names the file."""
    try:
        yield
    except OSError as error:
        raise DataError(
            f"{error.filename or path}: cannot write ({error.strerror}); "
            "free space, or choose another --output-prefix"
        ) from error


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
