"""Run a function on several ranks of this machine and bring its results back.

Ranks are forked from a server that has imported torch and megatron once, meet at a file, and are
killed at a deadline; the first failing rank's traceback is what the test shows.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tests.rank_imports"])


def run_ranks(world_size: int, function: Callable[..., Any], *args: Any, timeout_s: float = 120) -> list[Any]:
    """`[function(rank_environment, store, *args) for each rank]`; results travel through `torch.save`.

    `function` must be importable (module level). Raises `AssertionError` with the traceback of the
    first rank that failed, or names the ranks that did not finish in `timeout_s`.
    """
    import torch

    if torch.cuda.is_available() and world_size > torch.cuda.device_count():
        pytest.skip(f"needs {world_size} GPUs, one a rank (NCCL)")
    with tempfile.TemporaryDirectory() as directory:
        workers = [
            _context.Process(
                target=_rank_main, args=(rank, world_size, directory, timeout_s, function, args), daemon=True
            )
            for rank in range(world_size)
        ]
        for worker in workers:
            worker.start()
        _wait(workers, directory, time.monotonic() + timeout_s)
        return [
            torch.load(Path(directory) / f"{rank}.pt", map_location="cpu", weights_only=False)
            for rank in range(world_size)
        ]


def _wait(workers: list[Any], directory: str, deadline: float) -> None:
    try:
        while any(worker.is_alive() for worker in workers):
            failed = [rank for rank, worker in enumerate(workers) if worker.exitcode not in (None, 0)]
            if failed:
                break
            if time.monotonic() > deadline:
                alive = [rank for rank, worker in enumerate(workers) if worker.is_alive()]
                raise AssertionError(f"ranks {alive} of {len(workers)} did not finish in time")
            time.sleep(0.01)
        errors = sorted(Path(directory).glob("*.error"), key=lambda path: path.stat().st_mtime_ns)
        if errors:
            raise AssertionError(f"rank {errors[0].stem} of {len(workers)} failed:\n{errors[0].read_text()}")
        dead = {rank: worker.exitcode for rank, worker in enumerate(workers) if worker.exitcode}
        if dead:
            raise AssertionError(f"ranks died without a traceback: {dead}")
    finally:
        for worker in workers:
            worker.kill()
            worker.join()


def _rank_main(
    rank: int,
    world_size: int,
    directory: str,
    timeout_s: float,
    function: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    import torch
    import torch.distributed as dist

    from usdm_megatron.runtime.ranks import RankEnvironment

    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo")
    torch.set_num_threads(1)
    try:
        store = dist.FileStore(f"{directory}/store", world_size)
        store.set_timeout(timedelta(seconds=timeout_s))
        environment = RankEnvironment(rank=rank, world_size=world_size, local_rank=rank)
        result = function(environment, store, *args)
        torch.save(result, f"{directory}/{rank}.pt")
    except BaseException:
        Path(f"{directory}/{rank}.error.tmp").write_text(traceback.format_exc())
        Path(f"{directory}/{rank}.error.tmp").rename(f"{directory}/{rank}.error")
        sys.stderr.flush()
        os._exit(1)
