"""Verifying a checkpoint while its tensors are read: the disk reads for both, once."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

from usdm_megatron.checkpoint.integrity import ByteProgress, OnBytes, no_progress, verify_integrity
from usdm_megatron.checkpoint.resolve import NamedCheckpoint
from usdm_megatron.checkpoint.threads import StoppedError


@contextmanager
def verified_meanwhile(
    checkpoint: NamedCheckpoint, progress: ByteProgress = no_progress
) -> Iterator[Callable[[], None]]:
    """Hash every byte of a checkpoint while the block reads its weights, and until all is hashed.

    Nothing that was made of the weights may be published inside. Raises `CheckpointError` naming each
    damaged file, in place of what the block may have raised, too: damaged bytes explain whatever went
    wrong. Only Ctrl-C and the like end it at once. The block is given a function to call now and then,
    from any thread: it raises as soon as damage is known.
    """
    stopped = threading.Event()

    @contextmanager
    def until_stopped(what: str, total_bytes: int) -> Iterator[OnBytes]:
        with progress(what, total_bytes) as on_bytes:

            def advance(count: int) -> None:
                if stopped.is_set():
                    raise StoppedError(f"{checkpoint.path}: no longer asked for")
                on_bytes(count)

            yield advance

    with ThreadPoolExecutor(1, thread_name_prefix="verification") as pool:
        problems = pool.submit(verify_integrity, checkpoint.path, until_stopped)

        def stop_if_damaged() -> None:
            if problems.done() and problems.result():
                raise StoppedError(f"{checkpoint.path} is damaged")

        try:
            try:
                yield stop_if_damaged
            except Exception as error:
                if problems.result():
                    raise checkpoint.damaged(problems.result()) from error
                raise
            if problems.result():
                raise checkpoint.damaged(problems.result())
        finally:
            stopped.set()
