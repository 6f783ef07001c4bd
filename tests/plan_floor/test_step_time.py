"""Times: the check values, the schedule played out call by call, groups counted rank by rank."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.plan_floor.requests import MISTRAL, SEQ_LENGTH, even_hardware, planned, rate, request
from usdm_megatron.config import DataConfig
from usdm_megatron.layout import Axis, ParallelLayout
from usdm_megatron.plan.communication import link_between, tensor_parallel
from usdm_megatron.plan.hardware import Rate, find_hardware
from usdm_megatron.plan.model_shape import ModelShape
from usdm_megatron.plan.schedule import Call, order_of_calls
from usdm_megatron.plan.search import recompute_share
from usdm_megatron.plan.traffic import traffic
from usdm_megatron.plan.work import ModelFlops, RowShape, causal_pairs
from usdm_megatron.vocab import Vocabulary


@pytest.mark.parametrize(("tp", "cost"), [(2, 0.046), (4, 0.14), (8, 0.32)])
def test_tensor_parallel_traffic_beside_the_kernels(tp: int, cost: float) -> None:
    """230 GB/s against kernels at 62 %: before anything hides."""
    found = planned(request(even_hardware()), tp=tp)
    assert found.step is not None
    flops = ModelFlops.of(MISTRAL)
    per_token = flops.per_token + flops.per_pair * causal_pairs(SEQ_LENGTH, 4096) / SEQ_LENGTH
    kernels = per_token * SEQ_LENGTH * found.planned.micro_batches / tp / (0.62 * 312e12)
    assert found.step.tensor_busy / kernels == pytest.approx(cost, rel=0.02)


def test_data_parallel_traffic() -> None:
    _, _, gradients, weights = traffic(planned(request(even_hardware()), tp=2).planned, None)
    whole = 256 / 255 / 1e9  # a ring keeps one part of its own
    assert (gradients.bytes * whole, weights.bytes * whole) == pytest.approx((14.7, 7.3), abs=0.06)
    half = traffic(planned(request(even_hardware()), tp=2, pp=2).planned, None)
    assert [entry.bytes for entry in half[2:]] == pytest.approx(
        [gradients.bytes / 2, weights.bytes / 2], rel=0.01
    )
    narrow = traffic(planned(request(even_hardware(), fp32_gradients=False), tp=2).planned, None)
    assert narrow[2].bytes == pytest.approx(gradients.bytes / 2)


@pytest.mark.parametrize(("sizes", "bubble"), [((2, 2, 8), 0.016), ((1, 4, 8), 0.047), ((2, 1, 1), 0.0)])
def test_bubble(sizes: tuple[int, int, int], bubble: float) -> None:
    recompute = "mlp+layernorm" if sizes[0] == 1 else "none"
    assert planned(request(even_hardware()), *sizes, recompute).bubble == pytest.approx(bubble, abs=5e-4)


def test_recomputing_the_mlp_adds_26_percent() -> None:
    assert recompute_share(MISTRAL, "mlp+layernorm") == pytest.approx(0.26, abs=0.005)
    plain, again = (
        planned(request(even_hardware(), data=DataConfig(global_batch_size=512)), recompute=name).step
        for name in ("none", "mlp")
    )
    assert plain is not None and again is not None
    gemm = plain.slowest.forward.gemm + plain.slowest.backward.gemm
    # of the padded vocabulary's columns, too, which the share leaves out
    assert again.slowest.recompute.gemm / gemm == pytest.approx(recompute_share(MISTRAL, "mlp"), rel=1e-3)


def makespan(pp: int, vpp: int, micro_batches: int, forward: float, backward: float) -> float:
    """The step that comes out when every call waits for its rank and for its neighbour's message."""
    ends: dict[tuple[int, Call], float] = {}
    orders = [list(order_of_calls(pp, vpp, stage, micro_batches)) for stage in range(pp)]
    clocks = [0.0] * pp
    while any(orders):
        moved = False
        for stage, order in enumerate(orders):
            while order and (ready := _ready(ends, order[0], stage, pp, vpp)) is not None:
                call = order.pop(0)
                clocks[stage] = max(clocks[stage], ready) + (forward if call.kind == "forward" else backward)
                ends[stage, call] = clocks[stage]
                moved = True
        assert moved, "the schedule is stuck"
    return max(clocks)


