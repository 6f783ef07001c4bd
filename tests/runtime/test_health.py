"""`inspect env --check`: every fault that it looks for is named, and a sound world passes."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from tests.ranks import run_ranks
from tests.training.jobs import TIMEOUT
from usdm_megatron.cli.inspect_env import main
from usdm_megatron.errors import ConfigError
from usdm_megatron.runtime.health import Bounds, WorldFacts, examine, failed, judge
from usdm_megatron.runtime.health_facts import GpuFacts, RankFacts, parse_nvidia_smi, unmet_requirements

GIB = 2**30
BOUNDS = Bounds(min_free_gib=100, min_bus_gbs=150)


def gpu(**changes: Any) -> GpuFacts:
    sound = GpuFacts("GPU-0", "NVIDIA A100-SXM4-40GB", 40 * GIB, 39 * GIB, 40, 1410, 1410, False, 0)
    return dataclasses.replace(sound, **changes)


def rank_facts(rank: int, **changes: Any) -> RankFacts:
    sound = RankFacts(
        rank=rank,
        host=f"node{rank // 2}",
        versions={"torch": "2.8.0", "nccl": "2.27.3"},
        unmet=(),
        environment={"NCCL_IB_HCA": "mlx5"},
        gpu=gpu(uuid=f"GPU-{rank % 2}"),
        matmul_tflops=250.0,
        free_bytes=500 * GIB,
        written_bytes_per_s=1e9,
        open_files=65536,
        shared_memory_bytes=8 * GIB,
    )
    return dataclasses.replace(sound, **changes)


def world(last: RankFacts | None = None, **changes: Any) -> WorldFacts:
    """Four sound ranks on two hosts, the last of them `last`."""
    ranks = (*map(rank_facts, range(3)), last or rank_facts(3))
    return dataclasses.replace(WorldFacts(ranks, 200.0, (), 0.01, ()), **changes)


def test_a_sound_world() -> None:
    findings = judge(world(), BOUNDS)
    assert not failed(findings)
    assert [finding.name for finding in findings] == [
        "versions", "environment", "gpus", "matmul", "all-reduce", "clocks", "disk", "shared directory",
        "limits",
    ]  # fmt: skip


FAULTS = {
    "another-version": (
        world(rank_facts(3, versions={"torch": "2.8.0", "nccl": "2.26.2"})),
        "versions",
        "nccl differs between ranks: 2.27.3 on ranks 0 1 2, 2.26.2 on rank 3",
    ),
    "requirement": (world(rank_facts(3, unmet=("numpy is 1.0",))), "versions", "node1: numpy is 1.0"),
    "environment": (
        world(rank_facts(3, environment={})),
        "environment",
        "NCCL_IB_HCA differs between ranks: mlx5 on ranks 0 1 2, (unset) on rank 3",
    ),
    "no-gpu": (world(rank_facts(3, gpu=None)), "gpus", "1 of 4 ranks see no GPU"),
    "another-gpu": (world(rank_facts(3, gpu=gpu(name="T4", uuid="GPU-1"))), "gpus", "T4 on rank 3"),
    "shared-gpu": (world(rank_facts(3, gpu=gpu())), "gpus", "node1: 2 ranks share GPU-0"),
    "memory-taken": (
        world(rank_facts(3, gpu=gpu(uuid="GPU-1", free_bytes=30 * GIB))),
        "gpus",
        "node1 rank 3 GPU-1: 30.0 of 40.0 GiB are free",
    ),
    "slowed-down": (
        world(rank_facts(3, gpu=gpu(uuid="GPU-1", is_slowed_down=True, clock_mhz=600))),
        "gpus",
        "(600 of 1410 MHz, 40 °C)",
    ),
    "memory-errors": (
        world(rank_facts(3, gpu=gpu(uuid="GPU-1", uncorrected_errors=2))),
        "gpus",
        "2 uncorrected memory errors",
    ),
    "slow-gpu": (
        world(rank_facts(3, matmul_tflops=200.0)),
        "matmul",
        "node1 rank 3: 200.0 TFLOP/s, the median is 250.0",
    ),
    "wrong-sum": (world(wrong_sums=(2,)), "all-reduce", "rank 2: the sum over all ranks is wrong"),
    "slow-network": (world(bus_gbs=12.0), "all-reduce", "is 12.00 GB/s, asked for are 150"),
    "clocks": (world(clock_skew_s=30.0), "clocks", "clocks are 30.0 s apart"),
    "disk": (world(rank_facts(3, free_bytes=3 * GIB)), "disk", "3.0 GiB are free, asked for are 100"),
    "not-shared": (world(unseen=("rank 0 does not see …",)), "shared directory", "rank 0 does not see"),
    "open-files": (world(rank_facts(3, open_files=1024)), "limits", "1024 open files are allowed"),
    "shared-memory": (world(rank_facts(3, shared_memory_bytes=GIB // 16)), "limits", "has 0.06 GiB free"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_fault(fault: str) -> None:
    facts, name, problem = FAULTS[fault]
    wrong = [finding for finding in judge(facts, BOUNDS) if finding.problems]
    assert [finding.name for finding in wrong] == [name]
    assert problem in wrong[0].problems[0]


def test_cores_that_ranks_share_are_not_compared() -> None:
    ranks = tuple(rank_facts(r, gpu=None, matmul_tflops=0.1 * (r + 1)) for r in range(4))
    assert not failed(judge(world(ranks=ranks), BOUNDS))


def test_the_device_that_is_asked_for() -> None:
    on_cpus = world(ranks=tuple(rank_facts(r, gpu=None) for r in range(4)))
    for facts, device, problem in (
        (on_cpus, "cuda", "no rank sees one"),
        (on_cpus, "cpu", ""),
        (world(), "cuda", ""),
        (world(), "cpu", "ranks run on GPUs"),
    ):
        wrong = [one for one in judge(facts, dataclasses.replace(BOUNDS, device=device)) if one.problems]
        assert [one.name for one in wrong] == ["gpus"] * bool(problem)
        assert not problem or problem in wrong[0].problems[0]


def test_nvidia_smi_lines() -> None:
    fields = ("uuid", "memory.used", "clocks_throttle_reasons.hw_slowdown", "ecc.errors")
    assert parse_nvidia_smi(fields, "GPU-1, 3, Not Active, [N/A]") == {
        "uuid": "GPU-1",
        "memory.used": "3",
        "clocks_throttle_reasons.hw_slowdown": "Not Active",
    }
    with pytest.raises(ValueError, match="shorter"):
        parse_nvidia_smi(fields, "GPU-1, 3")


def test_requirements_of_another_version(monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib import metadata

    required = ["numpy>=99", "torch", "no-such-package", "ray>=99; extra == 'ray'"]
    monkeypatch.setattr(metadata, "requires", lambda name: required)
    problems = list(unmet_requirements())
    assert [problem.split()[0] for problem in problems] == ["numpy", "no-such-package"]
    assert problems[0].endswith("pip install 'numpy>=99'")


# ── on ranks ──


def examine_here(environment: Any, store: Any, directories: list[Path]) -> WorldFacts:
    from usdm_megatron.layout import ParallelLayout
    from usdm_megatron.runtime import health
    from usdm_megatron.runtime.process_groups import open_process_groups

    health._VISIBLE_AFTER_S = 1.0
    layout = ParallelLayout(environment.world_size)
    with open_process_groups(layout, environment, timeout=TIMEOUT, store=store) as groups:
        return examine(groups.rank, groups.device, directories[groups.rank])


def test_ranks_with_one_directory(tmp_path: Path) -> None:
    found = run_ranks(2, examine_here, [tmp_path] * 2)
    assert found[0] == found[1]
    (facts, _) = found
    assert [rank.rank for rank in facts.ranks] == [0, 1]
    assert facts.bus_gbs > 0 and facts.wrong_sums == () and facts.clock_skew_s < 1 and facts.unseen == ()
    assert list(tmp_path.iterdir()) == []


def test_ranks_whose_directories_are_not_shared(tmp_path: Path) -> None:
    directories = [tmp_path / "a", tmp_path / "b"]
    for directory in directories:
        directory.mkdir()
    facts = run_ranks(2, examine_here, directories)[0]
    assert [problem.split(" wrote")[0] for problem in facts.unseen] == [
        "rank 0 does not see what rank 1",
        "rank 1 does not see what rank 0",
    ]
    assert all(list(directory.iterdir()) == [] for directory in directories)


def test_a_directory_that_one_rank_cannot_write_to(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"FileNotFoundError: \[Errno 2\] rank 1"):
        run_ranks(2, examine_here, [tmp_path, tmp_path / "gone"])


# ── the command ──


def test_bad_flags(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        main(["--check", "--path", str(tmp_path / "no"), "--min-free-gib", "0", "--min-bus-gbs", "nan"])
    assert len(error.value.problems) == 3


def test_one_rank(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["--check", "--path", str(tmp_path), "--min-free-gib", "1e9", "--json"])
    record = json.loads(capsys.readouterr().out)
    assert code == 1 and record["ok"] is False
    by_name = {finding["name"]: finding for finding in record["findings"]}
    assert "--min-free-gib" in by_name["disk"]["problems"][0]
    assert by_name["all-reduce"]["value"] == "not measured: one rank"
