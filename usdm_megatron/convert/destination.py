"""The place that a conversion writes to: room enough, and nobody else writing there."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from usdm_megatron.errors import ConversionError

_MARGIN_BYTES = 64 << 20  # tokenizer, framing, and what the file system needs itself


def require_plain(path: Path, flag: str) -> None:
    """Refuse a destination that could not be given its name at the end, when all of it is written."""
    if path.is_symlink():
        raise ConversionError(
            f"{flag} {path} is a symbolic link (to {os.readlink(path)}); it would be replaced, not what it "
            "points to: name the directory itself, or remove the link"
        )
    if path.name in ("", ".."):
        raise ConversionError(f"{flag} {path} names no directory of its own; write its name out")


def require_space(directory: Path, size_bytes: int) -> None:
    """Refuse when the disk below `directory` (which may not exist yet) lacks room for `size_bytes`."""
    there = next(path for path in (directory, *directory.absolute().parents) if path.exists())
    free, needed = shutil.disk_usage(there).free, size_bytes + _MARGIN_BYTES
    if free < needed:
        raise ConversionError(
            f"{directory}: {free / 1e9:.2f} GB are free, {needed / 1e9:.2f} GB are needed; free some, or "
            "choose another disk"
        )


@contextlib.contextmanager
def claimed(directory: Path) -> Iterator[None]:
    """Own `directory` (made when it is missing) until the end; refused while another process owns it.

    The lock is on the directory itself: it leaves no file, and goes with a killed process.
    """
    made = make_directory(directory)
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConversionError(
                f"{directory}: another conversion is writing there now; wait for its end"
            ) from None
        except OSError:
            pass  # a file system without locks (some Lustre mounts): two writers are the user's care
        yield
    except BaseException:
        for path in made:  # directories that only this attempt needed
            with contextlib.suppress(OSError):
                path.rmdir()
        raise
    finally:
        os.close(descriptor)


def is_claimed(directory: Path) -> bool:
    """Whether a living process owns `directory`."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return False


def make_directory(directory: Path) -> list[Path]:
    """Make a directory and its parents; returns the new ones, innermost first."""
    missing = [path for path in (directory, *directory.parents) if not path.exists()]
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConversionError(f"{directory}: cannot be made: {error.strerror}") from error
    return missing
