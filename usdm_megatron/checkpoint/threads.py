"""Work in threads that ends soon when one part of it fails, or when Ctrl-C is pressed."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from typing import TypeVar

T = TypeVar("T")


class StoppedError(Exception):
    """Raised by a task that found its event set; what set it is what the caller hears of."""


def run_in_threads(tasks: Sequence[Callable[[threading.Event], T]], workers: int) -> list[T]:
    """What each task returns, in order; at most `workers` run at a time.

    Every task gets the event that is set when another one has failed or the main thread was
    interrupted: it looks at it now and then, and gives up. Raises what failed first.
    """
    stopped = threading.Event()
    with ThreadPoolExecutor(max(1, workers)) as pool:
        try:
            futures = [pool.submit(task, stopped) for task in tasks]
            done, _ = wait(futures, return_when=FIRST_EXCEPTION)
            for future in futures:
                if future in done:
                    future.result()
            return [future.result() for future in futures]
        except BaseException:
            stopped.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
