"""Packing on one core: ours beside the original's multipack, same lengths, interleaved.

    python benchmarks/packing.py [--samples 1000000] [--capacity 8192] [--repeats 3] [--json FILE]

Lengths are speech-like: log-normal, cut at the capacity. The peer is what the original's stage 3 runs (the
linear multipack sampler for one replica, compiled by numba and warm); without numba it is left out. Memory is
the peak above what was resident before the call (Linux). Times are CPU seconds, of one thread on both sides:
a machine that others use too does not change who is faster.
"""

from __future__ import annotations

import ctypes
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeAlias, TypeVar

import numpy as np
import tyro

from usdm_megatron.preprocess.packing import Packing, pack

try:
    import numba
except ImportError:
    numba = None

F = TypeVar("F", bound=Callable[..., object])
Rows: TypeAlias = list[np.ndarray]  # sample indices of each row


@dataclass(frozen=True)
class Options:
    """What to pack."""

    samples: int = 1_000_000
    capacity: int = 8192
    mean: float = 600.0
    sigma: float = 0.75  # of the logarithm
    seed: int = 0
    repeats: int = 3
    json: Path | None = None


@dataclass(frozen=True)
class Measurement:
    """One way of packing, over all repetitions."""

    samples_per_s: float  # of the median time
    best_samples_per_s: float
    fill: float
    spread: float  # variance of lengths inside rows over that of all lengths
    rows: int
    peak_extra_mib: float


def main(options: Options) -> None:
    """Measure and print."""
    lengths = speech_like_lengths(options)
    contestants: dict[str, Callable[[], Packing | Rows]] = {
        "best-fit (ours)": lambda: pack(lengths, options.capacity, seed=options.seed),
        "next-fit (ours)": lambda: pack(lengths, options.capacity, method="next-fit", seed=options.seed),
    }
    if numba is None:
        print("numba is not installed: the original's multipack is left out (pip install numba)")
    else:
        _multipack(lengths[:1000], options.capacity, options.seed)  # compile
        contestants["multipack (original)"] = lambda: _multipack(lengths, options.capacity, options.seed)
    pack(lengths[:1000], options.capacity)
    cpu_s: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(options.repeats):
        for name, run in contestants.items():
            started_at_s = time.process_time()
            run()
            cpu_s[name].append(time.process_time() - started_at_s)
    measured = {name: _measure(run, cpu_s[name], lengths, options) for name, run in contestants.items()}
    machine = _machine()
    print(
        f"{options.samples:,} samples of mean {lengths.mean():.0f} into rows of {options.capacity}; {machine}"
    )
    ours = measured["best-fit (ours)"]
    for name, found in measured.items():
        print(
            f"{name:<22}{found.samples_per_s / 1e6:7.2f} M samples/s  {100 * found.fill:6.2f} % full  "
            f"spread {100 * found.spread:3.0f} %  {found.peak_extra_mib:6.0f} MiB  "
            f"(ours {ours.samples_per_s / found.samples_per_s:.2f}x the speed, "
            f"{found.rows / ours.rows:.3f}x the rows)"
        )
    if options.json is not None:
        record = {
            "options": {**asdict(options), "json": str(options.json)},
            "machine": machine,
            "measured": {name: asdict(found) for name, found in measured.items()},
        }
        options.json.write_text(json.dumps(record, indent=1) + "\n")


def speech_like_lengths(options: Options) -> np.ndarray:
    """Log-normal lengths of the wanted mean, cut at the capacity, int64 `[samples]`."""
    generator = np.random.default_rng(options.seed)
    log_mean = np.log(options.mean) - options.sigma**2 / 2
    lengths = generator.lognormal(log_mean, options.sigma, options.samples)
    return lengths.astype(np.int64).clip(1, options.capacity)


