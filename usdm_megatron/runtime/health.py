"""The check before a run: what all ranks see, side by side, and what would cost the run hours later."""

from __future__ import annotations

import os
import statistics
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from usdm_megatron.runtime.health_facts import RankFacts, look_around

_GIB = 2**30
_CLOCK_SKEW_S = 2.0  # a restart compares times of files that other hosts wrote
_VISIBLE_AFTER_S = 30.0  # network file systems cache directories for seconds
_SLOWEST_SHARE = 0.85  # of the median rate: one throttled GPU holds up every step of all
_FREE_SHARE = 0.95  # of a GPU's memory, before a run has taken any
_REDUCED_BYTES = {"cuda": 256 << 20, "cpu": 16 << 20}


@dataclass(frozen=True)
class Bounds:
    """What the machine must offer."""

    min_free_gib: float
    min_bus_gbs: float | None
    device: str | None = None
    min_open_files: int = 4096


@dataclass(frozen=True)
class Finding:
    """One line of the report; `problems` say value, rule and remedy, none when all is well."""

    name: str
    value: str
    problems: tuple[str, ...] = ()


@dataclass(frozen=True)
class WorldFacts:
    """What ranks can only find out together. `bus_gbs` is None in a world of one rank."""

    ranks: tuple[RankFacts, ...]
    bus_gbs: float | None
    wrong_sums: tuple[int, ...]
    clock_skew_s: float
    unseen: tuple[str, ...]


def examine(rank: int, device: torch.device, directory: Path) -> WorldFacts:
    """Collective: every rank looks around, then all reduce, compare clocks and read each other's files.

    Needs the world's default group (`open_process_groups`). Every rank returns the same facts. A rank that
    cannot write to `directory` is everyone's `OSError`.
    """
    mine = _together(lambda: look_around(rank, device, directory))
    clock_skew_s = _clock_skew_s()
    bus_gbs, is_right = _all_reduce(device)
    wrong = tuple(r for r, right in enumerate(_gathered(is_right)) if not right)
    return WorldFacts(tuple(mine), bus_gbs, wrong, clock_skew_s, _unseen_files(rank, directory))


def judge(world: WorldFacts, bounds: Bounds) -> list[Finding]:
    """The report: a finding for each thing that is checked."""
    return [
        _versions(world.ranks),
        _environment(world.ranks),
        _gpus(world.ranks, bounds),
        _matmul(world.ranks),
        _all_reduced(world, bounds),
        _clocks(world),
        _disk(world.ranks, bounds),
        _shared_directory(world),
        _limits(world.ranks, bounds),
    ]


# ── findings ──


def _versions(ranks: Sequence[RankFacts]) -> Finding:
    unmet = sorted({f"{facts.host}: {problem}" for facts in ranks for problem in facts.unmet})
    differing = [
        f"{package} differs between ranks: {_by_rank(values)}; install one version everywhere"
        for package in ranks[0].versions
        if len(set(values := [facts.versions.get(package, "not installed") for facts in ranks])) > 1
    ]
    value = ", ".join(f"{name} {version}" for name, version in ranks[0].versions.items())
    return Finding("versions", value, (*unmet, *differing))


def _environment(ranks: Sequence[RankFacts]) -> Finding:
    names = sorted({name for facts in ranks for name in facts.environment})
    differing = [
        f"{name} differs between ranks: {_by_rank(values)}; export one value on every node"
        for name in names
        if len(set(values := [facts.environment.get(name, "(unset)") for facts in ranks])) > 1
    ]
    value = " ".join(f"{name}={value}" for name, value in ranks[0].environment.items())
    return Finding("environment", value or "no NCCL_ variables", tuple(differing))


