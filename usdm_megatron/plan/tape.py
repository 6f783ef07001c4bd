"""What a run of operators holds for its backward pass, and what that pass needs beside it: bytes only.

A tensor here is a name with the bytes of its storage; views of one storage share the name of what is
saved. Backward passes run the operators in reverse, as autograd does: an operator makes the gradients of
what it read, then lets go of those of what it wrote and of what it alone still kept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Op:
    """One differentiable operator, by the names of its tensors."""

    reads: tuple[str, ...]
    writes: tuple[str, ...]
    saves: tuple[str, ...] = ()
    weight_gradient: int = 0  # bytes, gone once it is added to the buffer of gradients
    scratch: int = 0  # bytes that its backward pass needs for itself


@dataclass(frozen=True)
class Recomputed:
    """Operators that keep `saves` alone, and run forward once more before their backward pass."""

    ops: tuple[Op, ...]
    reads: tuple[str, ...]
    saves: tuple[str, ...]
    output: int  # bytes of what they write, which is made again too and held until their backward pass ends

    @property
    def writes(self) -> tuple[str, ...]:
        return self.ops[-1].writes


Step = Op | Recomputed


@dataclass(frozen=True)
class Footprint:
    """What operators hold between their passes, and what the backward pass holds at most beyond that."""

    saved: int
    backward: int
    forward: int = 0  # the forward pass beyond that; 0: no more than the backward pass


def footprint(steps: Sequence[Step], sizes: Mapping[str, int]) -> Footprint:
    """The footprint of `steps`; `sizes` gives each tensor's bytes and those of its gradient.

    The gradient of what the last step writes is there from the start and counts.
    """
    held = sum(sizes[name] for name in {name for step in steps for name in step.saves})
    return Footprint(held, _backward(steps, sizes) - held)


def _backward(steps: Sequence[Step], sizes: Mapping[str, int]) -> int:
    """Most bytes alive in the backward pass of `steps`: what they saved, gradients, scratch."""
    first_keeper: dict[str, int] = {}
    for index, step in enumerate(steps):
        for name in step.saves:
            first_keeper.setdefault(name, index)
    live = sum(sizes[name] for name in first_keeper)
    gradients = set(steps[-1].writes)
    live += sum(sizes[name] for name in gradients)
    peak = live
    for index in reversed(range(len(steps))):
        step = steps[index]
        if isinstance(step, Recomputed):
            inside = _backward(step.ops, sizes) - sum(sizes[name] for name in step.saves)
            gradients_in = sum(sizes[name] for name in step.writes)  # counted inside too
            peak = max(peak, live + inside + step.output - gradients_in)
        else:
            peak = max(peak, live + _of_one(step, sizes))
        made = set(step.reads) - gradients
        gone = gradients & set(step.writes)
        gradients = (gradients | made) - gone
        live += sum(sizes[name] for name in made) - sum(sizes[name] for name in gone)
        live -= sum(sizes[name] for name, keeper in first_keeper.items() if keeper == index)
    return peak


def _of_one(op: Op, sizes: Mapping[str, int]) -> int:
    """Bytes that the backward pass of `op` makes: a gradient that is there already is made, then added."""
    return sum(sizes[name] for name in op.reads) + op.weight_gradient + op.scratch
