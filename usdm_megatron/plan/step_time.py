"""How long a step takes: kernels at the rates of the hardware, the pipeline's bubble, what does not hide.

    step = micro-batches x slowest stage + bubble + exposed communication + optimizer

Fields are seconds. Where a rate is unknown nothing is predicted (`missing_rates`).
"""

from __future__ import annotations

from dataclasses import dataclass

from usdm_megatron.config import DataConfig
from usdm_megatron.layout import ParallelLayout
from usdm_megatron.parallel_config import ParallelConfig
from usdm_megatron.pipeline_stages import stage_layers
from usdm_megatron.plan.communication import (
    DataParallel,
    Hop,
    TensorParallel,
    data_parallel,
    link_between,
    pipeline_hop,
    tensor_parallel,
)
from usdm_megatron.plan.hardware import Hardware
from usdm_megatron.plan.model_shape import ModelShape
from usdm_megatron.plan.schedule import bubble
from usdm_megatron.plan.work import (
    RowShape,
    causal_pairs,
    loss_bytes,
    norm_bytes,
    residual_bytes,
    rope_bytes,
    swiglu_bytes,
)

# of a flash attention's seven products of the causal pairs
_FORWARD_PRODUCTS, _BACKWARD_PRODUCTS = 2, 5


@dataclass(frozen=True)
class Planned:
    """A run to predict: model, rows and batch, layout, hardware. `bf16` off: fp32 throughout."""

    model: ModelShape
    row: RowShape
    parallel: ParallelConfig
    layout: ParallelLayout
    data: DataConfig
    hardware: Hardware
    bf16: bool = True

    @property
    def element(self) -> int:
        """Bytes of a weight or an activation."""
        return 2 if self.bf16 else 4

    @property
    def tokens(self) -> int:
        """Tokens of a micro-batch, padding included."""
        return self.data.micro_batch_size * self.data.seq_length

    @property
    def micro_batches(self) -> int:
        return self.layout.micro_batches(self.data.global_batch_size, self.data.micro_batch_size)

    @property
    def activation_shards(self) -> int:
        """Ranks among which norms and residuals are divided."""
        return self.layout.tp if self.parallel.sequence_parallel else 1


@dataclass(frozen=True)
class Pass:
    """Seconds of a forward or a backward pass; `tensor_parallel` is what computation does not hide."""

    gemm: float = 0.0
    attention: float = 0.0
    elementwise: float = 0.0
    tensor_parallel: float = 0.0

    @property
    def total(self) -> float:
        return self.gemm + self.attention + self.elementwise + self.tensor_parallel

    def __add__(self, other: Pass) -> Pass:
        return Pass(
            self.gemm + other.gemm,
            self.attention + other.attention,
            self.elementwise + other.elementwise,
            self.tensor_parallel + other.tensor_parallel,
        )

    def __mul__(self, times: float) -> Pass:
        return Pass(
            self.gemm * times, self.attention * times, self.elementwise * times, self.tensor_parallel * times
        )


@dataclass(frozen=True)
class StageTime:
    """One micro-batch on one pipeline stage."""

    forward: Pass
    backward: Pass
    recompute: Pass

    @property
    def total(self) -> float:
        return self.forward.total + self.backward.total + self.recompute.total

    def __add__(self, other: StageTime) -> StageTime:
        return StageTime(
            self.forward + other.forward, self.backward + other.backward, self.recompute + other.recompute
        )


@dataclass(frozen=True)
class StepTime:
    """A step, and what it consists of."""

    slowest: StageTime
    mean_stage: float  # one micro-batch, over all stages
    micro_batches: int
    steady: float  # all micro-batches on the slowest stage
    bubble: float
    pipeline: float  # exposed
    reduce: float  # exposed part of the gradients' reduce-scatter
    gather: float  # exposed part of the weights' all-gather
    accumulate: float  # adding a micro-batch's gradients to the buffer
    optimizer: float
    tensor_busy: float  # of the layers of a stage, exposed or not
    hop: Hop
    data: DataParallel

    @property
    def tensor_exposed(self) -> float:
        """Tensor parallel communication that computation does not hide; within `steady`."""
        passes = (self.slowest.forward, self.slowest.backward, self.slowest.recompute)
        return self.micro_batches * sum(each.tensor_parallel for each in passes)

    @property
    def total(self) -> float:
        exposed = self.pipeline + self.reduce + self.gather
        return self.steady + self.bubble + exposed + self.accumulate + self.optimizer


def missing_rates(hardware: Hardware, layout: ParallelLayout) -> tuple[str, ...]:
    """Rates without which this layout's step time cannot be predicted."""
    needed = {"gemm_tflops", "attention_tflops", "memory_gb_per_s"}
    needed.update(*(link_between(layout, hardware, axis).rate_fields for axis in ("tp", "dp", "pp")))
    return tuple(name for name, rate in hardware.rates.items() if name in needed and not rate.known)


