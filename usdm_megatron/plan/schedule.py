"""The order in which a pipeline stage runs its micro-batches: megatron-core's schedules as arithmetic.

Source: megatron-core 0.16.1 `pipeline_parallel/schedules.py` (`get_pp_rank_microbatches`,
`get_schedule_table`): 1F1B, and interleaved 1F1B in groups of `pp` micro-batches.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from typing import Literal


@dataclass(frozen=True)
class Call:
    """One pass of one micro-batch through one of the rank's model chunks."""

    kind: Literal["forward", "backward"]
    chunk: int
    micro_batch: int


@dataclass(frozen=True)
class InFlight:
    """Forward passes whose backward pass has not run, at the instant when there are the most of them."""

    by_chunk: tuple[int, ...]

    @property
    def total(self) -> int:
        return sum(self.by_chunk)


@lru_cache(maxsize=4096)
def order_of_calls(pp: int, vpp: int, stage: int, micro_batches: int) -> tuple[Call, ...]:
    """Every forward and backward pass of a step on pipeline rank `stage`, in order.

    Warm-up forward passes, then one forward and one backward pass in turn, then the backward passes that
    are left. Raises `ValueError` for what core's schedule refuses.
    """
    if not 0 <= stage < pp:
        raise ValueError(f"stage {stage} is outside a pipeline of {pp}")
    if vpp > 1 and (pp == 1 or micro_batches % pp):
        raise ValueError(f"{micro_batches} micro-batches do not interleave over {pp} stages")
    groups = _groups(micro_batches, pp if vpp > 1 else micro_batches)
    forwards = [Call("forward", c, m) for group in groups for c in range(vpp) for m in group]
    backwards = [Call("backward", c, m) for group in groups for c in reversed(range(vpp)) for m in group]
    warm_up = min(_warm_up(pp, vpp, stage), len(forwards))
    steady = chain.from_iterable(zip(forwards[warm_up:], backwards, strict=False))
    return (*forwards[:warm_up], *steady, *backwards[len(forwards) - warm_up :])


@lru_cache(maxsize=4096)
def in_flight(pp: int, vpp: int, stage: int, micro_batches: int) -> InFlight:
    """Activations that the stage holds at most, counted in (chunk, micro-batch) pairs."""
    held = [0] * vpp
    most = InFlight((0,) * vpp)
    for call in order_of_calls(pp, vpp, stage, micro_batches):
        held[call.chunk] += 1 if call.kind == "forward" else -1
        if sum(held) > most.total:
            most = InFlight(tuple(held))
    return most


def bubble(pp: int, vpp: int, micro_batches: int) -> float:
    """Idle time of a stage beside its computing time, with stages of equal length (arXiv 2104.04473)."""
    return (pp - 1) / (vpp * micro_batches)


def _warm_up(pp: int, vpp: int, stage: int) -> int:
    """Forward passes before the first backward pass follows."""
    if vpp == 1:
        return pp - stage - 1
    return 2 * (pp - stage - 1) + (vpp - 1) * pp


def _groups(micro_batches: int, size: int) -> list[range]:
    return [range(start, min(start + size, micro_batches)) for start in range(0, micro_batches, max(1, size))]
