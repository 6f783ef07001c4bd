"""Groups, seeds, random state and the CPU redirect, each in ranks of its own."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
import torch

from tests.ranks import run_ranks
from usdm_megatron.layout import ParallelLayout

TIMEOUT = timedelta(seconds=60)
AXES = ("tp", "pp", "dp")


def groups_job(environment: Any, store: Any, tp: int, pp: int) -> dict[str, Any]:
    """Sums of the ranks over each group, where this rank says it is, and what is left after closing."""
    import torch.distributed as dist
    from megatron.core import parallel_state

    from usdm_megatron.runtime.process_groups import open_process_groups

    layout = ParallelLayout(environment.world_size, tp, pp)
    sums = {}
    with open_process_groups(layout, environment, timeout=TIMEOUT, store=store) as groups:
        for axis in AXES:
            total = torch.tensor(float(1 << environment.rank))
            dist.all_reduce(total, group=getattr(groups, axis))
            sums[axis] = int(total)
        assert groups.device.type == ("cuda" if torch.cuda.is_available() else "cpu")
        assert groups.collection.dp is groups.dp
        place = groups.coordinates
    assert not dist.is_initialized()
    assert not parallel_state.model_parallel_is_initialized()
    return {"sums": sums, "place": place}


@pytest.mark.parametrize(("tp", "pp", "dp"), [(2, 1, 2), (2, 2, 1), (1, 2, 2), (1, 1, 1)])
def test_reductions_reach_exactly_the_ranks_of_the_axis(tp: int, pp: int, dp: int) -> None:
    results = run_ranks(tp * pp * dp, groups_job, tp, pp)
    for result in results:
        for axis in AXES:
            others = [name for name in AXES if name != axis]
            members = [
                rank
                for rank, other in enumerate(results)
                if all(getattr(other["place"], name) == getattr(result["place"], name) for name in others)
            ]
            assert result["sums"][axis] == sum(1 << rank for rank in members)


def failing_block_job(environment: Any, store: Any) -> None:
    """An exception inside the block closes the groups and comes out."""
    import torch.distributed as dist

    from usdm_megatron.runtime.process_groups import open_process_groups

    layout = ParallelLayout(1)
    with (
        pytest.raises(ZeroDivisionError),
        open_process_groups(layout, environment, timeout=TIMEOUT),  # a run of one meets nowhere
    ):
        raise ZeroDivisionError
    assert not dist.is_initialized()


def test_groups_are_closed_after_an_exception() -> None:
    run_ranks(1, failing_block_job)


def seeds_job(environment: Any, store: Any, tp: int, pp: int) -> dict[str, Any]:
    """What the default stream (dropout of what is replicated) and core's tracked one draw on this rank."""
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    from usdm_megatron.runtime.process_groups import open_process_groups, seed_rank

    layout = ParallelLayout(environment.world_size, tp, pp)
    with open_process_groups(layout, environment, timeout=TIMEOUT, store=store) as groups:

        def draw() -> dict[str, Any]:
            import random

            import numpy as np

            seed_rank(42, groups.coordinates)
            drawn = {"replicated": torch.rand(4).tolist()}
            with get_cuda_rng_tracker().fork():
                drawn["sharded"] = torch.rand(4).tolist()
            return {**drawn, "python": random.random(), "numpy": np.random.rand()}

        first = draw()
        assert draw() == first, "the same seed draws the same"
        return {**first, "place": groups.coordinates}


@pytest.mark.parametrize(("tp", "pp", "dp"), [(2, 1, 2), (1, 2, 2)])
def test_dropout_streams(tp: int, pp: int, dp: int) -> None:
    """As Megatron: replicated activations draw the same over tp, sharded ones do not; stages, dp differ."""
    results = run_ranks(tp * pp * dp, seeds_job, tp, pp)
    for i, one in enumerate(results):
        for other in results[:i]:
            same_but_tp = (one["place"].pp, one["place"].dp) == (other["place"].pp, other["place"].dp)
            assert (one["replicated"] == other["replicated"]) == same_but_tp
            assert (one["python"] == other["python"]) == same_but_tp
            assert one["sharded"] != other["sharded"]
    torch.manual_seed(42)  # rank 0 is seeded with the seed itself, as in Megatron
    assert results[0]["replicated"] == torch.rand(4).tolist()
    torch.manual_seed(
        42 + 2718
    )  # and its tracked stream with Megatron's offset (core/tensor_parallel/random.py)
    assert results[0]["sharded"] == torch.rand(4).tolist()