def step_time(planned: Planned) -> StepTime | None:
    """The predicted step; None where a rate that it needs is unknown."""
    if missing_rates(planned.hardware, planned.layout):
        return None
    stages = _stage_times(planned)
    slowest = max(stages, key=lambda stage: stage.total)
    micro_batches, layout = planned.micro_batches, planned.layout
    mean = sum(stage.total for stage in stages) / len(stages)
    parameters = most_parameters(planned)
    hop = pipeline_hop(
        planned.model, planned.parallel, layout, planned.hardware, planned.tokens, planned.element
    )
    data = data_parallel(parameters, planned.parallel, layout, planned.hardware, planned.element)
    moved = 1e9 * planned.hardware.memory_gb_per_s.at(1.0)
    gradient = 4 if planned.parallel.accumulate_allreduce_grads_in_fp32 else planned.element
    return StepTime(
        slowest=slowest,
        mean_stage=mean,
        micro_batches=micro_batches,
        steady=micro_batches * slowest.total,
        bubble=bubble(layout.pp, layout.vpp, micro_batches) * micro_batches * mean,
        pipeline=_exposed_hops(planned, hop),
        reduce=_exposed(data.reduce_s, data, planned.parallel.overlap_grad_reduce, slowest.backward.total),
        gather=_exposed(data.gather_s, data, planned.parallel.overlap_param_gather, slowest.forward.total),
        accumulate=micro_batches * parameters * (planned.element + 2 * gradient) / moved,
        optimizer=parameters * _optimizer_bytes(planned, gradient) / moved,
        tensor_busy=micro_batches
        * most_layers(planned)
        * collectives_of_layer(planned.parallel)
        * _collective(planned).seconds,
        hop=hop,
        data=data,
    )


def most_parameters(planned: Planned) -> float:
    """Parameters of the rank that holds the most, the padding of the vocabulary included."""
    model, tp = planned.model, planned.layout.tp
    stages = stage_layers(model.architecture.layers, planned.parallel)
    embedding = model.vocabulary.padded_size * model.architecture.hidden
    held = [model.layer_parameters * sum(map(len, chunks)) for chunks in stages]
    held[0] += embedding
    if len(held) > 1 or not model.architecture.tied:
        held[-1] += embedding
    return max(held) / tp


def most_layers(planned: Planned) -> int:
    """Layers of the stage that holds the most."""
    stages = stage_layers(planned.model.architecture.layers, planned.parallel)
    return max(sum(map(len, chunks)) for chunks in stages)


def _stage_times(planned: Planned) -> list[StageTime]:
    """Every stage's time for one micro-batch, in the pipeline's order."""
    layer = _layer_time(planned)
    times = []
    for chunks in stage_layers(planned.model.architecture.layers, planned.parallel):
        count = sum(map(len, chunks))
        recomputed = _recomputed_layers(planned.parallel, [len(chunk) for chunk in chunks])
        times.append(StageTime(layer.forward * count, layer.backward * count, layer.recompute * recomputed))
    times[0] = times[0] + _embedding_time(planned)
    times[-1] = times[-1] + _output_time(planned)
    return times


def _recomputed_layers(parallel: ParallelConfig, chunks: list[int]) -> int:
    if parallel.recompute_granularity == "full" and parallel.recompute_method == "block":
        return sum(min(parallel.recompute_num_layers, layers) for layers in chunks)
    return sum(chunks)


def _layer_time(planned: Planned) -> StageTime:
    """One layer, one micro-batch."""
    model, tp, tokens, element = planned.model, planned.layout.tp, planned.tokens, planned.element
    a = model.architecture
    qkv, projection = _gemm(planned, a.hidden * a.qkv_rows), _gemm(planned, a.hidden * a.heads * a.head_dim)
    gate_up, down = _gemm(planned, 2 * a.hidden * a.ffn), _gemm(planned, a.hidden * a.ffn)
    sizes = (model, tokens, element, planned.hardware.device)
    norms = norm_bytes(*sizes).over(planned.activation_shards)
    residuals = residual_bytes(*sizes).over(planned.activation_shards)
    rope, gate = rope_bytes(*sizes).over(tp), swiglu_bytes(*sizes).over(tp)
    moved = [norms, residuals, rope, gate]
    product = _attention_product(planned)
    collective = _collective(planned).seconds

    gemm = qkv + projection + gate_up + down
    into_and_out = 2 * collective  # a block's all-gather and reduce-scatter, or its all-reduce
    forward = Pass(
        gemm,
        _FORWARD_PRODUCTS * product,
        sum(_seconds(planned, each.forward) for each in moved),
        2 * into_and_out,
    )
    backward = Pass(
        2 * gemm,
        _BACKWARD_PRODUCTS * product,
        sum(_seconds(planned, each.backward) for each in moved),
        sum(_exposed_backward(planned, collective, columns) for columns in (qkv, gate_up))
        + (2 * collective if planned.parallel.sequence_parallel else 0.0),  # the gradients of the outputs
    )
    modules = {
        "core_attn": Pass(attention=forward.attention),
        "layernorm": Pass(elementwise=_seconds(planned, norms.forward)),
        "mlp": Pass(gate_up + down, 0.0, _seconds(planned, gate.forward), into_and_out),
    }
    return StageTime(forward, backward, _recompute(planned.parallel, forward, modules))


