"""The planned order of a pipeline's calls against the order that core's schedules run."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.plan_floor.schedule_jobs import record_orders
from tests.ranks import run_ranks
from usdm_megatron.plan.schedule import Call, bubble, in_flight, order_of_calls

# (vpp, micro-batches): fewer than stages, as many, more, with and without a remainder
_STEPS = {
    1: [(1, 1), (1, 3)],
    2: [(1, 1), (1, 2), (1, 5), (2, 2), (2, 6), (3, 4)],
    3: [(1, 2), (1, 7), (2, 3), (2, 6), (3, 6)],
    4: [(1, 3), (1, 9), (2, 4), (2, 8), (3, 8)],
}


@pytest.mark.parametrize("pp", _STEPS)
def test_order_is_cores(pp: int) -> None:
    orders = run_ranks(pp, record_orders, _STEPS[pp])
    for stage, of_stage in enumerate(orders):
        for (vpp, micro_batches), calls in zip(_STEPS[pp], of_stage, strict=True):
            planned = order_of_calls(pp, vpp, stage, micro_batches)
            assert [(c.kind, c.chunk, c.micro_batch) for c in planned] == calls, (stage, vpp, micro_batches)


_pipelines = st.integers(1, 6).flatmap(
    lambda pp: st.tuples(
        st.just(pp), st.integers(1, 5 if pp > 1 else 1), st.integers(1, 6).map(lambda groups: groups * pp)
    )
)


@settings(max_examples=60, deadline=None)
@given(_pipelines)
def test_every_pass_once_without_deadlock_and_the_bubble_is_what_is_idle(pipeline: Any) -> None:
    pp, vpp, micro_batches = pipeline
    orders = [order_of_calls(pp, vpp, stage, micro_batches) for stage in range(pp)]
    for stage, order in enumerate(orders):
        assert Counter(order) == {
            Call(kind, chunk, m): 1
            for kind in ("forward", "backward")
            for chunk in range(vpp)
            for m in range(micro_batches)
        }
        most = in_flight(pp, vpp, stage, micro_batches)
        warm_up = pp - stage if vpp == 1 else 2 * (pp - stage - 1) + (vpp - 1) * pp + 1
        assert most.total == sum(most.by_chunk) == min(warm_up, vpp * micro_batches)
    forward = Fraction(1, vpp)
    busy = 3 * forward * vpp * micro_batches
    assert _time_of(orders, pp, vpp, forward) / busy - 1 == Fraction(
        bubble(pp, vpp, micro_batches)
    ).limit_denominator(10_000)


def test_what_core_refuses() -> None:
    for arguments in ((2, 1, 2, 4), (1, 2, 0, 4), (4, 2, 0, 6)):
        with pytest.raises(ValueError):
            order_of_calls(*arguments)


def _time_of(orders: list[tuple[Call, ...]], pp: int, vpp: int, forward: Fraction) -> Fraction:
    """When the last pass ends, if each stage runs its calls in order and a pass waits for its message."""
    ended: dict[tuple[str, int, int], Fraction] = {}  # (kind, chunk along the model, micro-batch)
    clocks, places = [Fraction(0)] * pp, [0] * pp
    last = pp * vpp - 1
    while any(place < len(order) for place, order in zip(places, orders, strict=True)):
        moved = False
        for stage, order in enumerate(orders):
            while places[stage] < len(order):
                call = order[places[stage]]
                depth = call.chunk * pp + stage
                if call.kind == "forward":
                    needs = None if depth == 0 else ("forward", depth - 1, call.micro_batch)
                else:
                    needs = ("backward", depth + 1, call.micro_batch) if depth < last else None
                if needs is not None and needs not in ended:
                    break
                start = max(clocks[stage], ended[needs] if needs else Fraction(0))
                clocks[stage] = start + (forward if call.kind == "forward" else 2 * forward)
                ended[(call.kind, depth, call.micro_batch)] = clocks[stage]
                places[stage] += 1
                moved = True
        assert moved, "the stages wait for each other"
    return max(clocks)
