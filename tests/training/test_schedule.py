"""The learning rate of every step equals transformers' schedules, and warm-up is ceil(fraction x steps)."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import pytest
import torch
from transformers import (
    get_constant_schedule_with_warmup,
    get_cosine_schedule_with_warmup,
    get_linear_schedule_with_warmup,
)

from usdm_megatron.config import OptimizerConfig
from usdm_megatron.train.schedule import Schedule, build_schedule, lr_at

LR = 2e-5
FRACTIONS = [0.0, 0.03, 0.1, 0.25, 0.5, 0.999]
STEPS = [1, 2, 3, 7, 33, 34, 66, 67, 100, 101, 1000]


def transformers_lrs(style: str, warmup: int, steps: int) -> list[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=LR)
    schedule: Any = {
        "cosine": lambda: get_cosine_schedule_with_warmup(optimizer, warmup, steps),
        "linear": lambda: get_linear_schedule_with_warmup(optimizer, warmup, steps),
        "constant": lambda: get_constant_schedule_with_warmup(optimizer, warmup),
    }[style]()
    return [LR * schedule.lr_lambdas[0](step) for step in range(steps)]


@pytest.mark.parametrize("style", ["cosine", "linear", "constant"])
@pytest.mark.parametrize("fraction", FRACTIONS)
@pytest.mark.parametrize("steps", STEPS)
def test_lr_is_that_of_transformers(steps: int, fraction: float, style: Any) -> None:
    schedule = build_schedule(
        OptimizerConfig(lr=LR, lr_warmup_fraction=fraction, lr_decay_style=style), steps
    )
    assert schedule.warmup_steps == math.ceil(fraction * steps)
    expected = transformers_lrs(style, schedule.warmup_steps, steps)
    ours = [lr_at(step, schedule) for step in range(steps)]
    assert ours == pytest.approx(expected, rel=1e-13, abs=1e-25)
    if schedule.warmup_steps:
        assert ours[0] == 0.0


@pytest.mark.parametrize(
    ("fraction", "steps", "warmup"),
    [
        (0.03, 1, 1), (0.03, 33, 1), (0.03, 34, 2), (0.03, 100, 3), (0.03, 101, 4), (0.03, 1_000_000, 30_000),
        (0.1, 10, 1), (0.1, 11, 2), (0.1, 30, 3), (0.0, 100, 0), (0.5, 3, 2), (1e-9, 5, 1),
        # the float product is 7.000000000000001, whose ceil (and transformers') is 8
        (0.07, 100, 7), (0.29, 100, 29), (0.57, 100, 57), (0.58, 100, 58),
    ],
)  # fmt: skip
def test_warmup_steps_are_the_exact_ceil(fraction: float, steps: int, warmup: int) -> None:
    assert build_schedule(OptimizerConfig(lr_warmup_fraction=fraction), steps).warmup_steps == warmup


def test_the_default_warmup_agrees_with_float_arithmetic() -> None:
    """At the original's 3 % the exact ceil and transformers' float one never differ."""
    for steps in range(1, 20_001):
        assert build_schedule(OptimizerConfig(), steps).warmup_steps == math.ceil(0.03 * steps)
        assert math.ceil(Fraction(3, 100) * steps) == math.ceil(0.03 * steps)


def test_min_lr_and_decay_steps() -> None:
    config = OptimizerConfig(lr=1.0, min_lr=0.1, lr_warmup_iters=2, lr_decay_iters=10)
    schedule = build_schedule(config, 20)
    assert schedule == Schedule(lr=1.0, min_lr=0.1, warmup_steps=2, decay_steps=10, style="cosine")
    lrs = [lr_at(step, schedule) for step in range(20)]
    assert lrs[:3] == [0.0, 0.5, 1.0]
    assert lrs[6] == pytest.approx(0.55)  # half-way down
    assert lrs[10:] == [0.1] * 10  # stays there: the cosine must not rise again
    assert all(before >= after for before, after in zip(lrs[2:], lrs[3:], strict=False))


def test_fraction_is_of_the_decay_steps() -> None:
    assert build_schedule(OptimizerConfig(lr_warmup_fraction=0.1, lr_decay_iters=50), 1000).warmup_steps == 5


def test_constant_stays() -> None:
    schedule = build_schedule(OptimizerConfig(lr=1.0, lr_decay_style="constant", lr_warmup_iters=0), 5)
    assert [lr_at(step, schedule) for step in range(7)] == [1.0] * 7
