"""Verifying a checkpoint while its tensors are read: what is hashed first is the reader's read-ahead."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from usdm_megatron.checkpoint.integrity import ByteProgress, OnBytes, no_progress, verify_integrity
from usdm_megatron.checkpoint.resolve import NamedCheckpoint
from usdm_megatron.checkpoint.threads import StoppedError


class BackgroundVerification:
    """Whether the weights of a checkpoint are what was written. Its other files were verified before.

    `with BackgroundVerification(checkpoint) as verification:` begins to read; leaving the block before
    `require_whole()` has returned gives up. Nothing that was made of the tensors may be published earlier.
    """

    def __init__(self, checkpoint: NamedCheckpoint, progress: ByteProgress = no_progress) -> None:
        """Raises `CheckpointError` naming each missing or damaged file, when one of them holds no weights."""
        if problems := verify_integrity(checkpoint.path, weights=False):
            raise checkpoint.damaged(verify_integrity(checkpoint.path, progress) or problems)
        self._checkpoint = checkpoint
        self._progress = progress
        self._stopped = threading.Event()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="verification")

    @property
    def path(self) -> Path:
        return self._checkpoint.path

    def __enter__(self) -> BackgroundVerification:
        self._problems = self._pool.submit(verify_integrity, self.path, self._until_stopped)
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._pool.shutdown(cancel_futures=True)

    def require_whole(self) -> None:
        """Wait until every byte was hashed; raises `CheckpointError` naming each damaged file."""
        if problems := self._problems.result():
            raise self._checkpoint.damaged(problems)

    @contextmanager
    def _until_stopped(self, what: str, total_bytes: int) -> Iterator[OnBytes]:
        with self._progress(what, total_bytes) as on_bytes:

            def advance(count: int) -> None:
                if self._stopped.is_set():
                    raise StoppedError(f"{self.path}: no longer asked for")
                on_bytes(count)

            yield advance
