"""What ranks do for the tests of the simulation (module level, so that forked ranks can import it)."""

from __future__ import annotations

import contextlib
import dataclasses
import io
from pathlib import Path
from typing import Any

from tests import tiny
from tests.training.jobs import Layout, opened, run_config
from usdm_megatron.architecture import HFArchitecture
from usdm_megatron.layout import ParallelLayout
from usdm_megatron.plan.simulation import RunShape

ARCHITECTURE = HFArchitecture.from_hf_config(tiny.MODEL)
STEP = 2


def shape_of(
    layout: Layout, store: Path | None = None, options: dict[str, Any] | None = None, **model: Any
) -> RunShape:
    """A run of the tiny model with `layout.ranks` ranks, of two steps or more of `store`."""
    chosen = {"recipe": "corrected", **(options or {})}
    data = {"global_batch_size": 4 * layout.dp, **chosen.pop("data", {})}
    if store is not None:
        data["train_data_path"] = (str(store),)
    config = run_config(layout, data=data, **chosen)
    order = config.parallel.rank_order
    return RunShape(
        config,
        dataclasses.replace(ARCHITECTURE, **model),
        tiny.VOCABULARY,
        ParallelLayout(layout.ranks, layout.tp, layout.pp, layout.vpp, order),
    )


def simulated(environment: Any, store: Any, runs: list[RunShape], **options: Any) -> list[Any]:
    """Each run's world, all ranks of it in this process."""
    from usdm_megatron.log import quiet_upstream
    from usdm_megatron.plan.simulate import simulate

    quiet_upstream()
    return [simulate(run, step=STEP, workers=1, **options) for run in runs]


def measured(environment: Any, store: Any, run: RunShape, layout: Layout) -> dict[str, Any]:
    """What a real rank holds, reads and needs; kernels keep what CUDA's would, so that peaks compare."""
    import torch
    import torch.distributed as dist

    from tests.plan_floor.live_memory import LiveBytes, storages
    from usdm_megatron.log import quiet_upstream
    from usdm_megatron.plan.fused_kernels import as_on_cuda
    from usdm_megatron.runtime.process_groups import seed_rank
    from usdm_megatron.train.engine import build_engine
    from usdm_megatron.train.preflight import build_order, open_stores
    from usdm_megatron.train.run import open_loader

    class DeviceBytes(LiveBytes):
        """Without the states of random generators, which core swaps and a GPU run has on the host."""

        def _add(self, storage: torch.UntypedStorage) -> None:
            if storage.nbytes() != torch.get_rng_state().numel():
                super()._add(storage)

    quiet_upstream()
    with opened(environment, store, layout) as groups:
        seed_rank(run.config.training.seed, groups.coordinates)
        engine = build_engine(run.config, run.architecture, run.vocabulary, groups, "torch")
        rows, _ = open_stores(run.config)
        order = build_order(run.config, groups.layout, rows.rows)
        with open_loader(run.config, rows, order, run.vocabulary, groups) as loader:
            batches = loader.step_batches(STEP - 1)
        engine.models[0].config.deallocate_pipeline_outputs = True
        with as_on_cuda(engine.models), DeviceBytes() as live:
            engine.step.train(batches, engine.optimizer, targets=1, lr=0.0, stop=lambda: False)
        named = [
            (f"chunk_{index}.{name}", parameter)
            for index, model in enumerate(engine.models)
            for name, parameter in model.named_parameters()
        ]
        buffers = [buffer for ddp in engine.wrapped for buffer in ddp.buffers]
        ranges = engine.optimizer._sharded._get_model_param_range_map
        owned = {
            name: (ranges(parameter)["param"].start, ranges(parameter)["param"].end)
            for name, parameter in named
            if parameter in engine.optimizer._sharded.model_param_gbuf_map
        }
        return {
            "parameters": {name: tuple(parameter.shape) for name, parameter in named},
            "elements": [buffer.grad_data.numel() for buffer in buffers],
            "owned": owned,
            "boxes": sorted(_boxes(engine.models)),
            "groups": {
                axis: tuple(dist.get_process_group_ranks(getattr(groups.collection, axis)))
                for axis in ("tp", "pp", "dp", "mp", "tp_dp_cp")
            },
            "rows": tuple(batch.row_ids for batch in batches),
            "weights": sum(storages(parameter for _, parameter in named).values()),
            "gradients": sum(storages(buffer.grad_data for buffer in buffers).values()),
            "optimizer": engine.optimizer.state_bytes(),
            "step": live.peak - live.at_start,
        }


