"""Files that appear whole or not at all, by one writer at a time, and errors that name them."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import uuid
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import BinaryIO

from usdm_megatron.errors import DataError

_GIB = 1 << 30


@contextlib.contextmanager
def reported(path: Path) -> Iterator[None]:
    """Turn an `OSError` (disk full, read-only directory) into a `DataError` that names the file."""
    try:
        yield
    except OSError as error:
        raise DataError(
            f"{error.filename or path}: cannot write ({error.strerror}); {_remedy(error)}"
        ) from error


def _remedy(error: OSError) -> str:
    if error.errno == errno.EFBIG:
        return "raise the limit of file sizes (ulimit -f)"
    return "free space, or choose another --output-prefix"


def open_locked(path: Path, what: str | Path) -> BinaryIO:
    """Open `path` for writing, keeping its content, as its one owner; `DataError` if there is another."""
    while True:
        file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666), "r+b")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise DataError(f"{what}: another process is writing it now; wait for its end") from None
        except OSError:
            pass  # a file system without locks (some Lustre mounts): two writers are the user's care
        # The owner before us may have renamed or removed the file between open and lock.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                return file
        file.close()


def write_atomically(path: Path, *pieces: bytes | memoryview) -> None:
    """Write `pieces` one after another as the file `path`, which then is whole and on disk."""
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")  # several may write the same at once
    try:
        with temporary.open("wb") as file:
            for piece in pieces:
                file.write(piece)
            sync(file)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def remove_leftovers(directory: Path, names: Collection[str]) -> None:
    """Remove what killed calls of `write_atomically` left of the files `names`."""
    for path in directory.glob("*.tmp"):
        if path.name.rsplit(".", 2)[0] in names:
            path.unlink(missing_ok=True)


def sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def begin_sync(file: BinaryIO, start: int) -> None:
    """Let the disk write what the file holds from byte `start` on, without waiting for it.

    Linux does so with pages that it is told not to keep (mm/fadvise.c), and keeps those that it is writing.
    """
    if hasattr(os, "posix_fadvise"):
        file.flush()
        os.posix_fadvise(file.fileno(), start, 0, os.POSIX_FADV_DONTNEED)


def sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_free_space(directory: Path, needed_bytes: int, what: str) -> None:
    """Raise a `DataError` if the file system of `directory` (made if missing) has less than is needed."""
    with reported(directory):
        directory.mkdir(parents=True, exist_ok=True)
        free_bytes = shutil.disk_usage(directory).free
    if free_bytes < needed_bytes:
        raise DataError(
            f"{directory}: {what} takes at least {needed_bytes / _GIB:.2f} GiB, {free_bytes / _GIB:.2f} GiB "
            "are free; free space, or choose another --output-prefix"
        )
