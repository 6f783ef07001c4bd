"""`usdm-megatron inspect env [--check]`: the versions that a run would use, and the check of its machines."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro

from usdm_megatron.errors import EXIT_DONE, EXIT_FAULT, ConfigError

if TYPE_CHECKING:
    from usdm_megatron.runtime.health import Finding
    from usdm_megatron.runtime.ranks import RankEnvironment


@dataclass(frozen=True)
class EnvironmentFlags:
    """Print the versions that a run would use; with --check, examine every rank's machine, before a run.

    The check runs wherever a run would: under torchrun, under srun, or with --nproc-per-node. It compares
    versions and NCCL variables between ranks, looks at the GPUs (free memory, clocks, memory errors) and at
    the rate of one matrix product on each, all-reduces over all ranks, compares clocks, and writes to the
    run's directory on every rank. Exit code 1 when anything is not as it must be.
    """

    check: bool = False
    """examine the machines of all ranks"""
    path: Path = Path(".")
    """directory that all nodes share, where the run will be kept"""
    min_free_gib: float = 200.0
    """free space asked for there; a checkpoint of a 7B model with its optimizer takes about 100"""
    device: Literal["cuda", "cpu"] | None = None
    """what every rank must run on (not judged unless given)"""
    min_bus_gbs: float | None = None
    """all-reduce bus bandwidth asked for, GB/s (not judged unless given)"""
    nproc_per_node: int | None = None
    """start this many ranks here (without torchrun or Slurm)"""
    timeout_minutes: float = 5.0
    """after this long a rank that does not answer ends the check"""
    json: bool = False
    """print one JSON object"""


def main(argv: Sequence[str]) -> int:
    """Print, or check; returns the exit code."""
    flags = tyro.cli(EnvironmentFlags, args=list(argv), prog="usdm-megatron inspect env")
    if not flags.check:
        _print_versions()
        return EXIT_DONE
    _refuse_bad_flags(flags)
    from usdm_megatron.runtime.ranks import RankEnvironment, ranks_from_environment, started_by_torchrun

    if (flags.nproc_per_node or 1) > 1 and not started_by_torchrun():
        from usdm_megatron.runtime.launch import launch_local_ranks

        sys.stdout.flush()
        return launch_local_ranks("usdm_megatron.cli", ["inspect", "env", *argv], flags.nproc_per_node or 1)
    return _check(flags, ranks_from_environment() or RankEnvironment())


def _refuse_bad_flags(flags: EnvironmentFlags) -> None:
    problems = [
        f"inspect env: {name} is {value}; it must be positive"
        for name, value in (
            ("--min-free-gib", flags.min_free_gib),
            ("--min-bus-gbs", 1 if flags.min_bus_gbs is None else flags.min_bus_gbs),
            ("--nproc-per-node", 1 if flags.nproc_per_node is None else flags.nproc_per_node),
            ("--timeout-minutes", flags.timeout_minutes),
        )
        if not value > 0
    ]
    if not flags.path.is_dir():
        problems.append(
            f"inspect env: --path {flags.path} is no directory; make it, or name the run's parent"
        )
    if problems:
        raise ConfigError(*problems)


def _check(flags: EnvironmentFlags, environment: RankEnvironment) -> int:
    from usdm_megatron.layout import ParallelLayout
    from usdm_megatron.runtime.health import Bounds, examine, failed, judge
    from usdm_megatron.runtime.process_groups import open_process_groups

    layout = ParallelLayout(environment.world_size)
    timeout = timedelta(minutes=flags.timeout_minutes)
    with open_process_groups(layout, environment, timeout=timeout) as groups:
        try:
            world = examine(groups.rank, groups.device, flags.path)
        except OSError as error:
            raise ConfigError(
                f"inspect env: --path {flags.path} cannot be written: {error}; name a directory that every "
                "rank may write to"
            ) from error
    findings = judge(world, Bounds(flags.min_free_gib, flags.min_bus_gbs, flags.device))
    if groups.rank == 0:
        hosts = len({facts.host for facts in world.ranks})
        if flags.json:
            record = {"ok": not failed(findings), "findings": [asdict(finding) for finding in findings]}
            print(json.dumps({**record, "world": asdict(world)}))
        else:
            print(f"{len(world.ranks)} ranks on {hosts} hosts", *map(_lines, findings), sep="\n", flush=True)
    return EXIT_FAULT if failed(findings) else EXIT_DONE


def _lines(finding: Finding) -> str:
    mark = "FAIL" if finding.problems else "ok"
    return "\n".join(
        [f"  {mark:<5} {finding.name:<17} {finding.value}"] + [f"        {line}" for line in finding.problems]
    )


def _print_versions() -> None:
    import platform

    import torch

    from usdm_megatron.runtime.health_facts import installed_versions

    print(f"python {platform.python_version()} on {platform.platform()} ({sys.executable})")
    for package, version in installed_versions().items():
        print(f"{package:<20}{version}")
    print(
        f"{'device':<20}{torch.cuda.get_device_name() if torch.cuda.is_available() else 'none: runs on CPU'}"
    )
