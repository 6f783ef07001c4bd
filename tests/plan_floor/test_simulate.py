"""Simulated ranks equal real ones; a world that is no run is caught, each way it can go wrong."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests import tiny
from tests.plan_floor import simulate_jobs as jobs
from tests.ranks import run_ranks
from tests.training.jobs import Layout
from usdm_megatron.layout import RankCoordinates
from usdm_megatron.plan.simulate import Simulation
from usdm_megatron.plan.simulation import GIB, OwnedPart, RunShape, SimulatedRank

OVERLAP = (("overlap_grad_reduce", True), ("overlap_param_gather", True))
NEAR_STAGES = (("use_tp_pp_dp_mapping", True),)
UNEVEN = (("decoder_first_pipeline_num_layers", 2),)
REAL = {
    "tp2 dp2 sp": (Layout(tp=2, dp=2, sp=True), {"training": {"bf16": True}}),
    "pp2 vpp3 dp2": (Layout(pp=2, vpp=3, dp=2, extra=OVERLAP), {"training": {"bf16": True}}),
    "pp2 dp2 near, uneven": (Layout(pp=2, dp=2, extra=NEAR_STAGES + UNEVEN), {}),
    "lora": (Layout(tp=2, pp=2), {"lora": {"r": 4, "alpha": 8.0, "dropout": 0.0, "train_new_embeddings": True}}),
}
SIXTEEN = {
    "sp, vpp3, overlap": Layout(tp=2, pp=2, dp=4, vpp=3, sp=True, extra=OVERLAP),
    "near stages": Layout(tp=2, pp=4, dp=2, extra=(*NEAR_STAGES, ("decoder_first_pipeline_num_layers", 1),
                                                   ("decoder_last_pipeline_num_layers", 1))),
}  # fmt: skip


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows for two steps of 64 rows, the second not full."""
    return tiny.write_store(tmp_path_factory.mktemp("rows") / "P", tiny.random_rows(100, 64))


@pytest.fixture(scope="module")
def worlds(store: Path) -> dict[str, Simulation]:
    """Every run of this file, simulated in one process of its own."""
    runs = {name: jobs.shape_of(layout, store, options) for name, (layout, options) in REAL.items()}
    runs |= {name: jobs.shape_of(layout, store) for name, layout in SIXTEEN.items()}
    runs["tied"] = jobs.shape_of(Layout(tp=2, pp=2, dp=2), store, tied=True)
    (simulations,) = run_ranks(1, jobs.simulated, list(runs.values()), timeout_s=250)
    return dict(zip(runs, simulations, strict=True))


@pytest.mark.parametrize("name", REAL)
def test_a_simulated_rank_equals_the_real_one(name: str, store: Path, worlds: dict[str, Simulation]) -> None:
    layout, options = REAL[name]
    run = jobs.shape_of(layout, store, options)
    for rank, real in zip(worlds[name].ranks, run_ranks(4, jobs.measured, run, layout), strict=True):
        assert rank.parameters == real["parameters"]
        assert [buffer.elements for buffer in rank.buffers] == real["elements"]
        parts = {name: (part.start, part.stop) for name, part in rank.owned.items() if part.stop > part.start}
        assert parts == real["owned"]
        held = sorted((shard.key, shard.offset, shard.shape) for shard in rank.shards)
        assert held == real["boxes"]
        assert {axis: rank.groups[axis] for axis in real["groups"]} == real["groups"]
        assert rank.rows == real["rows"]
        memory = rank.memory
        assert (memory.weights, memory.gradients) == (real["weights"], real["gradients"])
        assert memory.step == pytest.approx(real["step"], abs=64)  # but for scalars


@pytest.mark.parametrize("name", [*REAL, *SIXTEEN, "tied"])
def test_the_ranks_of_a_world_make_up_one_run(name: str, worlds: dict[str, Simulation]) -> None:
    world = worlds[name]
    assert world.faults == ()
    layout = world.run.layout
    assert [rank.place for rank in world.ranks] == [layout.coordinates(rank) for rank in range(layout.world_size)]
    assert {(world.ranks[r].place.tp, world.ranks[r].place.pp) for r in world.traced} == {
        (tp, pp) for tp in range(layout.tp) for pp in range(layout.pp)
    }
    assert all(rank.memory.peak is not None for rank in world.ranks)


def test_rows_of_the_second_step(worlds: dict[str, Simulation]) -> None:
    """By hand: 16 rows a step, of which micro-batch k of replica r of four reads number 4 k + r."""
    for rank in worlds["sp, vpp3, overlap"].ranks:
        assert rank.rows == tuple((16 + 4 * k + rank.place.dp,) for k in range(4))
