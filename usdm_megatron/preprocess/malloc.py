"""What glibc's malloc does with memory that was freed: arrays of every block of input come and go."""

from __future__ import annotations

import contextlib
import ctypes

_M_TOP_PAD, _M_MMAP_THRESHOLD = -2, -3  # malloc.h
_KEPT_BYTES = 64 << 20
_MAPPED_BYTES = 32 << 20  # the most that glibc takes; larger arrays get pages of their own


def keep_freed_memory() -> None:
    """Let this process keep up to 64 MiB that it has freed; where libc is another, nothing happens.

    Given back, the same pages are asked for again and zeroed with the next block, a fifth of the time that
    text takes to parse (`docs/benchmarks/data.md`).
    """
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_TOP_PAD, _KEPT_BYTES)
        mallopt(_M_MMAP_THRESHOLD, _MAPPED_BYTES)
