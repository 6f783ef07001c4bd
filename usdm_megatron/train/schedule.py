"""The learning rate of every step: a pure function, as transformers' schedules compute it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from usdm_megatron.config import OptimizerConfig

DEFAULT_WARMUP_FRACTION = 0.03


@dataclass(frozen=True)
class Schedule:
    """Warm-up from 0 to `lr` over `warmup_steps`, then decay to `min_lr` at `decay_steps`."""

    lr: float
    min_lr: float
    warmup_steps: int
    decay_steps: int
    style: Literal["cosine", "linear", "constant"]


def build_schedule(config: OptimizerConfig, train_steps: int) -> Schedule:
    """The schedule of a run of `train_steps`; warm-up steps = ceil(fraction x decay steps)."""
    decay_steps = config.lr_decay_iters or train_steps
    warmup_steps = config.lr_warmup_iters
    if warmup_steps is None:
        fraction = config.lr_warmup_fraction
        # exact decimal: 0.03 * 100 is 3.0000000000000004 in floats on some products, and ceil would say 4
        exact = Fraction(str(DEFAULT_WARMUP_FRACTION if fraction is None else fraction))
        warmup_steps = math.ceil(exact * decay_steps)
    return Schedule(
        lr=config.lr,
        min_lr=config.min_lr,
        warmup_steps=warmup_steps,
        decay_steps=decay_steps,
        style=config.lr_decay_style,
    )


def lr_at(step: int, schedule: Schedule) -> float:
    """Learning rate of the update after `step` completed ones (the first is `lr_at(0)`, 0 under warm-up)."""
    if step < schedule.warmup_steps:
        return schedule.lr * step / schedule.warmup_steps
    if schedule.style == "constant":
        return schedule.lr
    progress = (step - schedule.warmup_steps) / max(1, schedule.decay_steps - schedule.warmup_steps)
    progress = min(progress, 1.0)
    share = 0.5 * (1.0 + math.cos(math.pi * progress)) if schedule.style == "cosine" else 1.0 - progress
    return schedule.min_lr + (schedule.lr - schedule.min_lr) * share