def _gpus(ranks: Sequence[RankFacts], bounds: Bounds) -> Finding:
    gpus = [(facts, facts.gpu) for facts in ranks if facts.gpu is not None]
    if not gpus:
        problems = ["no rank sees one, --device cuda asks for them; look at nvidia-smi and at torch's build"]
        return Finding("gpus", "none: ranks run on the CPU", tuple(problems * (bounds.device == "cuda")))
    problems = [f"--device is {bounds.device}, and ranks run on GPUs"] if bounds.device == "cpu" else []
    if len(gpus) < len(ranks):
        problems.append(f"{len(ranks) - len(gpus)} of {len(ranks)} ranks see no GPU")
    names = [gpu.name for _, gpu in gpus]
    if len(set(names)) > 1:
        problems.append(f"GPUs differ between ranks: {_by_rank(names)}; the slowest sets the pace")
    for place, count in Counter((facts.host, gpu.uuid) for facts, gpu in gpus).items():
        if count > 1:
            problems.append(f"{place[0]}: {count} ranks share {place[1]}; start one rank a GPU")
    for facts, gpu in gpus:
        where = f"{facts.host} rank {facts.rank} {gpu.uuid}"
        if gpu.free_bytes < _FREE_SHARE * gpu.total_bytes:
            free, total = gpu.free_bytes / _GIB, gpu.total_bytes / _GIB
            problems.append(f"{where}: {free:.1f} of {total:.1f} GiB are free; end what else runs there")
        if gpu.is_slowed_down:
            problems.append(
                f"{where}: slowed down by its hardware ({gpu.clock_mhz} of {gpu.max_clock_mhz} MHz, "
                f"{gpu.temperature_celsius} °C); look at cooling and power, or leave the node out"
            )
        if gpu.uncorrected_errors:
            problems.append(
                f"{where}: {gpu.uncorrected_errors} uncorrected memory errors; reset the GPU or leave it out"
            )
    return Finding("gpus", f"{len(gpus)} x {names[0]}", tuple(problems))


def _matmul(ranks: Sequence[RankFacts]) -> Finding:
    rates = [facts.matmul_tflops for facts in ranks]
    median = statistics.median(rates)
    problems = [
        f"{facts.host} rank {facts.rank}: {facts.matmul_tflops:.1f} TFLOP/s, the median is {median:.1f}; "
        "leave it out, every step waits for it"
        for facts in ranks
        # ranks on a CPU share its cores: their rates tell nothing about one of them
        if facts.gpu is not None and facts.matmul_tflops < _SLOWEST_SHARE * median
    ]
    return Finding("matmul", f"{min(rates):.2f} to {max(rates):.2f} TFLOP/s a rank", tuple(problems))


def _all_reduced(world: WorldFacts, bounds: Bounds) -> Finding:
    if world.bus_gbs is None:
        return Finding("all-reduce", "not measured: one rank")
    problems = [f"rank {rank}: the sum over all ranks is wrong" for rank in world.wrong_sums]
    if bounds.min_bus_gbs is not None and world.bus_gbs < bounds.min_bus_gbs:
        problems.append(
            f"bus bandwidth is {world.bus_gbs:.2f} GB/s, asked for are {bounds.min_bus_gbs:g}; "
            "NCCL_DEBUG=INFO shows which network it took (docs/launchers.md)"
        )
    return Finding(
        "all-reduce", f"{world.bus_gbs:.2f} GB/s bus bandwidth over {len(world.ranks)} ranks", tuple(problems)
    )


def _clocks(world: WorldFacts) -> Finding:
    problems = (
        (f"clocks are {world.clock_skew_s:.1f} s apart, at most {_CLOCK_SKEW_S:g} are well; start NTP",)
        if world.clock_skew_s > _CLOCK_SKEW_S
        else ()
    )
    return Finding("clocks", f"{world.clock_skew_s * 1e3:.0f} ms apart", problems)


def _disk(ranks: Sequence[RankFacts], bounds: Bounds) -> Finding:
    free = min(facts.free_bytes for facts in ranks) / _GIB
    slowest = min(facts.written_bytes_per_s for facts in ranks) / 1e6
    problems = (
        (f"{free:.1f} GiB are free, asked for are {bounds.min_free_gib:g} (--min-free-gib); free some",)
        if free < bounds.min_free_gib
        else ()
    )
    return Finding("disk", f"{free:.1f} GiB free, {slowest:.0f} MB/s written by the slowest rank", problems)


