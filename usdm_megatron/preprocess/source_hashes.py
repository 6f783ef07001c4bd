"""Hashes of input files, by which one that was changed is known: XXH3, 128 bits, as `xxh128sum` prints it.

sha256 would take a third of the time that `packed` takes, and longer than all the rest of `cache`.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path

import xxhash

from usdm_megatron.data.token_store import SourceFile
from usdm_megatron.errors import DataError

_BLOCK_BYTES = 256 << 10


def hash_file(path: Path, stopped: threading.Event | None = None) -> str:
    """Hex digest of a file's bytes; gives up (with one of a part) once `stopped` is set."""
    digest = xxhash.xxh3_128()
    block = memoryview(bytearray(_BLOCK_BYTES))
    with path.open("rb", buffering=0) as file:
        while not (stopped and stopped.is_set()) and (size := file.readinto(block)):
            digest.update(block[:size])
    return digest.hexdigest()


def hash_files(files: Sequence[tuple[str, Path]]) -> SourceFile:
    """One file, or several as one: then the hash is of what `xxh128sum` prints of them."""
    try:
        hashes = [(name, path.stat().st_size, hash_file(path)) for name, path in files]
    except OSError as error:
        raise _unreadable(error) from error
    if len(hashes) == 1:
        return SourceFile.with_xxh128(*hashes[0])
    listing = "".join(f"{digest}  {name}\n" for name, _, digest in hashes)
    return SourceFile.with_xxh128(
        group_name(files),
        sum(size for _, size, _ in hashes),
        xxhash.xxh3_128_hexdigest(listing.encode("utf-8", "surrogateescape")),
    )


def group_name(files: Sequence[tuple[str, Path]]) -> str:
    """What `hash_files` calls files that are recorded as one."""
    return files[0][0] if len(files) == 1 else f"{files[0][0]} … {files[-1][0]} ({len(files)} files)"


class SourceHasher:
    """Hashes source files in a thread while their rows are read."""

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
            raise _unreadable(self._error) from self._error
        return tuple(self._found)

    def _run(self) -> None:
        try:
            for name, path in self._files:
                size = path.stat().st_size
                self._found.append(SourceFile.with_xxh128(name, size, hash_file(path, self._stopped)))
        except OSError as error:
            self._error = error


def _unreadable(error: OSError) -> DataError:
    return DataError(f"{error.filename}: cannot read ({error.strerror})")
