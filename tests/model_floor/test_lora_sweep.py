"""Dropout follows the seed; every subset of targets and recompute mode equals PEFT (`make test-full`)."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from tests.model_floor import lora_jobs
from tests.model_floor.lora_jobs import RECOMPUTES, ROWS, Case, spec
from tests.model_floor.test_lora_layouts import DROPOUT, dropped
from tests.model_floor.test_lora_parity import compare
from tests.ranks import run_ranks
from tests.tiny import VOCABULARY
from tests.training.jobs import Layout
from usdm_megatron.lora_spec import TARGETS

SUBSETS = [set_ for size in range(1, len(TARGETS) + 1) for set_ in itertools.combinations(TARGETS, size)]
LAYOUTS = [
    Layout(), Layout(2), Layout(2, sp=True), Layout(1, 2), Layout(1, 1, 2), Layout(2, 2),
    Layout(2, 2, sp=True),
]  # fmt: skip


def masks_by_seed(
    environment: Any, store: Any, layout: Layout, checkpoint: Any, seeds: list[int]
) -> list[list[torch.Tensor]]:
    found = []
    for seed in seeds:
        lora_jobs.SEED = seed
        ((_, masks),) = dropped(environment, store, layout, checkpoint, [Case(DROPOUT)], ROWS)
        found.append(masks)
    return found


def test_dropout_follows_the_seed(models: Any) -> None:
    for first, again, other in run_ranks(2, masks_by_seed, Layout(1, 1, 2), models.release, [7, 7, 8]):
        assert first and len(first) == len(again) == len(other)
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(first, again, strict=True))
        assert not any(torch.equal(ours, theirs) for ours, theirs in zip(first, other, strict=True))


@pytest.mark.exhaustive
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_each_recompute_mode(layout: Layout, models: Any) -> None:
    check(layout, [Case(spec(*TARGETS), recompute) for recompute in RECOMPUTES], models)


@pytest.mark.exhaustive
@pytest.mark.parametrize("layout", [Layout(), Layout(2), Layout(2, sp=True)], ids=str)
@pytest.mark.parametrize("part", range(4))
def test_each_subset_of_targets(layout: Layout, part: int, models: Any) -> None:
    """Recompute modes in turn."""
    cases = [
        Case(spec(*subset), recompute)
        for subset, recompute in zip(SUBSETS, itertools.cycle(RECOMPUTES), strict=False)
    ]
    assert len(cases) == 2 ** len(TARGETS) - 1
    check(layout, cases[part::4], models)


def check(layout: Layout, cases: list[Case], models: Any) -> None:
    by_rank = run_ranks(layout.ranks, lora_jobs.train, layout, models.release, cases, ROWS, timeout_s=250)
    for index, case in enumerate(cases):
        model = lora_jobs.peft_model(models.hf, case.lora, VOCABULARY)
        compare(model, layout, [outcomes[index] for outcomes in by_rank])
