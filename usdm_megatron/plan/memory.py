"""Bytes that a rank holds, stage by stage: what stays, and the most that a step adds under its schedule.

Not counted: CUDA and NCCL contexts, library workspaces, the allocator's fragmentation.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from usdm_megatron.architecture import HFArchitecture
from usdm_megatron.layout import ParallelLayout
from usdm_megatron.parallel_config import ParallelConfig
from usdm_megatron.pipeline_stages import stage_layers
from usdm_megatron.plan.activations import ChunkShape, Kernels, Sizes, chunk_footprint, head_footprint
from usdm_megatron.plan.model_shape import ModelShape
from usdm_megatron.plan.schedule import order_of_calls
from usdm_megatron.vocab import Vocabulary

_PARAMETER_ALIGNMENT = 64  # elements (megatron-core 0.16.1 `param_and_grad_buffer.py:661`)
_BUCKET_ALIGNMENT = 128
_TELLING_ROUNDS = 3  # of as many micro-batches as stages: more of them hold no more
_LEAST_BUCKET = 40_000_000  # elements (`distributed_data_parallel.py:65`)


@dataclass(frozen=True)
class StageMemory:
    """Bytes on the rank of a stage that holds most, at the step's fullest instant.

    activations: kept for backward passes, of all micro-batches in flight. logits: what final norm, output
    layer and loss keep, and the loss needs while it is computed. buffers: batches, RoPE tables, messages, and
    what the pass that runs needs.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    buffers: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations + self.logits + self.buffers

    @property
    def gib(self) -> float:
        return self.total / 2**30


def memory_by_stage(
    model: ModelShape,
    parallel: ParallelConfig,
    layout: ParallelLayout,
    *,
    seq_length: int,
    micro_batch_size: int,
    micro_batches: int,
    bf16: bool,
    kernels: Kernels,
) -> tuple[StageMemory, ...]:
    """The memory of each pipeline stage; all weights train.

    Raises `ConfigError` where the pipeline's chunks cannot share the model's layers.
    """
    tokens = seq_length * micro_batch_size
    element = 2 if bf16 else 4
    columns = model.vocabulary.padded_size // layout.tp
    architecture = model.architecture
    stages = stage_layers(architecture.layers, parallel)
    memories = []
    for stage, chunks in enumerate(stages):
        shapes = tuple(
            ChunkShape(
                layers=len(layers),
                is_first=stage == 0 and index == 0,
                is_last=stage == len(stages) - 1 and index == len(chunks) - 1,
                tokens=tokens,
                columns=columns,
                true_columns=min(columns, model.vocabulary.size),
            )
            for index, layers in enumerate(chunks)
        )
        static = _static(architecture, model.vocabulary, parallel, shapes, layout.dp, bf16)
        step = _step_peak(architecture, parallel, kernels, shapes, stage, micro_batches, element)
        fixed = _fixed_buffers(model, parallel, seq_length, micro_batch_size, micro_batches, element)
        memories.append(
            StageMemory(
                weights=static.weights,
                gradients=static.gradients,
                optimizer=static.optimizer,
                activations=step.activations,
                logits=step.logits,
                buffers=fixed + max(step.passing, static.update - step.activations - step.logits),
            )
        )
    return tuple(memories)


def chunk_parameters(
    model: HFArchitecture, vocabulary: Vocabulary, tp: int, shape: ChunkShape
) -> tuple[int, ...]:
    """Elements of each parameter of a pipeline chunk on one rank, in the order of its modules."""
    hidden, wide = model.hidden, model.heads * model.head_dim
    layer = (
        hidden,
        wide * hidden // tp,
        model.qkv_rows * hidden // tp,
        hidden,
        2 * model.ffn * hidden // tp,
        model.ffn * hidden // tp,
    )
    table = vocabulary.padded_size // tp * hidden
    parameters = [table] if shape.is_first else []
    parameters += layer * shape.layers
    if shape.is_last:
        parameters += [hidden] if model.tied and shape.is_first else [hidden, table]
    return tuple(parameters)


@dataclass(frozen=True)
class _Static:
    weights: int
    gradients: int
    optimizer: int
    update: int  # bytes that the update needs for the moment


