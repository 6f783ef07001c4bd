"""Every layout of a world: the ones that work, best first, and the ones that do not, with the reason.

Ranked by predicted step time. Where no rate of the hardware is known: by the FLOPs that recomputation adds
together with the bubble, then by what tensor parallelism sends, then by memory.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from usdm_megatron.config import DataConfig
from usdm_megatron.errors import ConfigError
from usdm_megatron.layout import ParallelLayout
from usdm_megatron.parallel_config import ParallelConfig
from usdm_megatron.pipeline_stages import stage_layers
from usdm_megatron.plan.activations import Kernels
from usdm_megatron.plan.hardware import Hardware
from usdm_megatron.plan.memory import StageMemory, memory_by_stage
from usdm_megatron.plan.model_shape import ModelShape
from usdm_megatron.plan.schedule import bubble
from usdm_megatron.plan.step_time import Planned, StepTime, step_time
from usdm_megatron.plan.work import ModelFlops, RowShape

GIB = 2.0**30
_SECONDS_A_DAY = 86_400


def _selective(*modules: str) -> dict[str, Any]:
    return {"recompute_granularity": "selective", "recompute_modules": modules}


RECOMPUTE: dict[str, dict[str, Any]] = {
    "none": {},
    "layernorm": _selective("layernorm"),
    "mlp": _selective("mlp"),
    "mlp+layernorm": _selective("mlp", "layernorm"),
    "full": {"recompute_granularity": "full"},
}


@dataclass(frozen=True)
class PlanRequest:
    """What is asked: this model and batch on so many of these GPUs, and what all layouts have in common."""

    model: ModelShape
    hardware: Hardware
    world_size: int
    data: DataConfig
    row: RowShape
    kernels: Kernels
    bf16: bool = True
    sequence_parallel: bool = True
    fp32_gradients: bool = True
    rows: int | None = None  # of the data set

    def parallel(self, tp: int, pp: int, vpp: int, recompute: str) -> ParallelConfig:
        """The configuration of one layout, in the trainer's own fields."""
        return ParallelConfig(
            tensor_model_parallel_size=tp,
            pipeline_model_parallel_size=pp,
            num_virtual_stages_per_pipeline_rank=vpp,
            use_tp_pp_dp_mapping=pp > 1 and tp * pp <= self.hardware.gpus_per_node,
            sequence_parallel=self.sequence_parallel and tp > 1,
            accumulate_allreduce_grads_in_fp32=self.fp32_gradients,
            overlap_grad_reduce=True,
            overlap_param_gather=True,
            **RECOMPUTE[recompute],
        )


@dataclass(frozen=True)
class PlannedLayout:
    """A layout that works, and what the plan says of it."""

    planned: Planned
    recompute: str
    memory: tuple[StageMemory, ...]  # by stage
    step: StepTime | None  # None: a rate of the hardware is unknown
    rows: int | None = None

    @property
    def layout(self) -> ParallelLayout:
        return self.planned.layout

    @property
    def fullest_stage(self) -> int:
        return max(range(len(self.memory)), key=lambda stage: self.memory[stage].total)

    @property
    def memory_gib(self) -> float:
        """Of the rank that holds the most."""
        return self.memory[self.fullest_stage].total / GIB

    @property
    def bubble(self) -> float:
        return bubble(self.layout.pp, self.layout.vpp, self.planned.micro_batches)

    @property
    def step_time_s(self) -> float | None:
        return None if self.step is None else self.step.total

    @property
    def tokens_per_s_per_gpu(self) -> float | None:
        """Tokens of the rows, padding not counted."""
        if self.step is None:
            return None
        tokens = self.planned.data.global_batch_size * self.planned.row.tokens
        return tokens / self.step.total / self.layout.world_size

    @property
    def mfu(self) -> float | None:
        """By the true formula: linear layers, and attention over the samples as packed."""
        window = self.planned.model.architecture.sliding_window
        return self._utilisation(self._flops.of_row(self.planned.row, window))

    @property
    def mfu_full_s(self) -> float | None:
        """By the formula that lets every token attend to the whole row."""
        return self._utilisation(self._flops.of_row_full_s(self.planned.row))

    @property
    def days(self) -> float | None:
        """For one pass over the data set, of which the last step may be partly empty."""
        if self.step is None or self.rows is None:
            return None
        steps = math.ceil(self.rows / self.planned.data.global_batch_size)
        return steps * self.step.total / _SECONDS_A_DAY

    @cached_property
    def rank_key(self) -> tuple[float, ...]:
        """Smaller is better."""
        known = self.step is not None
        work = (1 + recompute_share(self.planned.model, self.recompute)) * (1 + self.bubble)
        time = self.step.total if self.step else work
        again = float(list(RECOMPUTE).index(self.recompute))
        return (0.0 if known else 1.0, time, float(self.layout.tp), again, self.memory_gib)

    @property
    def _flops(self) -> ModelFlops:
        return ModelFlops.of(self.planned.model)

    def _utilisation(self, row_flops: float) -> float | None:
        peak = self.planned.hardware.peak_tflops
        if self.step is None or peak is None:
            return None
        done = row_flops * self.planned.data.global_batch_size
        return done / (self.step.total * self.layout.world_size * peak * 1e12)