def _shared_directory(world: WorldFacts) -> Finding:
    hosts = len({facts.host for facts in world.ranks})
    return Finding("shared directory", f"seen by all ranks of {hosts} hosts", world.unseen)


def _limits(ranks: Sequence[RankFacts], bounds: Bounds) -> Finding:
    least = min(facts.open_files for facts in ranks)
    shared = min(facts.shared_memory_bytes for facts in ranks) / _GIB
    problems = []
    if least < bounds.min_open_files:
        problems.append(f"{least} open files are allowed, {bounds.min_open_files} are needed; ulimit -n")
    if shared < 1:
        problems.append(f"shared memory has {shared:.2f} GiB free, NCCL needs 1; docker run --shm-size=8g")
    return Finding("limits", f"{least} open files, {shared:.1f} GiB of shared memory", tuple(problems))


def _by_rank(values: Sequence[str]) -> str:
    """`a on ranks 0 1 2, b on rank 3`, at most four ranks of each."""
    ranks: dict[str, list[int]] = {}
    for rank, value in enumerate(values):
        ranks.setdefault(value, []).append(rank)
    return ", ".join(
        f"{value} on rank{'s' * (len(where) > 1)} {' '.join(map(str, where[:4]))}{' …' * (len(where) > 4)}"
        for value, where in ranks.items()
    )


# ── collectives ──


def _gathered(value: Any) -> list[Any]:
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def _together(look: Callable[[], Any]) -> list[Any]:
    """`look()` of every rank; the first rank's `OSError`, on all ranks, if there is one."""
    try:
        mine: Any = look()
    except OSError as error:
        mine = error
    everyone = _gathered(mine)
    for rank, answer in enumerate(everyone):
        if isinstance(answer, OSError):
            raise OSError(answer.errno, f"rank {rank}: {answer.strerror}", answer.filename)
    return everyone


def _clock_skew_s() -> float:
    dist.barrier()
    times = _gathered(time.time())
    return float(max(times) - min(times))


def _all_reduce(device: torch.device, repeats: int = 5) -> tuple[float | None, bool]:
    """Bus bandwidth of the slowest rank in GB/s, as nccl-tests count it; whether this rank's sum is right."""
    world = dist.get_world_size()
    if world == 1:
        return None, True
    size = _REDUCED_BYTES[device.type]
    values = torch.full((size // 4,), float(dist.get_rank() + 1), device=device)
    dist.all_reduce(values)
    is_right = bool((values == world * (world + 1) / 2).all())
    values.zero_()
    dist.all_reduce(values)
    start = time.perf_counter()
    for _ in range(repeats):
        dist.all_reduce(values)
    values[0].item()  # waits for the device
    seconds = max(_gathered((time.perf_counter() - start) / repeats))
    return 2 * (world - 1) / world * size / seconds / 1e9, is_right


def _unseen_files(rank: int, directory: Path) -> tuple[str, ...]:
    """Every rank writes a file; rank 0 must see all of them, and all ranks that of rank 0."""
    (name, *_) = _gathered(f".health-{uuid.uuid4().hex}")
    own = directory / f"{name}-{rank}"
    try:
        _together(lambda: own.write_text(str(rank)))
        expected = range(dist.get_world_size()) if rank == 0 else (0,)
        missing = _gathered(_wait_for({other: directory / f"{name}-{other}" for other in expected}))
    finally:
        own.unlink(missing_ok=True)
    return tuple(
        f"rank {reader} does not see what rank {writer} wrote to {directory}; the path must be one shared "
        "directory on every node"
        for reader, writers in enumerate(missing)
        for writer in writers
    )


def _wait_for(files: dict[int, Path]) -> list[int]:
    deadline = time.monotonic() + _VISIBLE_AFTER_S
    while missing := [rank for rank, path in files.items() if not _holds(path, str(rank))]:
        if time.monotonic() > deadline:
            return missing
        os.listdir(next(iter(files.values())).parent)  # makes a network file system look again
        time.sleep(0.2)
    return []


def _holds(path: Path, text: str) -> bool:
    try:
        return path.read_text() == text
    except OSError:
        return False


def failed(findings: Iterable[Finding]) -> bool:
    return any(finding.problems for finding in findings)