@lru_cache(maxsize=4096)
def _static(
    model: HFArchitecture,
    vocabulary: Vocabulary,
    parallel: ParallelConfig,
    shapes: tuple[ChunkShape, ...],
    dp: int,
    bf16: bool,
) -> _Static:
    """Core's contiguous buffers of weights and gradients, and the replica's share of Adam's state."""
    held = owned = parameters = 0
    for index, shape in enumerate(shapes):
        sizes = chunk_parameters(model, vocabulary, parallel.tensor_model_parallel_size, shape)
        is_bucketed = parallel.overlap_grad_reduce and index == 0
        tied = model.tied and parallel.pipeline_model_parallel_size > 1
        alone = {0} if tied and shape.is_first else {len(sizes) - 1} if tied and shape.is_last else set()
        for padded, filled in _buckets(
            sizes, alone, dp, max(_LEAST_BUCKET, 1_000_000 * dp) if is_bucketed else None
        ):
            held += padded
            owned += min(filled, padded // dp)
        parameters += len(sizes)
    in_fp32 = parallel.accumulate_allreduce_grads_in_fp32 or not bf16
    moments = 8 * owned + 4 * -(-parameters // dp)  # and a count of steps for every parameter
    return _Static(
        weights=held * (2 if bf16 else 4),
        gradients=held * (4 if in_fp32 else 2),
        optimizer=moments + (4 * owned if bf16 else 0),  # fp32 weights are their own masters
        update=0 if in_fp32 else 4 * owned,
    )


def _buckets(
    sizes: tuple[int, ...], alone: set[int], dp: int, bucket_size: int | None
) -> list[tuple[int, int]]:
    """Elements with and without padding of each bucket of gradients, in the order of the backward pass.

    Parameters start at multiples of 64, buckets end at multiples of 128 and of the replicas; those in
    `alone` have a bucket to themselves.
    """
    divisor = math.lcm(dp, _BUCKET_ALIGNMENT)
    buckets: list[tuple[int, int]] = []
    length = filled = 0

    def close() -> None:
        nonlocal length, filled
        if filled:
            buckets.append((-(-length // divisor) * divisor, filled))
        length = filled = 0

    for index in reversed(range(len(sizes))):
        if index in alone:
            close()
        length = -(-length // _PARAMETER_ALIGNMENT) * _PARAMETER_ALIGNMENT + sizes[index]
        filled += sizes[index]
        if index in alone or (bucket_size is not None and length >= bucket_size):
            close()
    close()
    return buckets


@dataclass(frozen=True)
class _StepPeak:
    activations: int
    logits: int
    passing: int


@lru_cache(maxsize=4096)
def _step_peak(
    model: HFArchitecture,
    parallel: ParallelConfig,
    kernels: Kernels,
    shapes: tuple[ChunkShape, ...],
    stage: int,
    micro_batches: int,
    element: int,
) -> _StepPeak:
    """The fullest instant of the stage's schedule, walked call by call."""
    pp, vpp = parallel.pipeline_model_parallel_size, len(shapes)
    chunks = [chunk_footprint(model, parallel, kernels, shape, element) for shape in shapes]
    head = head_footprint(model, parallel, kernels, shapes[-1], element)
    stream = Sizes.of(model, parallel, shapes[0].tokens, element).stream
    held = heads = 0
    newest: dict[int, int] = {}  # last micro-batch that went forward, by chunk
    stale: set[int] = set()  # chunks that still hold the input of a pass that is over, and its gradient
    peak, fullest = _StepPeak(0, 0, 0), -1
    for call in order_of_calls(pp, vpp, stage, min(micro_batches, _TELLING_ROUNDS * pp)):
        chunk, has_head = chunks[call.chunk], shapes[call.chunk].is_last
        passing = stream * (_messages(parallel, kernels, stage, call.kind) + 2 * len(stale - {call.chunk}))
        losing = 0
        if call.kind == "forward":
            newest[call.chunk] = call.micro_batch
            stale.discard(call.chunk)
            held += chunk.saved
            heads += has_head
            losing = chunk.forward
        else:
            passing += chunk.backward
        if held + losing + passing > fullest:
            fullest = held + losing + passing
            logits = heads * head.saved
            peak = _StepPeak(held - logits, logits + losing, passing)
        if call.kind == "backward":
            held -= chunk.saved
            heads -= has_head
            if newest[call.chunk] == call.micro_batch and not shapes[call.chunk].is_first:
                stale.add(call.chunk)
    return peak


def _messages(
    parallel: ParallelConfig, kernels: Kernels, stage: int, passing: Literal["forward", "backward"]
) -> int:
    """Messages between stages that are there beside those of the pass that runs."""
    if parallel.num_virtual_stages_per_pipeline_rank > 1:
        # received ahead in either direction; sent back by the pass before; sent and not freed yet
        return 2 + (stage > 0) + kernels.frees_sent_outputs
    if stage == 0:
        return 0
    return 2 if passing == "forward" else 1  # the last gradient sent back; its input until a new output


def _fixed_buffers(
    model: ModelShape,
    parallel: ParallelConfig,
    seq_length: int,
    micro_batch_size: int,
    micro_batches: int,
    element: int,
) -> int:
    """What a run keeps beside its weights: batches, tables, the gathered sequence of sequence parallelism."""
    tokens = seq_length * micro_batch_size
    batches = micro_batches * tokens * 25  # ids, labels and positions in int64, the loss mask in bytes
    rope = 2 * seq_length * model.architecture.head_dim * 4
    gathered = tokens * model.architecture.hidden * element if parallel.sequence_parallel else 0
    return batches + rope + model.vocabulary.size + gathered
