"""Progress in bytes with the time left, on a terminal; silent in a log."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from usdm_megatron.checkpoint.integrity import ByteProgress


@contextmanager
def byte_display() -> Iterator[ByteProgress]:
    """Gives `progress(what, total_bytes)`: a line of the display for each, several at a time."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
    from rich.progress import TransferSpeedColumn as SpeedColumn

    what_column = TextColumn("{task.description}")
    columns = (what_column, BarColumn(), DownloadColumn(), SpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty()) as display:

        @contextmanager
        def progress(what: str, total_bytes: int) -> Iterator[Callable[[int], None]]:
            task = display.add_task(what, total=total_bytes)
            yield lambda count: display.advance(task, count)

        yield progress


@contextmanager
def byte_progress(what: str, total_bytes: int) -> Iterator[Callable[[int], None]]:
    """A display of one line. Gives `advance(n)`, callable from any thread."""
    with byte_display() as progress, progress(what, total_bytes) as advance:
        yield advance
