"""Where two runs of one model part: hidden states after embedding, layers and final norm, and logits.

P = positions compared. Depths as in `model/logits.py`; the logits come last, at layers + 2.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

MOST_POSITIONS = 512  # 34 states of 4,096 numbers (7B): 0.3 GB a side
_STEP = 10


@dataclass(frozen=True)
class StateDifference:
    """Two hidden states at one depth, over the compared positions."""

    where: str
    max_abs_difference: float
    relative: float
    """Largest |Δ| by the size around it: the root mean square of its position or of its channel, the greater
    one. By both, because single tokens and channels of a trained model are hundreds of times the rest."""


@dataclass(frozen=True)
class LayerDifferences:
    """The states at every depth, and the first that differs by more than rounding (None: none stands out)."""

    sample: int
    positions: int  # compared
    by_depth: tuple[StateDifference, ...]
    first: int | None

    def describe(self) -> str:
        """One sentence that names the first difference, and a table of at most 12 lines around it."""
        states, first = self.by_depth, self.first
        if first is None:
            headline = (
                "no layer stands out: the difference is small and grows with depth, as rounding does; "
                "if it is that, --tolerance is too small for this model"
            )
        else:
            before = max((state.max_abs_difference for state in states[:first]), default=0.0)
            headline = f"first difference after {states[first].where}: max |Δ| {_number(states[first])}"
            if first > 0:
                embedding = states[0].max_abs_difference
                equal = "equal" if embedding == 0 else f"within {embedding:.2g}"
                headline += f" (before it {before:.2g}); embedding {equal}"
        return "\n".join(
            [headline, f"  sample {self.sample}, {self.positions} positions: max |Δ|, relative to the state"]
            + self._table()
        )

    def _table(self) -> list[str]:
        shown = self._shown()
        width = max(len(self.by_depth[depth].where) for depth in shown)
        lines = []
        for previous, depth in zip([-1, *shown], shown, strict=False):
            if depth > previous + 1 and self.first is not None:
                lines.append("  …")
            state = self.by_depth[depth]
            mark = "  ← first" if depth == self.first else ""
            lines.append(f"  {state.where:<{width}}  {_number(state):>8}  {state.relative:8.2g}{mark}")
        return lines

    def _shown(self) -> list[int]:
        """The ends, and what is around the first difference; without one, depths spread evenly."""
        count = len(self.by_depth)
        if self.first is None:
            middle = range(0, count, -(-count // 10))
        else:
            middle = range(max(0, self.first - 3), min(count, self.first + 4))
        return sorted({0, *middle, count - 2, count - 1})


def compare_states(
    ours: Sequence[Tensor], theirs: Sequence[Tensor], *, sample: int, tolerance: float
) -> LayerDifferences:
    """Compare `[P, size]` at every depth, the logits last.

    Rounding is what a sum of `hidden` terms in fp32 may differ by, √hidden units in the last place (measured
    after one layer: 1.5 of these), tenfold; or, when that is more, `tolerance`, a part of the state.
    """
    layers = len(theirs) - 3
    names = [
        "the embedding",
        *(f"decoder layer {layer + 1} of {layers} (model.layers.{layer})" for layer in range(layers)),
        "the final norm",
        "the output layer",
    ]
    by_depth = tuple(_difference(*pair) for pair in zip(names, ours, theirs, strict=True))
    rounding = max(
        _STEP * math.sqrt(theirs[0].size(-1)) * torch.finfo(torch.float32).eps,
        tolerance,
    )
    first = first_step([state.relative for state in by_depth], rounding)
    return LayerDifferences(sample, len(ours[0]), by_depth, first)


def first_step(relative: Sequence[float], rounding: float) -> int | None:
    """The first of the relative differences that is no rounding; None when none is.

    Rounding grows smoothly with depth; a wrong weight is a step. So a difference counts when it is
    above `rounding` and ten times all before it. NaN always counts.
    """
    before = 0.0
    for depth, value in enumerate(relative):
        if not value <= max(rounding, _STEP * before):
            return depth
        before = max(before, value)
    return None


def chosen_positions(differences_T: Tensor, most: int = MOST_POSITIONS) -> list[int]:
    """Positions of a sample whose states are compared: all, or half the worst ones and half spread evenly.

    `differences_T`: largest difference of a logit at every position. The worst are where a single wrong
    row of the embedding shows.
    """
    length = len(differences_T)
    if length <= most:
        return list(range(length))
    worst = differences_T.topk(most // 2).indices  # NaN is the largest to topk
    even = torch.linspace(0, length - 1, most - most // 2, dtype=torch.float64).long().to(worst.device)
    return torch.cat([worst, even]).unique().tolist()


def _difference(where: str, ours_PH: Tensor, theirs_PH: Tensor) -> StateDifference:
    apart_PH = (ours_PH.to(theirs_PH.device) - theirs_PH).abs()
    square_PH = theirs_PH.square()
    size_PH = torch.maximum(square_PH.mean(1, keepdim=True), square_PH.mean(0, keepdim=True)).sqrt()
    relative_PH = torch.where(apart_PH == 0, apart_PH, apart_PH / size_PH)
    return StateDifference(where, apart_PH.max().item(), relative_PH.max().item())


def _number(state: StateDifference) -> str:
    return f"{state.max_abs_difference:.2g}"