def _boxes(models: list[Any]) -> Any:
    """(key, offset, shape) of what a real rank would save of the model, by core's own planner of saves."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories

    for model in models:
        state = model.sharded_state_dict()
        apply_factories(state)
        for value in nested_values(state):
            if isinstance(value, ShardedTensor):
                layer = (1,) * value.prepend_axis_num  # the tensor of a layer has no axis of layers
                yield value.key, tuple(value.global_offset), (*layer, *value.local_shape)


def wrongly_placed(environment: Any, store: Any, run: RunShape) -> Any:
    """The run when our arithmetic of ranks is not core's: pipeline and data parallel swapped."""
    order = "tp-cp-ep-dp-pp" if run.layout.order == "tp-cp-ep-pp-dp" else "tp-cp-ep-pp-dp"
    swapped = ParallelLayout(run.layout.world_size, run.layout.tp, run.layout.pp, run.layout.vpp, order)
    ParallelLayout.coordinates = lambda self, rank, real=ParallelLayout.coordinates: real(swapped, rank)
    return simulated(environment, store, [run])[0].faults


def read_twice(environment: Any, store: Any, run: RunShape) -> Any:
    """The run when every data parallel rank reads what the first does."""
    from usdm_megatron.data.order import RowOrder

    RowOrder.rows_of_step = lambda self, step, dp_rank, real=RowOrder.rows_of_step: real(self, step, 0)
    return simulated(environment, store, [run])[0].faults


def dry_runs(environment: Any, store: Any, command_lines: list[list[str]]) -> list[tuple[int, str, str]]:
    """Code, output and errors of each command line, in this process."""
    from usdm_megatron.cli import main

    results = []
    for arguments in command_lines:
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = main(arguments)
        results.append((code, out.getvalue(), err.getvalue()))
    return results


def longer_steps(environment: Any, store: Any, runs: list[RunShape]) -> list[tuple[int, int]]:
    """Peak of the last rank's step as it is traced, and with every micro-batch of the step."""
    from usdm_megatron.plan import simulated_rank
    from usdm_megatron.plan.simulated_rank import simulate_rank

    steps = []
    for run in runs:
        for rank in (0, run.layout.world_size - 1):
            few = simulate_rank(run, rank).memory.step
            simulated_rank._TRACED_ROUNDS, kept = 1000, simulated_rank._TRACED_ROUNDS
            steps.append((few, simulate_rank(run, rank).memory.step))
            simulated_rank._TRACED_ROUNDS = kept
    return steps


def kernel_bytes(environment: Any, store: Any) -> dict[str, tuple[int, int]]:
    """Bytes alive after the forward pass, of our stand-in and of torch's own kernel on the meta device."""
    import torch
    from torch.nn.attention.varlen import varlen_attn

    from usdm_megatron.plan.fused_kernels import fused_attention
    from usdm_megatron.plan.live_bytes import LiveBytes

    def held(attend: Any) -> int:
        with torch.device("meta"), LiveBytes() as live:
            q, k, v = (
                torch.empty(96, heads, 16, dtype=torch.bfloat16, requires_grad=True) for heads in (8, 2, 2)
            )
            bounds = torch.empty(4, dtype=torch.int32)
            output = attend(q, k, v, bounds)
            forward = live.now
            output.sum().backward()
            return forward, live.peak

    def torchs(q: Any, k: Any, v: Any, bounds: Any) -> Any:
        return varlen_attn(q, k, v, bounds, bounds, 32, 32, window_size=(-1, 0), enable_gqa=True)

    return {
        "ours": held(lambda q, k, v, bounds: fused_attention(q, k, v, None, None)),
        "torch's": held(torchs),
    }
