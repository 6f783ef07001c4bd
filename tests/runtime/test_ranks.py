"""Which rank a process is: torchrun's environment, Slurm's, none, or a malformed one."""

from __future__ import annotations

import pytest

from usdm_megatron.errors import ConfigError
from usdm_megatron.runtime.ranks import RankEnvironment, ranks_from_environment

MEETING = {"MASTER_ADDR": "node0", "MASTER_PORT": "29500"}


def test_torchrun() -> None:
    found = ranks_from_environment({"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", **MEETING})
    assert found == RankEnvironment(
        rank=5, world_size=8, local_rank=1, master_addr="node0", master_port=29500
    )


def test_slurm() -> None:
    found = ranks_from_environment(
        {"SLURM_PROCID": "9", "SLURM_NTASKS": "16", "SLURM_LOCALID": "1", **MEETING}
    )
    assert found == RankEnvironment(
        rank=9, world_size=16, local_rank=1, master_addr="node0", master_port=29500
    )


def test_torchrun_inside_slurm_wins() -> None:
    slurm = {"SLURM_PROCID": "1", "SLURM_NTASKS": "2"}
    found = ranks_from_environment({"RANK": "5", "WORLD_SIZE": "8", **slurm, **MEETING})
    assert found is not None and (found.rank, found.world_size) == (5, 8)


@pytest.mark.parametrize(
    "environment", [{}, {"RANK": "0"}, {"WORLD_SIZE": "2"}, {"SLURM_PROCID": "0"}, MEETING]
)
def test_none(environment: dict[str, str]) -> None:
    assert ranks_from_environment(environment) is None


def test_one_rank_needs_no_meeting() -> None:
    assert ranks_from_environment({"RANK": "0", "WORLD_SIZE": "1"}) == RankEnvironment()
    assert ranks_from_environment({"SLURM_PROCID": "0", "SLURM_NTASKS": "1"}) == RankEnvironment()


@pytest.mark.parametrize("missing", MEETING)
@pytest.mark.parametrize(
    "names", [("RANK", "WORLD_SIZE", "torchrun"), ("SLURM_PROCID", "SLURM_NTASKS", "srun")]
)
def test_where_they_meet_is_missing(names: tuple[str, str, str], missing: str) -> None:
    rank, size, source = names
    environment = {rank: "0", size: "2", **MEETING}
    del environment[missing]
    with pytest.raises(ConfigError) as error:
        ranks_from_environment(environment)
    message = str(error.value)
    assert message.startswith(f"{source}: 2 ranks need MASTER_ADDR and MASTER_PORT to meet; export both")
    assert "scontrol show hostnames" in message


MALFORMED = [
    ({"RANK": "zero", "WORLD_SIZE": "2"}, "torchrun: rank 'zero' of '2'"),
    ({"RANK": "0", "WORLD_SIZE": ""}, "torchrun: rank '0' of ''"),
    ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "x"}, "torchrun"),
    ({"SLURM_PROCID": "1.5", "SLURM_NTASKS": "2"}, "srun: rank '1.5' of '2'"),
    ({"RANK": "2", "WORLD_SIZE": "2"}, "rank 2 is outside 0 to 1"),
    ({"RANK": "-1", "WORLD_SIZE": "2"}, "rank -1 is outside 0 to 1"),
    ({"RANK": "0", "WORLD_SIZE": "0"}, "rank 0 is outside"),
    ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_PORT": "http"}, "MASTER_PORT is 'http'"),
    ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_PORT": "70000"}, "MASTER_PORT is '70000'"),
]


@pytest.mark.parametrize(("environment", "message"), MALFORMED, ids=str)
def test_malformed(environment: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        ranks_from_environment({**MEETING, **environment})
    assert message in str(error.value)
