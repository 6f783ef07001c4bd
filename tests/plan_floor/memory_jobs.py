"""What ranks measure for the planner's tests (module level, so that forked ranks can import it)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from tests.plan_floor.memory_cases import VOCABULARY, Case
from tests.training.jobs import Layout, batch_of, opened, run_config


@dataclasses.dataclass(frozen=True)
class Measured:
    """Bytes on one rank: exact sums of what stays, and the peak of a step by three meters."""

    stage: int
    parameters: tuple[int, ...]  # elements of each, by chunk and module
    weights: int
    gradients: int
    optimizer: int
    saved: int  # by autograd, weights not counted
    live: int  # storages, all
    resident: int  # pages, from the kernel, and the storages that were there before the step


def measure(environment: Any, store: Any, cases: Sequence[Case]) -> list[Measured]:
    """Each case in turn, over the same ranks."""
    import torch.distributed as dist

    from tests.plan_floor.live_memory import map_blocks
    from usdm_megatron.log import quiet_upstream

    quiet_upstream()
    map_blocks()
    return [
        _measure(environment, dist.PrefixStore(f"case_{index}", store), case)
        for index, case in enumerate(cases)
    ]


def _measure(environment: Any, store: Any, case: Case) -> Measured:
    from tests.plan_floor.live_memory import LiveBytes, SavedBytes, kernel_peak
    from usdm_megatron.runtime.process_groups import seed_rank
    from usdm_megatron.train.engine import build_engine

    length = case.seq_length
    config = run_config(
        case.layout,
        data={"seq_length": length, "micro_batch_size": case.micro_batch_size},
        training={"bf16": case.bf16},
    )
    with opened(environment, store, case.layout) as groups:
        seed_rank(0, groups.coordinates)
        engine = build_engine(config, case.model, VOCABULARY, groups, "torch")
        parameters = [parameter for model in engine.models for parameter in model.parameters()]
        for parameter in parameters:
            parameter.data.normal_(0, 0.02)
        engine.optimizer.reload_masters()
        ids = np.random.default_rng(0).integers(3, 300, size=length).tolist()
        rows = [[ids[: length // 3], ids[length // 3 :]]] * case.micro_batch_size
        batches = [batch_of(rows, config, VOCABULARY) for _ in range(case.micro_batches)]

        def step() -> None:
            targets = length * case.micro_batch_size * case.micro_batches
            engine.step.train(batches, engine.optimizer, targets=targets, lr=1e-4, stop=lambda: False)

        step()  # what is made once and stays
        with SavedBytes(parameters).watch() as saved:
            step()
        with LiveBytes() as live:
            step()
        with kernel_peak() as risen:
            step()
        return Measured(
            stage=groups.coordinates.pp,
            parameters=tuple(parameter.numel() for parameter in parameters),
            **_static(engine, parameters),
            saved=saved.peak,
            live=live.peak,
            resident=live.at_start + risen["bytes"],
        )


def _static(engine: Any, parameters: Sequence[Any]) -> dict[str, int]:
    """Weights, gradients and optimizer state, each storage counted once."""
    from tests.plan_floor.live_memory import storages

    weights = storages(parameters)
    gradients = storages(buffer.grad_data for ddp in engine.wrapped for buffer in ddp.buffers)
    adam = engine.optimizer._sharded.optimizer
    states = [*adam.state, *(tensor for entry in adam.state.values() for tensor in entry.values())]
    state = {key: size for key, size in storages(states).items() if key not in weights}
    return {
        "weights": sum(weights.values()),
        "gradients": sum(gradients.values()),
        "optimizer": sum(state.values()),
    }


def simulate(environment: Any, store: Any, model: Any, layout: Layout, micro_batches: int) -> dict[int, Any]:
    """`Memory` of the first rank of the first and the last stage, in bf16 at 8,192 tokens, by stage."""
    from usdm_megatron.layout import ParallelLayout
    from usdm_megatron.plan.simulated_rank import simulate_rank
    from usdm_megatron.plan.simulation import RunShape

    config = run_config(
        layout,
        data={"seq_length": 8192, "global_batch_size": micro_batches * layout.dp},
        training={"bf16": True},
    )
    shape = ParallelLayout(layout.ranks, layout.tp, layout.pp, layout.vpp)
    run = RunShape(config, model.architecture, model.vocabulary, shape)
    ranks = {shape.coordinates(rank).pp: rank for rank in reversed(range(shape.world_size))}
    return {stage: simulate_rank(run, ranks[stage]).memory for stage in {0, layout.pp - 1}}
