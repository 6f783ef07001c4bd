"""Which rank this process is: torchrun's or Slurm's environment, or a run of one (pure: no torch)."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass

from usdm_megatron.errors import ConfigError

LOOPBACK = "lo0" if sys.platform == "darwin" else "lo"  # name of the interface, for gloo


@dataclass(frozen=True)
class RankEnvironment:
    """Rank of this process, ranks in all, and where they meet."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    master_addr: str = "127.0.0.1"
    master_port: int = 0  # unused by a run of one


def ranks_from_environment(environment: Mapping[str, str] | None = None) -> RankEnvironment | None:
    """The rank that torchrun or Slurm gave this process; None when neither did.

    Raises `ConfigError` when the environment names ranks but not where they meet, or makes no sense.
    """
    env = os.environ if environment is None else environment
    if "RANK" in env and "WORLD_SIZE" in env:
        return _rank_environment(env, env["RANK"], env["WORLD_SIZE"], env.get("LOCAL_RANK", "0"), "torchrun")
    if "SLURM_PROCID" in env and "SLURM_NTASKS" in env:
        return _rank_environment(
            env, env["SLURM_PROCID"], env["SLURM_NTASKS"], env.get("SLURM_LOCALID", "0"), "srun"
        )
    return None


def started_by_torchrun() -> bool:
    """Whether a torch launcher (ours too) started this process; a Slurm allocation alone does not count."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def _rank_environment(
    env: Mapping[str, str], rank: str, world_size: str, local_rank: str, source: str
) -> RankEnvironment:
    try:
        numbers = int(rank), int(world_size), int(local_rank)
    except ValueError as error:
        raise ConfigError(f"{source}: rank {rank!r} of {world_size!r} is not a pair of integers") from error
    if not 0 <= numbers[0] < numbers[1]:
        raise ConfigError(
            f"{source}: rank {rank} is outside 0 to {numbers[1] - 1} of {world_size} ranks; start every rank "
            f"once, all with the same number of ranks"
        )
    if numbers[1] == 1:
        return RankEnvironment(rank=0, world_size=1, local_rank=numbers[2])
    if "MASTER_ADDR" not in env or "MASTER_PORT" not in env:
        raise ConfigError(
            f"{source}: {world_size} ranks need MASTER_ADDR and MASTER_PORT to meet; export both "
            f"(under Slurm: MASTER_ADDR=$(scontrol show hostnames $SLURM_JOB_NODELIST | head -n 1))"
        )
    port = env["MASTER_PORT"]
    if not (port.isascii() and port.isdigit() and 0 < int(port) < 1 << 16):
        raise ConfigError(f"{source}: MASTER_PORT is {port!r}; it must be a port number, 1 to 65535")
    return RankEnvironment(*numbers, master_addr=env["MASTER_ADDR"], master_port=int(port))
