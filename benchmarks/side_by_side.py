"""Contestants taking turns: medians of wall and CPU time, and how many times as fast the first one is."""

from __future__ import annotations

import os
import platform
import resource
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Contestant:
    """One way of doing a thing; the first of a group is ours. `prepare` is not timed."""

    group: str
    name: str
    run: Callable[[], object]
    tokens: int = 0  # 0: there is nothing to count
    prepare: Callable[[], object] = lambda: None


@dataclass(frozen=True)
class Measured:
    """Medians over the repetitions; `cpu_s` counts all processes."""

    group: str
    name: str
    tokens: int
    wall_s: float
    cpu_s: float

    def times_as_slow_as(self, ours: Measured) -> float:
        """By wall time, a token where there are tokens."""
        return self.wall_s / ours.wall_s * (ours.tokens / self.tokens if self.tokens else 1)

    def line(self, ours: Measured) -> str:
        """For a table; the ratio says how many times as fast ours is."""
        if self.tokens:
            rate = f"{self.tokens / self.wall_s / 1e6:9.2f} M tokens/s"
            cpu = f"{self.cpu_s / self.tokens * 1e9:7.1f} ns CPU/token"
        else:
            rate, cpu = f"{self.wall_s * 1e3:9.2f} ms", ""
        ratio = "" if self is ours else f"{self.times_as_slow_as(ours):.2f}x"
        return f"{self.group:<13}{self.name:<33}{rate:<21}{cpu:<23}{ratio:>8}".rstrip()


def measure(contestants: Sequence[Contestant], repeats: int) -> list[Measured]:
    """Every contestant once a repetition, each on an idle disk."""
    times: list[list[tuple[float, float]]] = [[] for _ in contestants]
    for _ in range(repeats):
        for one, its_times in zip(contestants, times, strict=True):
            one.prepare()
            os.sync()  # nobody writes what another one left in memory
            cpu_before_s, started_at = _cpu_s(), time.perf_counter()
            one.run()
            its_times.append((time.perf_counter() - started_at, _cpu_s() - cpu_before_s))
    return [
        Measured(one.group, one.name, one.tokens, *map(statistics.median, zip(*its_times, strict=True)))
        for one, its_times in zip(contestants, times, strict=True)
    ]


def print_table(title: str, results: Sequence[Measured]) -> None:
    """A line a contestant."""
    ours = {one.group: one for one in reversed(results)}
    print(f"\n{title}, load {os.getloadavg()[0]:.1f}")
    for one in results:
        print(one.line(ours[one.group]))


def machine() -> str:
    """Cores, processor, Python."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    model = models[0] if models else platform.processor()
    return f"{os.cpu_count()} cores of {model}, Python {platform.python_version()}"


def _cpu_s() -> float:
    """CPU seconds of this process and of those that it has waited for."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)
