"""Ways of doing many independent pieces of work: here, in processes of this machine, on a Ray cluster.

All give results in the order of the tasks and hold few of them at a time, so what is written from them
does not depend on how many workers there were, and memory does not grow with the input.
"""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

from usdm_megatron.errors import EXIT_FAULT, ConfigError, UserError
from usdm_megatron.preprocess.malloc import keep_freed_memory
from usdm_megatron.preprocess.result_memory import ResultMemory, StoredResult

ExecutorKind = Literal["processes", "ray"]
_MOST_WORKERS = 4096  # each takes address space for its results
_IN_FLIGHT_PER_WORKER = 2  # one being done and one waiting: no worker waits for the parent
Task = TypeVar("Task")
Result = TypeVar("Result")


class WorkerFault(UserError):
    """A worker died: a fault of the machine (out of memory, killed), not of the input."""

    exit_code = EXIT_FAULT


class Executor(Protocol):
    """Does `function(task)` for every task."""

    def map(self, function: Callable[[Task], Result], tasks: Iterable[Task]) -> Generator[Result, None, None]:
        """Results in the order of the tasks, few of them in memory at a time.

        `function`, tasks and results are pickled, `function` once a worker. Arrays in a result may be views
        of memory that is used again after the next one: copy what is to stay (a `RuntimeError` where that
        was forgotten). The first error stops the rest and is raised here; so is `WorkerFault` for a worker
        that died. Closing the generator stops the workers: a caller that may leave early wraps it in
        `contextlib.closing`.
        """
        ...


def open_executor(kind: ExecutorKind, workers: int) -> Executor:
    """The executor of `--executor` and `--workers`; a single process is this one."""
    if not 1 <= workers <= _MOST_WORKERS:
        raise ConfigError(f"--workers is {workers}, the least is 1 and the most {_MOST_WORKERS}")
    keep_freed_memory()
    if kind == "ray":
        return RayExecutor(workers)
    return SerialExecutor() if workers == 1 else ProcessExecutor(workers)


class SerialExecutor:
    """Does everything in this process."""

    def map(self, function: Callable[[Task], Result], tasks: Iterable[Task]) -> Generator[Result, None, None]:
        yield from map(function, tasks)


@dataclass(frozen=True)
class ProcessExecutor:
    """Processes of this machine, started afresh (`spawn`): threads of this one are no danger to them."""

    workers: int

    def map(self, function: Callable[[Task], Result], tasks: Iterable[Task]) -> Generator[Result, None, None]:
        in_flight = self.workers * _IN_FLIGHT_PER_WORKER
        memory = ResultMemory(in_flight + 1)  # and the result that the caller holds
        slots = map(memory.free, itertools.cycle(range(memory.slots)))
        pool = ProcessPoolExecutor(
            self.workers, multiprocessing.get_context("spawn"), _enter_worker, (function, memory)
        )

        def submit(task: Task) -> Future[StoredResult]:
            with _interrupts_held_back():  # it may start a worker
                return pool.submit(_do_in_worker, next(slots), task)

        try:
            yield from _in_order(
                tasks,
                submit=submit,
                wait=lambda future: _opened(memory.load(future.result())),
                in_flight=in_flight,
            )
        except BrokenProcessPool as error:
            raise WorkerFault(
                "a worker process died (killed, or short of memory: see dmesg); run the same command "
                "again, with fewer --workers if memory was short"
            ) from error
        except BaseException:
            # shutdown alone would wait for what the workers are doing (terminate_workers: Python 3.14)
            for process in list((pool._processes or {}).values()):
                process.terminate()
            raise
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
            memory.close()


@contextlib.contextmanager
def _interrupts_held_back() -> Iterator[None]:
    """Ctrl-C reaches all processes, and the parent ends its workers: one that is started here inherits that
    it does not take the signal, also while it imports.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@dataclass(frozen=True)
class RayExecutor:
    """Tasks of a Ray cluster: the one at `RAY_ADDRESS`, else one of `workers` CPUs started here.

    Every node needs this package and sees the same files under the same names. Ray does a task again
    when its worker dies, so tasks must be harmless when done twice.
    """

    workers: int

    def map(self, function: Callable[[Task], Result], tasks: Iterable[Task]) -> Generator[Result, None, None]:
        ray = _import_ray()
        with _ray_session(ray, self.workers):
            attempt, shared = ray.remote(_attempt), ray.put(function)
            cpus = int(ray.cluster_resources().get("CPU", self.workers))
            try:
                yield from _in_order(
                    tasks,
                    submit=lambda task: attempt.remote(shared, task),
                    wait=lambda reference: _opened(ray.get(reference)),
                    in_flight=cpus * _IN_FLIGHT_PER_WORKER,
                )
            except (ray.exceptions.WorkerCrashedError, ray.exceptions.OutOfMemoryError) as error:
                raise WorkerFault(f"a Ray worker died, again and again: {error}") from error


def _in_order(
    tasks: Iterable[Task], *, submit: Callable[[Task], Any], wait: Callable[[Any], Result], in_flight: int
) -> Iterator[Result]:
    waiting: deque[Any] = deque()
    for task in tasks:
        waiting.append(submit(task))
        if len(waiting) >= in_flight:
            yield wait(waiting.popleft())
    while waiting:
        yield wait(waiting.popleft())


@dataclass(frozen=True)
class _Failure:
    """A `UserError` on its way home: unpickling one would join its problems into one."""

    kind: type[UserError]
    problems: tuple[str, ...]


def _attempt(function: Callable[[Any], Any], task: Any) -> Any:
    try:
        return function(task)
    except UserError as error:
        return _Failure(type(error), error.problems)


def _opened(result: Any) -> Any:
    if isinstance(result, _Failure):
        raise result.kind(*result.problems)
    return result


_function_of_worker: Callable[[Any], Any]
_memory_of_worker: ResultMemory


def _enter_worker(function: Callable[[Any], Any], memory: ResultMemory) -> None:
    global _function_of_worker, _memory_of_worker
    _function_of_worker, _memory_of_worker = function, memory
    keep_freed_memory()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the workers are the parallelism
    threading.Thread(target=_end_with_the_parent, name="parent-watch", daemon=True).start()


def _end_with_the_parent() -> None:
    """A killed parent cannot end its workers, and they would wait for tasks for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(EXIT_FAULT)


def _do_in_worker(slot: int, task: Any) -> StoredResult:
    return _memory_of_worker.store(slot, _attempt(_function_of_worker, task))


def _import_ray() -> Any:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing leaves the machine unasked
    try:
        import ray
    except ModuleNotFoundError as error:
        raise ConfigError(
            "--executor ray: ray is not installed; `pip install usdm_megatron[ray]`, or leave the flag out"
        ) from error
    return ray


@contextlib.contextmanager
def _ray_session(ray: Any, workers: int) -> Iterator[None]:
    """A connection to a cluster, ended with the block unless it was there before."""
    if ray.is_initialized():
        yield
        return
    search_path = [str(Path(__file__).resolve().parents[2]), os.environ.get("PYTHONPATH", "")]
    options = {
        "runtime_env": {"env_vars": {"PYTHONPATH": os.pathsep.join(filter(None, search_path))}},
        "log_to_driver": False,
        "logging_level": "warning",
    }
    if "RAY_ADDRESS" in os.environ:
        ray.init(**options)
    else:
        local = {"num_cpus": workers, "include_dashboard": False, "_node_ip_address": "127.0.0.1"}
        ray.init("local", **local, **options)
    try:
        yield
    finally:
        ray.shutdown()