def _recompute(parallel: ParallelConfig, whole_layer: Pass, modules: dict[str, Pass]) -> Pass:
    if parallel.recompute_granularity == "none":
        return Pass()
    if parallel.recompute_granularity == "full":
        return whole_layer
    return sum((modules[name] for name in set(parallel.recompute_modules)), Pass())


def _exposed_backward(planned: Planned, collective: float, columns: float) -> float:
    """What hides only in part: collectives beside the backward GEMMs of a column-parallel layer.

    `columns` is its forward time. With sequence parallelism its input is gathered again beside the
    gradient's GEMM, and the input's gradient scattered beside the weight's; without, all-reduced there.
    """
    if planned.parallel.sequence_parallel:
        return 2 * max(0.0, collective - columns)
    return max(0.0, 2 * collective - columns)


def _embedding_time(planned: Planned) -> StageTime:
    """Partial sums of the embedding's shards, and back; looking up is nothing beside it."""
    times = 1 if planned.parallel.sequence_parallel else 2
    return StageTime(
        Pass(tensor_parallel=times * _collective(planned).seconds),
        Pass(tensor_parallel=(times % 2) * _collective(planned).seconds),
        Pass(),
    )


def _output_time(planned: Planned) -> StageTime:
    """Output layer and loss, on the last stage."""
    model, tp = planned.model, planned.layout.tp
    gemm = _gemm(planned, model.architecture.hidden * model.vocabulary.padded_size)
    loss = _seconds(planned, loss_bytes(model, planned.tokens, planned.element) / tp)
    collective = _collective(planned).seconds
    return StageTime(
        Pass(gemm, 0.0, loss / 2, collective if planned.parallel.sequence_parallel else 0.0),
        Pass(2 * gemm, 0.0, loss / 2, _exposed_backward(planned, collective, gemm)),
        Pass(),
    )


def _gemm(planned: Planned, weights: int) -> float:
    """Seconds of one micro-batch times `weights` weights, divided among tensor parallel ranks."""
    tp = planned.layout.tp
    return 2.0 * planned.tokens * weights / tp / (1e12 * planned.hardware.gemm_tflops.at(tp))


def _attention_product(planned: Planned) -> float:
    """Seconds of one of attention's products over a micro-batch's causal pairs, one layer."""
    a, rate = planned.model.architecture, planned.hardware.attention_tflops
    head_flops = 2.0 * a.heads * a.head_dim / planned.layout.tp
    rows = planned.data.micro_batch_size
    return sum(
        rows * count * head_flops * causal_pairs(length, a.sliding_window) / (1e12 * rate.at(length))
        for length, count in planned.row.samples
    )


def _seconds(planned: Planned, size: float) -> float:
    """Seconds of elementwise kernels that read and write `size` bytes."""
    return size / (1e9 * planned.hardware.memory_gb_per_s.at(size))


def _collective(planned: Planned) -> TensorParallel:
    return tensor_parallel(planned.model, planned.layout, planned.hardware, planned.tokens, planned.element)


def collectives_of_layer(parallel: ParallelConfig) -> int:
    """All-gathers and reduce-scatters of a layer and micro-batch; an all-reduce counts as one of each.

    Four forward, and four backward; with sequence parallelism two inputs are gathered again.
    """
    recomputed = {"none": 0, "full": 4}.get(parallel.recompute_granularity)
    if recomputed is None:
        recomputed = 2 if "mlp" in parallel.recompute_modules else 0
    return 4 + (6 if parallel.sequence_parallel else 4) + recomputed


def _exposed_hops(planned: Planned, hop: Hop) -> float:
    """Sends that no computation covers: all of them without overlap, else those that fill the pipeline."""
    layout = planned.layout
    if layout.pp == 1:
        return 0.0
    filling = 2 * (layout.pp - 1) * hop.seconds
    if layout.vpp > 1 and planned.parallel.overlap_p2p_communication:
        return filling
    return filling + 2 * planned.micro_batches * layout.vpp * hop.seconds


def _exposed(seconds: float, data: DataParallel, overlapped: bool, beside: float) -> float:
    """What is left of a transfer beside the pass that hides it: at least the bucket that comes last."""
    return max(data.bucket_share * seconds, seconds - beside) if overlapped else seconds


def _optimizer_bytes(planned: Planned, gradient: int) -> float:
    """Bytes a parameter: the gradient buffer is zeroed; of the shard, norm, AdamW and the weight's copy.

    AdamW reads gradient, master and two moments, and writes the last three.
    """
    shard = gradient + gradient + 12 + 12 + (4 + planned.element if planned.bf16 else 0)
    return gradient + shard / planned.layout.dp