def _measure(
    run: Callable[[], Packing | Rows], cpu_s: list[float], lengths: np.ndarray, options: Options
) -> Measurement:
    before_kib = _reset_peak_kib()
    found = run()
    peak_kib = _status_kib("VmHWM")
    packing = found if isinstance(found, Packing) else _joined(found)
    row_tokens = packing.row_tokens(lengths)
    if row_tokens.max() > options.capacity or not (np.bincount(packing.order) == 1).all():
        raise AssertionError("not a packing")
    samples_in_row = np.diff(packing.row_starts)
    in_order = lengths[packing.order]
    from_row_mean = in_order - np.repeat(row_tokens / samples_in_row, samples_in_row)
    return Measurement(
        samples_per_s=len(lengths) / statistics.median(cpu_s),
        best_samples_per_s=len(lengths) / min(cpu_s),
        fill=float(lengths.sum() / (packing.rows * options.capacity)),
        spread=float(from_row_mean.var() / max(lengths.var(), 1e-9)),
        rows=packing.rows,
        peak_extra_mib=(peak_kib - before_kib) / 1024,
    )


def _reset_peak_kib() -> int:
    ctypes.CDLL(None).malloc_trim(0)  # what earlier calls freed is not there to be used again unseen
    Path("/proc/self/clear_refs").write_text("5")
    return _status_kib("VmRSS")


def _status_kib(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))


def _machine() -> str:
    models = [
        line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")
    ]
    model = models[0].split(":")[1].strip() if models else platform.processor()
    versions = [f"Python {platform.python_version()}", f"numpy {np.__version__}"]
    versions += [f"numba {numba.__version__}"] if numba is not None else []
    return f"one of {os.cpu_count()} cores of {model}, {', '.join(versions)}"


def _compiled(function: F) -> F:
    return function if numba is None else numba.njit(function)


@_compiled
def _fit_into(lengths: np.ndarray, capacity: int, rows: int) -> bool:
    """Whether first-fit-decreasing lays the samples into so many rows."""
    room = np.full((rows,), capacity, dtype=lengths.dtype)
    for length in np.sort(lengths)[::-1]:
        row = 0
        while row < rows and room[row] < length:
            row += 1
        if row == rows:
            return False
        room[row] -= length
    return True


@_compiled
def _first_fit_decreasing(lengths: np.ndarray, capacity: int, first_sample: int) -> list[list[int]]:
    room: list[int] = []
    rows: list[list[int]] = []
    for sample in np.argsort(lengths)[::-1]:
        length = lengths[sample]
        row = 0
        while row < len(room) and room[row] < length:
            row += 1
        if row == len(room):
            room.append(capacity)
            rows.append([first_sample + sample for _ in range(0)])  # empty, of a type that numba knows
        room[row] -= length
        rows[row].append(first_sample + sample)
    return rows


@_compiled
def _allocate(
    lengths: np.ndarray, ends: np.ndarray, rank: int, capacity: int, replicas: int
) -> list[list[int]]:
    """At each step the most samples that fit into a row a replica, found by bisection; the rows of `rank`."""
    result: list[list[int]] = []
    done = 0
    used = 0
    while True:
        fit = 1
        too_many = 1 + np.searchsorted(ends[done:], used + capacity * replicas, "right")
        while too_many - fit > 1:
            middle = (fit + too_many) // 2
            if _fit_into(lengths[done : done + middle], capacity, replicas):
                fit = middle
            else:
                too_many = middle
        rows = _first_fit_decreasing(lengths[done : done + fit], capacity, done)
        if len(rows) < replicas:
            return result
        done += fit
        used = ends[done - 1]
        result.append(rows[rank])


def _multipack(lengths: np.ndarray, capacity: int, seed: int) -> Rows:
    """What stage 3 iterates over: an array of sample indices a row."""
    shuffled = np.random.default_rng(seed).permutation(len(lengths))
    rows = _allocate(lengths[shuffled], np.cumsum(lengths[shuffled]), 0, capacity, 1)
    return [shuffled[row] for row in rows]


def _joined(rows: Rows) -> Packing:
    return Packing(np.concatenate(rows), np.cumsum([0, *map(len, rows)]))


if __name__ == "__main__":
    main(tyro.cli(Options))
