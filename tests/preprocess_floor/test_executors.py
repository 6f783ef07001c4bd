"""Executors: order, bounded memory, the first error, dead workers and dead parents."""

from __future__ import annotations

import contextlib
import mmap
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from usdm_megatron.errors import EXIT_FAULT, ConfigError, DataError
from usdm_megatron.preprocess import executors
from usdm_megatron.preprocess.executors import (
    Executor,
    ProcessExecutor,
    RayExecutor,
    SerialExecutor,
    WorkerFault,
    open_executor,
)
from usdm_megatron.preprocess.result_memory import ResultMemory

ROOT = Path(__file__).parents[2]
EXECUTORS = [SerialExecutor(), ProcessExecutor(2), RayExecutor(2)]


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    """One local cluster for all tests of this file: starting one takes seconds."""
    with executors._ray_session(executors._import_ray(), 2):
        yield


def slow_first(task: int) -> int:
    time.sleep(0.2 if task == 0 else 0)
    return task * task


def fail_at_three(task: int) -> int:
    if task == 3:
        raise DataError("line 3: bad", "line 4: bad too")
    return task


def divide(task: int) -> float:
    return 1 / task


def die(task: int) -> int:
    if task == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return task


def never(task: int) -> int:
    time.sleep(1000)
    return task


@pytest.mark.parametrize("executor", EXECUTORS, ids=lambda executor: type(executor).__name__)
class TestAll:
    def test_results_come_in_order(self, executor: Executor) -> None:
        assert list(executor.map(slow_first, range(30))) == [task * task for task in range(30)]
        assert list(executor.map(slow_first, [])) == []

    def test_tasks_are_drawn_as_results_are_taken(self, executor: Executor) -> None:
        drawn = []
        tasks = (drawn.append(task) or task for task in range(1000))
        with contextlib.closing(executor.map(slow_first, tasks)) as results:
            for _ in range(10):
                next(results)
        assert len(drawn) <= 10 + 4

    def test_an_error_keeps_its_kind_and_its_problems(self, executor: Executor) -> None:
        taken = []
        with pytest.raises(DataError) as caught:
            for result in executor.map(fail_at_three, range(100)):
                taken.append(result)
        assert taken == [0, 1, 2]
        assert caught.value.problems == ("line 3: bad", "line 4: bad too")

    def test_a_bug_of_ours_stays_what_it_is(self, executor: Executor) -> None:
        with pytest.raises(ZeroDivisionError):
            list(executor.map(divide, [1, 0]))


def arrays_of(task: int) -> dict[str, object]:
    return {"task": task, "narrow": np.full(task, task, np.uint16), "wide": np.arange(10 * task)}


@pytest.mark.parametrize("slot_bytes", [mmap.ALLOCATIONGRANULARITY, 16 * mmap.ALLOCATIONGRANULARITY])
def test_arrays_of_a_result(slot_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether they fit into the shared memory or not; an array lasts until the next result."""
    monkeypatch.setattr(executors, "ResultMemory", partial(ResultMemory, slot_bytes=slot_bytes))
    for task, result in enumerate(ProcessExecutor(2).map(arrays_of, range(100))):
        expected = arrays_of(task)
        assert result.keys() == expected.keys()
        for name in expected:
            np.testing.assert_array_equal(result[name], expected[name], strict=True)


def test_arrays_that_are_kept_are_an_error() -> None:
    with pytest.raises(RuntimeError, match="arrays of an earlier result are in use; copy what is to stay"):
        list(ProcessExecutor(2).map(arrays_of, range(100)))


def test_results_larger_than_a_slot_are_sent_as_they_are() -> None:
    memory = ResultMemory(2, slot_bytes=1 << 16)
    small, large = np.arange(100), np.arange(10_000)
    stored = [memory.store(1, (small, small + 1)), memory.store(0, large), memory.store(0, None)]
    assert [one.places for one in stored] == [(slice(0, 800), slice(832, 1632)), (), ()]
    loaded, whole, nothing = map(memory.load, stored)
    for found, array in zip((*loaded, whole), (small, small + 1, large), strict=True):
        np.testing.assert_array_equal(found, array)
    assert nothing is None
    with pytest.raises(RuntimeError, match="in use"):
        memory.free(1)
    del loaded, found
    memory.store(memory.free(1), small + 5)
    memory.close()


def test_a_killed_worker_is_an_error_and_no_hang() -> None:
    with pytest.raises(WorkerFault, match="a worker process died .* run the same command again") as caught:
        list(ProcessExecutor(2).map(die, range(100)))
    assert caught.value.exit_code == EXIT_FAULT


def test_leaving_early_stops_workers_at_once() -> None:
    started_at = time.perf_counter()
    with contextlib.closing(ProcessExecutor(2).map(slow_first, iter([1, 2, 3, 4, 5]))) as results:
        next(results)
    results = ProcessExecutor(2).map(fail_or_never, range(8))
    with pytest.raises(DataError, match="first"):
        list(results)
    assert time.perf_counter() - started_at < 60


def fail_or_never(task: int) -> int:
    if task == 0:
        raise DataError("first")
    return never(task)


def blocked_signals(task: int) -> set[int]:
    return signal.pthread_sigmask(signal.SIG_BLOCK, [])


def test_workers_never_take_an_interrupt() -> None:
    """Not while they start either: the mask is what they inherit, nothing in them sets it."""
    masks = list(ProcessExecutor(2).map(blocked_signals, range(8)))
    assert all(signal.SIGINT in mask for mask in masks)
    assert signal.SIGINT not in blocked_signals(0)


PARENT = """
import sys
from tests.preprocess_floor.test_executors import ProcessExecutor, announce_and_wait
if __name__ == "__main__":
    list(ProcessExecutor(2).map(announce_and_wait, [sys.argv[1]] * 4))
"""


def announce_and_wait(directory: str) -> None:
    (Path(directory) / str(os.getpid())).touch()
    time.sleep(1000)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_workers_end_with_their_parent(tmp_path: Path, number: signal.Signals) -> None:
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    (tmp_path / "pids").mkdir()
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    parent = subprocess.Popen(
        [sys.executable, str(script), str(tmp_path / "pids")], env=environment, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 60
    while len(pids := list((tmp_path / "pids").iterdir())) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    parent.send_signal(number)
    parent.wait(timeout=30)
    assert len(pids) == 2
    while any(Path(f"/proc/{pid.name}").exists() for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(Path(f"/proc/{pid.name}").exists() for pid in pids)


def test_workers_and_ray_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(open_executor("processes", 1), SerialExecutor)
    assert open_executor("processes", 3) == ProcessExecutor(3)
    assert open_executor("ray", 1) == RayExecutor(1)
    with pytest.raises(ConfigError, match="--workers is 0, the least is 1"):
        open_executor("processes", 0)
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r"ray is not installed; `pip install usdm_megatron\[ray\]`"):
        list(RayExecutor(1).map(divide, [1]))


def test_ray_sends_no_usage_reports() -> None:
    assert os.environ["RAY_USAGE_STATS_ENABLED"] == "0"