def random_state_job(environment: Any, store: Any) -> None:
    """Whatever was drawn after `get` is drawn again after `set`, from every stream."""
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    from usdm_megatron.runtime.process_groups import open_process_groups, seed_rank
    from usdm_megatron.runtime.random_state import get_random_state, set_random_state

    def draw() -> list[list[float]]:
        drawn = [torch.rand(3).tolist()]
        for name in sorted(get_cuda_rng_tracker().get_states()):
            with get_cuda_rng_tracker().fork(name):
                drawn.append(torch.rand(3).tolist())
        return [*drawn, torch.nn.functional.dropout(torch.ones(9)).tolist()]

    with open_process_groups(ParallelLayout(2, tp=2), environment, timeout=TIMEOUT, store=store) as groups:
        seed_rank(7, groups.coordinates)
        draw()
        state = get_random_state()
        assert state.dtype == torch.uint8 and state.dim() == 1 and state.device.type == "cpu"
        kept = state.clone()
        first = draw()
        assert draw() != first
        set_random_state(state)
        assert draw() == first
        set_random_state(state)  # nothing that was drawn wrote into it
        assert torch.equal(state, kept) and torch.equal(get_random_state(), kept)
        assert draw() == first
        with pytest.raises(ValueError, match=f"a random state of {len(state) - 1} bytes does not fit"):
            set_random_state(state[1:])


def test_random_state_round_trip() -> None:
    run_ranks(2, random_state_job)


def redirect_job(environment: Any, store: Any) -> None:
    from usdm_megatron.runtime import cpu

    cpu.enter_cpu_redirect()
    entered, current_device = cpu._entered, torch.cuda.current_device
    cpu.enter_cpu_redirect()
    assert cpu._entered is entered and torch.cuda.current_device is current_device, (
        "the second call does nothing"
    )
    host = torch.device("cpu")
    for device in ("cuda", "cuda:0", torch.device("cuda"), torch.cuda.current_device(), "cpu"):
        for made in (
            torch.zeros(2, device=device),
            torch.tensor([1.0], device=device),
            torch.arange(3, device=device),
            torch.empty((2, 2), dtype=torch.bfloat16, device=device),
            torch.zeros(1).to(device),
            torch.zeros(1).to(device=device),
            torch.zeros(1).to(device, torch.bfloat16),
            torch.nn.Linear(2, 2).to(device).weight,
        ):
            assert made.device == host
    x = torch.ones(2)
    assert x.cuda() is x and torch.nn.Linear(2, 2).cuda().weight.device == host
    assert x.to(torch.float64).dtype == torch.float64  # a dtype is no device
    assert x.type() == "torch.cuda.FloatTensor" and x.bfloat16().type() == "torch.cuda.BFloat16Tensor"
    assert x.type(torch.float64).dtype == torch.float64
    torch.cuda.synchronize()
    torch.cuda.manual_seed(3)
    state = torch.cuda.get_rng_state()
    drawn = torch.rand(3)
    torch.cuda.set_rng_state(state)
    assert torch.equal(torch.rand(3), drawn)
    torch.manual_seed(3)
    assert torch.equal(torch.rand(3), drawn)
    assert not torch.cuda.is_available(), "nothing pretends that there is CUDA"


@pytest.mark.skipif(torch.cuda.is_available(), reason="the redirect is for machines without CUDA")
def test_cpu_redirect() -> None:
    run_ranks(1, redirect_job)


def test_cpu_redirect_is_refused_where_cuda_is(monkeypatch: pytest.MonkeyPatch) -> None:
    from usdm_megatron.runtime import cpu

    monkeypatch.setattr(cpu, "_entered", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(RuntimeError, match="for machines without CUDA"):
        cpu.enter_cpu_redirect()
    assert cpu._entered is None