@dataclass(frozen=True)
class RejectedLayout:
    """A layout that does not work; `memory_gib` where that is the reason."""

    parallel: ParallelConfig
    layout: ParallelLayout | None  # None: it does not divide the world
    recompute: str
    reason: str
    memory_gib: float | None = None


@dataclass(frozen=True)
class Plan:
    """The answer to a `PlanRequest`."""

    request: PlanRequest
    layouts: tuple[PlannedLayout, ...]  # best first
    rejected: tuple[RejectedLayout, ...]


def make_plan(request: PlanRequest) -> Plan:
    """Judge every layout; raises `ConfigError` when none works, naming what comes nearest."""
    found: list[PlannedLayout] = []
    rejected: list[RejectedLayout] = []
    for tp, pp, vpp in _sizes(request):
        for recompute in RECOMPUTE:
            judged = judge(request, request.parallel(tp, pp, vpp, recompute), recompute)
            if isinstance(judged, PlannedLayout):
                found.append(judged)
            else:
                rejected.append(judged)
    found.sort(key=lambda layout: layout.rank_key)
    return Plan(request, tuple(found), tuple(rejected))


def judge(request: PlanRequest, parallel: ParallelConfig, recompute: str) -> PlannedLayout | RejectedLayout:
    """What becomes of one layout."""
    try:
        layout = ParallelLayout(
            request.world_size,
            parallel.tensor_model_parallel_size,
            parallel.pipeline_model_parallel_size,
            parallel.num_virtual_stages_per_pipeline_rank,
            parallel.rank_order,
        )
    except ConfigError as error:
        return RejectedLayout(parallel, None, recompute, "; ".join(error.problems))
    problems = layout_problems(request, parallel, layout)
    if problems:
        return RejectedLayout(parallel, layout, recompute, "; ".join(problems))
    planned = Planned(
        request.model, request.row, parallel, layout, request.data, request.hardware, request.bf16
    )
    memory = stage_memory(planned, request.kernels)
    most = max(stage.total for stage in memory) / GIB
    budget = request.hardware.memory_budget_gib
    if most > budget:
        reason = f"memory: {most:.1f} GiB on the fullest rank, {budget:.1f} GiB may be used"
        return RejectedLayout(parallel, layout, recompute, reason, most)
    return PlannedLayout(planned, recompute, memory, step_time(planned), request.rows)


def stage_memory(planned: Planned, kernels: Kernels) -> tuple[StageMemory, ...]:
    """Memory of a rank of every stage."""
    return memory_by_stage(
        planned.model,
        planned.parallel,
        planned.layout,
        seq_length=planned.data.seq_length,
        micro_batch_size=planned.data.micro_batch_size,
        micro_batches=planned.micro_batches,
        bf16=planned.bf16,
        kernels=kernels,
    )


def layout_problems(request: PlanRequest, parallel: ParallelConfig, layout: ParallelLayout) -> list[str]:
    """What the trainer would refuse, in its words where they are not tied to torch."""
    a, tp = request.model.architecture, layout.tp
    problems = parallel.problems()
    problems += [
        f"parallel: tp={tp} does not divide the model's {count} {what}"
        for what, count in (
            ("attention heads", a.heads),
            ("query groups (key-value heads)", a.kv_heads),
            ("feed-forward columns", a.ffn),
            ("padded vocabulary rows", request.model.vocabulary.padded_size),
        )
        if count % tp
    ]
    tokens = request.data.micro_batch_size * request.data.seq_length
    if parallel.sequence_parallel and tokens % tp:
        problems.append(f"parallel: tp={tp} does not divide the {tokens} tokens of a micro-batch")
    try:
        stage_layers(a.layers, parallel)
    except ConfigError as error:
        problems += error.problems
    return problems + layout.problems_with_batch(
        request.data.global_batch_size, request.data.micro_batch_size
    )


def recompute_share(model: ModelShape, recompute: str) -> float:
    """FLOPs of linear layers that are computed twice, beside those of a step without."""
    again = {"full": model.attention_weights + model.mlp_weights, "mlp": model.mlp_weights}
    weights = again.get("mlp" if "mlp" in recompute else recompute, 0)
    return 2.0 * model.architecture.layers * weights / ModelFlops.of(model).per_token


def _sizes(request: PlanRequest) -> Iterator[tuple[int, int, int]]:
    """tp, pp and vpp of every layout that divides the world, whether the model can do it or not."""
    a, world = request.model.architecture, request.world_size
    for tp in _divisors(world):
        for pp in _divisors(world // tp):
            if tp > a.heads or pp > a.layers:
                continue
            chunks = a.layers // pp if pp > 1 and a.layers % pp == 0 else 1
            for vpp in _divisors(chunks):
                yield tp, pp, vpp


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


def short_name(parallel: ParallelConfig, recompute: str) -> str:
    """`tp=2,pp=2,vpp=8,recompute=none`, as `--explain` reads it."""
    return (
        f"tp={parallel.tensor_model_parallel_size},pp={parallel.pipeline_model_parallel_size},"
        f"vpp={parallel.num_virtual_stages_per_pipeline_rank},recompute={recompute}"
    )
