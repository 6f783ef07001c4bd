"""Requests that the planner's tests share: Mistral-7B on 512 x A100-40GB, and on even hardware."""

from __future__ import annotations

from typing import Any

from usdm_megatron.config import DataConfig
from usdm_megatron.plan.activations import kernels_of
from usdm_megatron.plan.hardware import Hardware, Rate, find_hardware
from usdm_megatron.plan.model_shape import find_model
from usdm_megatron.plan.search import PlannedLayout, PlanRequest, judge
from usdm_megatron.plan.work import RowShape

SEQ_LENGTH = 8192
MISTRAL = find_model("mistral-7b")


def rate(value: float) -> Rate:
    return Rate("measured", "a test", ((1.0, value),))


def even_hardware(**changes: Any) -> Hardware:
    """Links of 230 and 25 GB/s, kernels at 62 % of 312 TFLOP/s, elementwise kernels for free."""
    fields: dict[str, Any] = {
        "name": "even",
        "memory_gib": 1e6,
        "memory_budget_gib": 1e6,
        "gpus_per_node": 8,
        "peak_tflops": 312.0,
        "gemm_tflops": rate(0.62 * 312),
        "attention_tflops": rate(0.62 * 312),
        "memory_gb_per_s": rate(1e15),
        "node_gb_per_s": rate(230.0),
        "network_gb_per_s": rate(25.0),
    }
    return Hardware(**{**fields, **changes})


def request(hardware: Hardware | None = None, world_size: int = 512, **changes: Any) -> PlanRequest:
    """Mistral-7B, 1,024 rows of 8,192 tokens, on 512 x A100-40GB unless said otherwise."""
    fields: dict[str, Any] = {
        "model": MISTRAL,
        "hardware": find_hardware("a100-40gb") if hardware is None else hardware,
        "world_size": world_size,
        "data": DataConfig(seq_length=SEQ_LENGTH, global_batch_size=1024),
        "row": RowShape.of_one_sample(SEQ_LENGTH),
        "kernels": kernels_of("te", "cuda"),
    }
    return PlanRequest(**{**fields, **changes})


def planned(
    asked: PlanRequest, tp: int = 1, pp: int = 1, vpp: int = 1, recompute: str = "none"
) -> PlannedLayout:
    """One layout that works."""
    judged = judge(asked, asked.parallel(tp, pp, vpp, recompute), recompute)
    assert isinstance(judged, PlannedLayout), judged.reason
    return judged
