"""What ranks measure in `test_calibrate.py` (module level, so that forked ranks can import it)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from tests.plan_floor.requests import MISTRAL


def measure(environment: Any, store: Any) -> dict[str, Any] | None:
    """A small layer's rates on these ranks; what YAML would hold, on rank 0."""
    from usdm_megatron.log import quiet_upstream
    from usdm_megatron.plan.calibrate import Calibration, calibrate

    quiet_upstream()
    architecture = replace(
        MISTRAL.architecture, hidden=64, heads=4, kv_heads=2, head_dim=16, ffn=96, layers=2
    )
    asked = Calibration(
        replace(MISTRAL, name="small", architecture=architecture),
        tokens=256,
        bf16=False,
        largest_payload_mib=1,
        kernel_s=0.01,
    )
    measured = calibrate(asked, environment, store)
    return None if measured is None else measured.to_tree()
