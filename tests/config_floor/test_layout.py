"""`ParallelLayout` against megatron-core's own rank arithmetic, and what it refuses."""

from __future__ import annotations

import itertools
import typing
from typing import Any

import pytest

from tests.ranks import run_ranks
from usdm_megatron.errors import ConfigError
from usdm_megatron.layout import ParallelLayout, RankCoordinates, RankOrder

ORDERS: tuple[RankOrder, ...] = typing.get_args(RankOrder)
SHAPES = [shape for shape in itertools.product((1, 2, 3, 4), repeat=3) if max(shape) > 1]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("tp", "pp", "dp"), SHAPES)
def test_groups_are_those_of_core(tp: int, pp: int, dp: int, order: RankOrder) -> None:
    from megatron.core.parallel_state import RankGenerator

    layout = ParallelLayout(tp * pp * dp, tp, pp, order=order)
    assert layout.dp == dp
    core = RankGenerator(tp=tp, ep=1, dp=dp, pp=pp, cp=1, order=order)
    places = [layout.coordinates(rank) for rank in range(layout.world_size)]
    assert [layout.rank_of(place) for place in places] == list(range(layout.world_size))
    for axis in ("tp", "pp", "dp"):
        others = [name for name in ("tp", "pp", "dp") if name != axis]
        for group in core.get_ranks(axis):
            assert all(layout.group(rank, axis) == tuple(group) for rank in group)
            assert [getattr(places[rank], axis) for rank in group] == list(range(len(group)))
            assert len({tuple(getattr(places[rank], name) for name in others) for rank in group}) == 1


def place_job(environment: Any, store: Any, tp: int, pp: int, order: RankOrder) -> tuple[Any, Any, Any]:
    """Where this rank is, says the layout; says core; and the global ranks of its tp, pp and dp groups."""
    from datetime import timedelta

    import torch.distributed as dist
    from megatron.core import parallel_state as core

    from usdm_megatron.runtime.process_groups import open_process_groups

    layout = ParallelLayout(environment.world_size, tp, pp, order=order)
    with open_process_groups(layout, environment, timeout=timedelta(seconds=60), store=store) as groups:
        place = groups.coordinates
        assert groups.rank == environment.rank == dist.get_rank()
        assert groups.is_first_stage == core.is_pipeline_first_stage()
        assert groups.is_last_stage == core.is_pipeline_last_stage()
        return (
            (place.tp, place.pp, place.dp),
            (
                core.get_tensor_model_parallel_rank(),
                core.get_pipeline_model_parallel_rank(),
                core.get_data_parallel_rank(),
            ),
            tuple(dist.get_process_group_ranks(group) for group in (groups.tp, groups.pp, groups.dp)),
        )


OPENED = [(2, 2, 1, ORDERS[0]), (1, 2, 2, ORDERS[0]), (1, 2, 2, ORDERS[1]), (2, 1, 2, ORDERS[0])]


@pytest.mark.parametrize(("tp", "pp", "dp", "order"), OPENED)
def test_opened_groups_are_the_layouts(tp: int, pp: int, dp: int, order: RankOrder) -> None:
    layout = ParallelLayout(tp * pp * dp, tp, pp, order=order)
    for rank, (ours, cores, opened) in enumerate(run_ranks(layout.world_size, place_job, tp, pp, order)):
        here = layout.coordinates(rank)
        assert ours == cores == (here.tp, here.pp, here.dp)
        assert opened == tuple(list(layout.group(rank, axis)) for axis in ("tp", "pp", "dp"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((12, 4, 2), "parallel: tp=4 x pp=2 = 8 does not divide world size 12; launch 8, 16, 24, … ranks"),
        ((4, 4, 2), "does not divide world size 4; launch 8, 16, 24"),
        ((0, 1, 1), "parallel: world size is 0; it must be at least 1"),
        ((4, 0, 1), "parallel: tp is 0"),
        ((4, 1, 1, 0), "parallel: vpp is 0"),
    ],
)
def test_refused(arguments: tuple[int, ...], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        ParallelLayout(*arguments)
    assert message in str(error.value)


def test_all_sizes_are_reported_at_once() -> None:
    with pytest.raises(ConfigError) as error:
        ParallelLayout(0, -1, 0)
    assert len(error.value.problems) == 3


def test_a_rank_outside_the_world_is_our_bug() -> None:
    for rank in (-1, 4):
        with pytest.raises(ValueError, match="outside world size 4"):
            ParallelLayout(4).coordinates(rank)
    with pytest.raises(ValueError, match="pp rank 2 is outside pp=2"):
        ParallelLayout(4, pp=2).rank_of(RankCoordinates(tp=0, dp=1, pp=2))


@pytest.mark.parametrize(("dp", "micro"), list(itertools.product((1, 2, 3), (1, 2))))
def test_batch(dp: int, micro: int) -> None:
    layout = ParallelLayout(2 * dp, tp=2)
    for rows in range(1, 25):
        problems = layout.problems_with_batch(rows, micro)
        assert bool(problems) == (rows % (dp * micro) != 0)
        if not problems:
            assert layout.micro_batches(rows, micro) * dp * micro == rows
        else:
            multiple = dp * micro
            assert f"global batch size {rows} is not divisible by micro batch size {micro}" in problems[0]
            assert problems[0].endswith(f"set --global-batch-size to a multiple of {multiple}")


def test_batch_of_an_interleaved_pipeline() -> None:
    layout = ParallelLayout(8, pp=4, vpp=2)
    assert layout.problems_with_batch(8, 1) == []  # 4 micro-batches
    assert (
        "multiple of pp=4; set --global-batch-size to a multiple of 8" in layout.problems_with_batch(6, 1)[0]
    )
    assert ParallelLayout(8, pp=4).problems_with_batch(6, 1) == []