def _ready(ends: dict[tuple[int, Call], float], call: Call, stage: int, pp: int, vpp: int) -> float | None:
    position = call.chunk * pp + stage + (-1 if call.kind == "forward" else 1)
    if position < 0:
        return 0.0
    if position == pp * vpp:  # the last chunk's backward pass follows its own forward pass
        return ends.get((stage, replace(call, kind="forward")))
    return ends.get((position % pp, replace(call, chunk=position // pp)))


@pytest.mark.parametrize(
    ("pp", "vpp", "m"), [(2, 1, 8), (4, 1, 8), (4, 1, 4), (2, 2, 8), (2, 8, 8), (4, 8, 8)]
)
def test_steady_and_bubble_equal_the_schedule_played_out(pp: int, vpp: int, m: int) -> None:
    """Stages of equal length: what core's order of calls takes when every call waits for its input."""
    asked = request(even_hardware(gpus_per_node=512), data=DataConfig(global_batch_size=m * 512 // pp))
    step = planned(asked, pp=pp, vpp=vpp).step
    assert step is not None
    forward, backward = (part.gemm + part.attention for part in (step.slowest.forward, step.slowest.backward))
    output = 3 * 2.0 * SEQ_LENGTH * 4096 * MISTRAL.vocabulary.padded_size / (0.62 * 312e12)
    mean = forward + backward - output * (pp - 1) / pp
    formula = step.steady - m * (forward + backward) + m * mean + step.bubble
    assert step.bubble == pytest.approx(mean * (pp - 1) / vpp)
    share = mean / (forward + backward) / vpp
    assert formula == pytest.approx(makespan(pp, vpp, m, share * forward, share * backward), rel=1e-9)


@pytest.mark.parametrize("order", ["tp-cp-ep-dp-pp", "tp-cp-ep-pp-dp"])
@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 2), (4, 4), (8, 2), (1, 16), (16, 1)])
@pytest.mark.parametrize("world", [16, 128])
def test_groups_lie_where_their_ranks_do(world: int, tp: int, pp: int, order: str) -> None:
    layout = ParallelLayout(world, tp, pp, order=order)  # type: ignore[arg-type]  # a parameter
    axes: tuple[Axis, ...] = ("tp", "dp", "pp")
    for axis in axes:
        link = link_between(layout, even_hardware(), axis)
        group = layout.group(0, axis)
        inside = sum(rank < 8 for rank in group)
        expected = "none" if len(group) == 1 else "node" if inside == len(group) else "network"
        assert (link.place, link.members_in_node) == (expected, inside)


def test_a_group_between_nodes_shares_their_interfaces() -> None:
    """tp=2: four replicas a node, so two groups of four; 4 x 25 GB/s each, never more than NVLink."""
    layout = ParallelLayout(512, tp=2)
    assert link_between(layout, even_hardware(), "dp").bytes_per_s(1e9) == 100e9
    fast = even_hardware(network_gb_per_s=rate(200.0))
    assert link_between(layout, fast, "dp").bytes_per_s(1e9) == 230e9
    hop = tensor_parallel(MISTRAL, layout, even_hardware(), SEQ_LENGTH, 2)
    assert hop.sent_bytes == 2 * SEQ_LENGTH * 4096 / 2


def test_an_unknown_rate_leaves_times_out() -> None:
    """Only where it is needed: a link that nobody uses may be unknown."""
    unknown = even_hardware(network_gb_per_s=Rate())
    assert planned(request(unknown, 8, data=DataConfig(global_batch_size=64)), tp=2, pp=4).step is not None
    found = planned(request(unknown), tp=2, pp=2)
    assert found.step is found.step_time_s is found.mfu is found.mfu_full_s is found.days is None
    assert [entry.hides for entry in traffic(found.planned, None)] == ["unknown"] * 4


def test_packed_samples_cost_less_attention() -> None:
    packed = RowShape(SEQ_LENGTH, 8000.0, ((1000, 8.0),), "packed")
    whole, short = (planned(request(even_hardware(), row=row), tp=2) for row in (request().row, packed))
    assert whole.step is not None and short.step is not None
    pairs = causal_pairs(SEQ_LENGTH, 4096) / (8 * causal_pairs(1000, 4096))
    assert whole.step.slowest.forward.attention == pytest.approx(short.step.slowest.forward.attention * pairs)
    assert short.tokens_per_s_per_gpu == pytest.approx(1024 * 8000 / short.step.total / 512)


@pytest.mark.parametrize(("gpus", "mfu"), [(64, 0.628), (128, 0.594)])
def test_a_published_run_is_predicted_within_ten_percent(gpus: int, mfu: float) -> None:
    """Llama 13B, 128,000 ids, 512 rows of 8,192 tokens, TP2 x PP2 on A100-80GB (arXiv 2311.05610)."""
    architecture = replace(
        MISTRAL.architecture, hidden=5120, layers=40, heads=40, kv_heads=40, ffn=13824, sliding_window=None
    )
    vocabulary = Vocabulary(text_size=128_000, unit_count=0)
    model = ModelShape("llama-13b", replace(architecture, vocab_size=vocabulary.size), vocabulary)
    asked = request(find_hardware("a100-80gb"), gpus, model=model, data=DataConfig(global_batch_size=512))
    found = planned(asked, tp=2, pp=2)
    per_token = 6 * model.parameters + 12 * 40 * 5120 * SEQ_LENGTH  # their formula counts embeddings
    assert found.tokens_per_s_per_gpu is not None
    assert found.tokens_per_s_per_gpu * per_token / 312e12 == pytest.approx(mfu, rel=0.1)
