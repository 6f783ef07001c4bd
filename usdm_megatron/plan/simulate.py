"""The real run of any rank, or of all ranks, of any world size on this machine: what is built, and checked.

Every rank is built by itself (`plan/simulated_rank.py`). A training step is traced on one rank of each tensor
and pipeline parallel place only: its data parallel replicas hold the same parts in the same buffers, which is
checked, and run as many micro-batches. The one with the longest is traced; what is the rank's own, its part
of the optimizer state, is counted on each.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, replace

from usdm_megatron.errors import ConfigError
from usdm_megatron.plan.simulation import RunShape, SimulatedRank

_RANKS_A_TASK = 4
_MOST_WORKERS = 16
Progress = Callable[[int, int], None]  # ranks built, of how many


@dataclass(frozen=True)
class Simulation:
    """Simulated ranks of a run, in order; of a whole world with what the checks between ranks found."""

    run: RunShape
    step: int
    ranks: tuple[SimulatedRank, ...]
    traced: tuple[int, ...]  # ranks whose step was traced
    faults: tuple[str, ...] = ()  # contradictions: a bug of ours, or of core
    problems: tuple[str, ...] = ()  # what the user can mend: memory that does not suffice

    @property
    def is_whole_world(self) -> bool:
        return len(self.ranks) == self.run.layout.world_size

    @property
    def worst(self) -> SimulatedRank:
        """The rank that needs the most memory."""
        return max(self.ranks, key=lambda rank: rank.memory.peak or 0)


def simulate(
    run: RunShape,
    rank: int | None = None,
    *,
    step: int = 1,
    budget_gib: float | None = None,
    workers: int | None = None,
    progress: Progress | None = None,
) -> Simulation:
    """Build `rank`, or without one all ranks and check them against each other.

    `step` (from 1) is the one whose rows are read, `budget_gib` what a rank may take on its device. All ranks
    are built in `workers` processes (one a core unless given; 1: in this process, which must then be in no
    process group). Raises `ConfigError` where there is no such rank or step.
    """
    from usdm_megatron.plan.sweep_checks import memory_problems, world_faults

    size = run.layout.world_size
    if rank is not None and not 0 <= rank < size:
        raise ConfigError(f"--rank {rank} is not one of {size} ranks, 0 to {size - 1}")
    faults: tuple[str, ...] = ()
    traced: tuple[int, ...]
    if rank is not None:
        ranks, traced = _simulate((run, (rank,), step, True)), (rank,)
    else:
        ranks, traced = _sweep(run, step, workers or _workers(size), progress)
        faults = world_faults(run, ranks, rows_of_step(run, step))
    problems = () if budget_gib is None else memory_problems(ranks, budget_gib)
    return Simulation(run, step, tuple(ranks), traced, faults, problems)


def rows_of_step(run: RunShape, step: int) -> int | None:
    """How many rows `step` (from 1) consumes, by the run's order; None without a store."""
    if not run.has_rows:
        return None
    from usdm_megatron.train.preflight import build_order, open_stores

    store, _ = open_stores(run.config)
    order = build_order(run.config, run.layout, store.rows)
    return order.consumed_rows(step) - order.consumed_rows(step - 1)


def _sweep(
    run: RunShape, step: int, workers: int, progress: Progress | None
) -> tuple[list[SimulatedRank], tuple[int, ...]]:
    size = run.layout.world_size
    report = progress or (lambda built, of: None)
    with _run_tasks(workers) as run_tasks:
        numbers = range(size)
        parts = [numbers[start : start + _RANKS_A_TASK] for start in range(0, size, _RANKS_A_TASK)]
        ranks: list[SimulatedRank] = []
        for built in run_tasks([(run, part, step, False) for part in parts]):
            ranks += built
            report(len(ranks), size)
        ranks.sort(key=lambda rank: rank.rank)
        longest = _longest_of_each_place(ranks)
        traced = [rank for built in run_tasks([(run, (r,), step, True) for r in longest]) for rank in built]
    step_bytes = {(rank.place.tp, rank.place.pp): rank.memory.step for rank in traced}
    with_step = [
        replace(rank, memory=replace(rank.memory, step=step_bytes[rank.place.tp, rank.place.pp]))
        for rank in ranks
    ]
    return with_step, tuple(longest)


def _longest_of_each_place(ranks: Sequence[SimulatedRank]) -> list[int]:
    """Of each place's replicas the one with the longest micro-batches, and the most of the optimizer."""
    longest: dict[tuple[int, int], SimulatedRank] = {}
    for rank in ranks:
        key = (rank.place.tp, rank.place.pp)
        if key not in longest or _load(rank) > _load(longest[key]):
            longest[key] = rank
    return [rank.rank for rank in longest.values()]


def _load(rank: SimulatedRank) -> tuple[int, int]:
    return max(rank.tokens), rank.memory.optimizer


def _workers(ranks: int) -> int:
    """One a core, if there is work for it; a worker takes 0.4 GB."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, -(-ranks // _RANKS_A_TASK), _MOST_WORKERS)


_Task = tuple[RunShape, Sequence[int], int, bool]  # run, ranks, step, whether the step is traced


def _simulate(task: _Task) -> list[SimulatedRank]:
    from usdm_megatron.plan.simulated_rank import simulate_rank

    run, ranks, step, trace = task
    return [simulate_rank(run, rank, step=step, trace=trace) for rank in ranks]


@contextmanager
def _run_tasks(workers: int) -> Iterator[Callable[[list[_Task]], Iterator[list[SimulatedRank]]]]:
    """A function that runs tasks, here or in processes of their own, and yields results as they come."""
    if workers == 1:
        yield lambda tasks: map(_simulate, tasks)
        return
    context = multiprocessing.get_context("spawn")  # what this process has open is none of a rank's business
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker) as pool:

        def run_tasks(tasks: list[_Task]) -> Iterator[list[SimulatedRank]]:
            futures = [pool.submit(_simulate, task) for task in tasks]
            try:
                for future in as_completed(futures):
                    yield future.result()
            finally:
                for future in futures:
                    future.cancel()

        yield run_tasks


def _start_worker() -> None:
    import torch

    from usdm_megatron.log import quiet_upstream

    quiet_upstream()
    torch.set_num_threads(1)
