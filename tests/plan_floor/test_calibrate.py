"""`plan --calibrate`: two ranks measure every rate that a plan of them needs, and a plan reads it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import yaml

from tests.plan_floor.calibrate_jobs import measure
from tests.plan_floor.requests import planned, request
from tests.ranks import run_ranks
from usdm_megatron.config import DataConfig
from usdm_megatron.plan.hardware import find_hardware


def test_what_two_ranks_measure_plans_them(tmp_path: Path) -> None:
    tree, nothing = run_ranks(2, measure)
    assert nothing is None
    path = tmp_path / "here.yaml"
    path.write_text(yaml.safe_dump(tree))
    hardware = find_hardware(str(path))
    assert (hardware.device, hardware.gpus_per_node, hardware.peak_tflops) == ("cpu", 2, None)
    known = {name for name, rate in hardware.rates.items() if rate.known}
    assert known == {"gemm_tflops", "attention_tflops", "memory_gb_per_s", "node_gb_per_s"}  # one node
    assert [size for size, _ in hardware.gemm_tflops.points] == [1, 2]  # two key-value heads
    assert [size for size, _ in hardware.attention_tflops.points] == [128, 256]
    assert {rate.source for rate in hardware.rates.values() if rate.known} == {"measured"}
    assert "small, 256 tokens, 2 ranks at once, float32" in hardware.gemm_tflops.reference

    roomy = replace(hardware, memory_budget_gib=1e6)
    found = planned(request(roomy, 2, data=DataConfig(global_batch_size=2), bf16=False), tp=2)
    assert found.step_time_s is not None and found.mfu is None
