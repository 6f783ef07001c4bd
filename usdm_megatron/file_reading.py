"""Ways of reading that every floor needs: a JSON object, a file's hash, a mapping of a part of it."""

from __future__ import annotations

import ctypes
import errno
import hashlib
import json
import mmap
import re
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from usdm_megatron.errors import ConversionError

_BLOCK_BYTES = 1 << 20
_MADV_POPULATE_READ = 22  # Linux's, without a name in Python
_MOST_JSON_BYTES = 64 << 20  # the largest tokenizers take 40 MB; parsing takes up to 25 times the size
_MOST_NESTING = 100  # Python writes JSON recursively
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")  # escaped: half a character, unless both halves are there


def file_sha256(
    path: Path, stopped: threading.Event | None = None, on_bytes: Callable[[int], None] = lambda _: None
) -> str:
    """sha256 of a file's bytes, in hex; gives up (with a partial hash) once `stopped` is set.

    `on_bytes(n)` is called with every n bytes that were read.
    """
    digest = hashlib.sha256()
    block = memoryview(bytearray(_BLOCK_BYTES))  # the same pages each time: new ones cost as much as the copy
    with path.open("rb", buffering=0) as file:
        while not (stopped and stopped.is_set()) and (count := file.readinto(block)):
            digest.update(block[:count])
            on_bytes(count)
    return digest.hexdigest()


def map_privately(path: Path, begin: int, size_bytes: int) -> mmap.mmap:
    """Map bytes of a file that will all be read; what is written to them stays in this process.

    The mapping is positioned on the first of them (it begins on a page: `tell()` says how far before) and
    ends behind the last. Raises `ValueError` when the file is shorter, `OSError` when the disk cannot give
    all of them: whoever touches such a page of a mapping is killed by SIGBUS, so each is asked for before.
    """
    start = begin - begin % mmap.ALLOCATIONGRANULARITY
    with path.open("rb", buffering=0) as file:
        mapping = mmap.mmap(file.fileno(), begin + size_bytes - start, access=mmap.ACCESS_COPY, offset=start)
        mapping.madvise(mmap.MADV_WILLNEED)  # one request for all of it instead of one a block
        mapping.seek(begin - start)
        if _populate(mapping):
            return mapping
        file.seek(begin)
        block = memoryview(bytearray(min(_BLOCK_BYTES, size_bytes)))
        remaining = size_bytes
        while remaining:
            if not (count := file.readinto(block[:remaining])):
                raise OSError(errno.EIO, "the file became shorter while it was read", str(path))
            remaining -= count
    return mapping


def _populate(mapping: mmap.mmap) -> bool:
    """Have the system read and map every page, which copies nothing; whether it could.

    False where it does not know how (Linux before 5.14, others), and where a page cannot be read: reading
    says why.
    """
    if sys.platform != "linux":
        return False
    libc = ctypes.CDLL(None)  # `mmap.madvise` would stop all threads meanwhile
    first = ctypes.c_char.from_buffer(mapping)
    return libc.madvise(ctypes.byref(first), ctypes.c_size_t(len(mapping)), _MADV_POPULATE_READ) == 0


def read_json_object(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object, which can be written again; raises `ConversionError` otherwise."""
    try:
        if (size := path.stat().st_size) > _MOST_JSON_BYTES:
            raise ConversionError(
                f"{path} holds {size:,} bytes; at most {_MOST_JSON_BYTES >> 20} MiB of JSON are read"
            )
        text = path.read_text(encoding="utf-8")
        content = json.loads(text)
    except FileNotFoundError as error:
        raise ConversionError(f"{path} is missing") from error
    except (OSError, ValueError, RecursionError) as error:
        raise ConversionError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise ConversionError(f"{path} must hold a JSON object")
    if _is_nested_deeper(content, _MOST_NESTING):
        raise ConversionError(f"{path} is nested more than {_MOST_NESTING} deep: it was not made for this")
    if _SURROGATE.search(text):
        try:
            json.dumps(content, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError as error:
            raise ConversionError(
                f"{path} holds half a character, \\u{ord(error.object[error.start]):04x}, which no text file "
                "can; correct or remove it"
            ) from error
    return content


def _is_nested_deeper(content: Any, depth: int) -> bool:
    """Level by level, not by recursion."""
    level = [content]
    for _ in range(depth):
        values = (each.values() if isinstance(each, dict) else each for each in level)
        level = [value for of_one in values for value in of_one if isinstance(value, (dict, list))]
        if not level:
            return False
    return True
