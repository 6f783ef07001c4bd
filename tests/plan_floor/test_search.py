"""Every layout is judged once and in the trainer's own terms; what fits nowhere names what would."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest

from tests.plan_floor.requests import MISTRAL, even_hardware, planned, request
from usdm_megatron.config import DataConfig
from usdm_megatron.errors import ConfigError
from usdm_megatron.layout import ParallelLayout
from usdm_megatron.plan.choice import choose, nearest, refuse_nothing_fits
from usdm_megatron.plan.emit_script import extra_flags
from usdm_megatron.plan.hardware import Rate, find_hardware
from usdm_megatron.plan.search import RECOMPUTE, Plan, RejectedLayout, layout_problems, make_plan


@pytest.fixture(scope="module")
def cluster() -> Plan:
    """512 x A100-40GB."""
    return make_plan(request())


def sizes(entry: Any) -> tuple[int, int, int, str]:
    parallel = entry.parallel if isinstance(entry, RejectedLayout) else entry.planned.parallel
    return (
        parallel.tensor_model_parallel_size,
        parallel.pipeline_model_parallel_size,
        parallel.num_virtual_stages_per_pipeline_rank,
        entry.recompute,
    )


def test_every_layout_once_best_first(cluster: Plan) -> None:
    entries = [sizes(entry) for entry in (*cluster.layouts, *cluster.rejected)]
    assert len(set(entries)) == len(entries)
    divisors = {2**power for power in range(10)}
    assert {entry[0] for entry in entries} == {tp for tp in divisors if tp <= 32}
    assert {entry[1] for entry in entries} == {pp for pp in divisors if pp <= 32}
    assert {entry[3] for entry in entries} == set(RECOMPUTE)
    times = [layout.step_time_s for layout in cluster.layouts]
    assert times == sorted(times)  # type: ignore[type-var]  # every rate is published
    assert all(layout.memory_gib <= 35.0 for layout in cluster.layouts)


def test_the_best_default_wins_or_comes_close(cluster: Plan) -> None:
    """TP2 x PP2 in groups of two and four neighbours: tensor and pipeline traffic stay on NVLink."""
    best, default = cluster.layouts[0], planned(cluster.request, 2, 2, 8)
    assert (best.layout.tp, best.layout.pp, best.layout.dp) == (2, 2, 128)
    assert best.step_time_s is not None and default.step_time_s is not None
    assert default.step_time_s < 1.01 * best.step_time_s
    assert default.planned.parallel.use_tp_pp_dp_mapping and default.planned.micro_batches == 8
    assert default.mfu_full_s is not None and default.mfu_full_s > 0.6
    reasons = {sizes(entry): entry.reason for entry in cluster.rejected}
    assert reasons[1, 1, 1, "none"].startswith("memory: ")
    assert "query groups" in reasons[16, 1, 1, "none"]


def test_judged_as_the_trainer_judges() -> None:
    """Of a model whose sizes divide by nothing much, on a world of 24."""
    from usdm_megatron.model.architecture import layout_problems as trainer_problems

    architecture = replace(MISTRAL.architecture, layers=6, heads=12, kv_heads=4, ffn=1200)
    model = replace(MISTRAL, architecture=architecture)
    asked = request(even_hardware(), 24, model=model, data=DataConfig(global_batch_size=48))
    plan = make_plan(asked)
    assert plan.layouts and plan.rejected
    works = {sizes(entry) for entry in plan.layouts}
    for tp, pp, vpp, recompute in (sizes(entry) for entry in (*plan.layouts, *plan.rejected)):
        if "layernorm" in recompute:  # which transformer-engine decides, where the run is
            continue
        parallel = asked.parallel(tp, pp, vpp, recompute)
        layout = ParallelLayout(24, tp, pp, vpp, parallel.rank_order)
        problems = trainer_problems(architecture, model.vocabulary.padded_size, parallel)
        problems += parallel.problems() + layout.problems_with_batch(48, 1)
        assert ((tp, pp, vpp, recompute) in works) == (not problems), problems
        assert bool(layout_problems(asked, parallel, layout)) == bool(problems)


def test_without_rates_the_rest_is_ranked() -> None:
    """By recomputation and bubble, then by tensor parallel size, then by memory."""
    bare = replace(find_hardware("a100-40gb"), gemm_tflops=Rate())
    plan = make_plan(request(bare))
    assert all(layout.step_time_s is layout.mfu is None for layout in plan.layouts)
    best = plan.layouts[0]
    assert (best.layout.tp, best.layout.pp, best.recompute) == (4, 1, "none")
    assert len(plan.layouts) == len(make_plan(request()).layouts)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("0", "there is no layout 0; "),
        ("9999", "there is no layout 9999"),
        ("tp=3,pp=2", "tp=3 x pp=2 = 6 does not divide world size 512.*nearest that does is tp="),
        ("pp=4,vpp=3", "12 pipeline chunks .* do not divide the model's 32 layers"),
        ("vpp=2", "virtual stages need a pipeline"),
        (
            "tp=1,pp=1",
            r"memory: \d+\.\d GiB on the fullest rank, 35.0 GiB may be used; the nearest that does is",
        ),
        ("tp=2,recompute=some", "recompute is 'some'; it must be none, layernorm, mlp, mlp.layernorm, full"),
        ("tpp=2", "'tpp' is not known; did you mean tp"),
        ("tp=0", "tp is '0'; it must be a count"),
        ("", "'' is not known"),
    ],
)
def test_a_layout_that_is_none_is_refused(cluster: Plan, text: str, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        choose(cluster, text)
    assert re.search(says, str(caught.value)), caught.value


def test_a_layout_is_chosen_by_rank_or_by_sizes(cluster: Plan) -> None:
    assert choose(cluster, "3") is cluster.layouts[2]
    found = choose(cluster, "tp=2, pp=2, vpp=8, recompute=mlp")
    assert sizes(found) == (2, 2, 8, "mlp")
    assert sizes(nearest(cluster, cluster.request.parallel(2, 2, 8, "full"), "full")) == (2, 2, 8, "full")
    # TP, PP, VPP and the order of ranks are the example script's own to set
    assert extra_flags(found) == ["--recompute-granularity selective", "--recompute-modules mlp"]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            {"world_size": 2},
            r"fits in no layout of 2 x a100-40gb: the least is .*the nearest that fits: --gpu",
        ),
        ({"world_size": 1}, "the nearest that fits: --"),
        ({"data": DataConfig(global_batch_size=7)}, "no layout of 512 ranks works.*\n.*global batch size 7"),
    ],
)
def test_nothing_fits(changes: dict[str, object], says: str) -> None:
    plan = make_plan(request(**changes))  # type: ignore[arg-type]  # parameters
    assert not plan.layouts
    with pytest.raises(ConfigError) as caught:
        refuse_nothing_fits(plan)
    assert re.search(says, str(caught.value)), caught.value
