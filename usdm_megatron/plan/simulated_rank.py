"""One rank of a run as it would be built: model stage, buffers, optimizer shard, groups, rows, peak memory.

Everything is the trainer's own (`train/engine.py`, core's DDP, distributed optimizer and schedule), on
tensors without memory, in process groups that talk to nobody.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator

from usdm_megatron.data.batch import PackedBatch, build_packed_batch
from usdm_megatron.data.token_store import PackedRow
from usdm_megatron.errors import ConfigError
from usdm_megatron.plan.fused_kernels import as_on_cuda
from usdm_megatron.plan.live_bytes import LiveBytes
from usdm_megatron.plan.simulation import Buffer, Memory, OwnedPart, RunShape, Shard, SimulatedRank
from usdm_megatron.runtime.process_groups import ProcessGroups, seed_rank
from usdm_megatron.runtime.simulated_world import META, host_memory_on_meta, open_simulated_groups
from usdm_megatron.train.engine import Engine, build_engine
from usdm_megatron.train.preflight import build_order, open_stores
from usdm_megatron.train.run import open_loader

# Micro-batches that a traced step runs, in lengths of the pipeline: its warm-up, then a round with as many
# passes in flight as there ever are, and another. What follows repeats them.
_TRACED_ROUNDS = 3


def simulate_rank(run: RunShape, rank: int, *, step: int = 1, trace: bool = True) -> SimulatedRank:
    """Build `rank` and, with `trace`, run a training step on it; `step` counts from 1, as in metrics.jsonl.

    Raises `ConfigError` where the run has no such step, `AssertionError` where what was built contradicts
    itself: a bug of ours, or of core.
    """
    with _built(run, rank, step) as built:
        return built.describe(built.trace_step() if trace else None)


@contextmanager
def _built(run: RunShape, rank: int, step: int) -> Iterator[_BuiltRank]:
    config = run.config
    with open_simulated_groups(run.layout, rank) as groups, LiveBytes() as live:
        seed_rank(config.training.seed, groups.coordinates)
        engine = build_engine(config, run.architecture, run.vocabulary, groups, "torch")
        batches = _read_batches(run, groups, step) if run.has_rows else _full_batches(run)
        yield _BuiltRank(run, groups, engine, batches, live, live.now)


@dataclass(frozen=True)
class _BuiltRank:
    """A rank inside its open world; `resident` bytes are alive between steps."""

    run: RunShape
    groups: ProcessGroups
    engine: Engine
    batches: list[PackedBatch]
    live: LiveBytes
    resident: int

    def trace_step(self) -> int:
        """Bytes that one training step needs at most beyond what is resident."""
        few = self.batches[: _TRACED_ROUNDS * self.groups.layout.pp]
        self.engine.models[0].config.deallocate_pipeline_outputs = True  # as on CUDA: `model/architecture.py`
        with as_on_cuda(self.engine.models):
            self.live.start_peak()
            self.engine.step.train(few, self.engine.optimizer, targets=1, lr=0.0, stop=lambda: False)
        return self.live.peak - self.resident

    def describe(self, step_bytes: int | None) -> SimulatedRank:
        named = [
            (f"chunk_{index}.{name}", parameter)
            for index, model in enumerate(self.engine.models)
            for name, parameter in model.named_parameters()
        ]
        next_stage, previous_stage = self._partners()
        if step_bytes is not None:
            self._check_messages({next_stage, previous_stage} - {None})
        return SimulatedRank(
            rank=self.groups.rank,
            place=self.groups.coordinates,
            parameters={name: tuple(parameter.shape) for name, parameter in named},
            shards=self._shards(),
            owned={name: self._owned(parameter) for name, parameter in named if parameter.requires_grad},
            buffers=tuple(self._buffers()),
            groups=dict(_group_members(self.groups)),
            next_stage=next_stage,
            previous_stage=previous_stage,
            rows=tuple(batch.row_ids for batch in self.batches) if self.run.has_rows else None,
            tokens=tuple(batch.tokens.numel() for batch in self.batches),
            memory=self._memory([parameter for _, parameter in named], step_bytes),
        )

    def _owned(self, parameter: torch.nn.Parameter) -> OwnedPart:
        part = self.engine.optimizer.owned_part(parameter)
        return OwnedPart(parameter.numel(), part.start, part.stop)

    def _shards(self) -> tuple[Shard, ...]:
        """Of the weights; masters and moments must lie in the boxes of those that train."""
        state = {
            f"chunk_{index}": model.sharded_state_dict() for index, model in enumerate(self.engine.models)
        }
        entries = list(_sharded_entries(state))
        trained = {box for entry in entries if entry.data.requires_grad for box in _boxes(entry)}
        with host_memory_on_meta():
            optimizer = self.engine.optimizer.sharded_state(state, loading=True)
            by_kind: dict[str, set[Shard]] = {}
            for entry in _sharded_entries(optimizer):
                for box in _boxes(entry):
                    _, _, kind, key = box.key.split(".", 3)  # optimizer.state.exp_avg.decoder…
                    by_kind.setdefault(kind, set()).add(box.of(key))
        for kind, boxes in by_kind.items():
            assert boxes == trained, f"rank {self.groups.rank}: {kind} is not sharded as its weights are"
        return tuple(box for entry in entries for box in _boxes(entry))

    def _buffers(self) -> Iterator[Buffer]:
        for index, ddp in enumerate(self.engine.wrapped):
            for buffer in [*ddp.buffers, *ddp.expert_parallel_buffers]:
                yield Buffer(
                    chunk=index,
                    weight_dtype=_name(buffer.param_dtype),
                    gradient_dtype=_name(buffer.grad_dtype),
                    elements=buffer.grad_data.numel(),
                    padding=buffer.grad_data.numel() - sum(p.numel() for p in buffer.params),
                    buckets=len(buffer.buckets),
                )

    def _partners(self) -> tuple[int | None, int | None]:
        """The next and the previous stage, as core's communicator has them; at the ends None, unless chunks
        are interleaved: then the last stage goes on to the first."""
        if self.groups.layout.pp == 1:
            return None, None
        communicator = P2PCommunicator(self.groups.pp, self.engine.models[0].config)
        wraps = self.groups.layout.vpp > 1
        return (
            communicator.next_rank if wraps or not self.groups.is_last_stage else None,
            communicator.prev_rank if wraps or not self.groups.is_first_stage else None,
        )

    def _check_messages(self, partners: set[int | None]) -> None:
        """Activations go to the next stage and gradients to the previous one: each is sent to and heard."""
        for heard in (self.live.sent_to, self.live.received_from):
            assert heard == partners, f"rank {self.groups.rank}: messages with {heard}, stages are {partners}"

    def _memory(self, parameters: list[torch.nn.Parameter], step_bytes: int | None) -> Memory:
        weights = _storage_bytes(parameters)
        gradients = _storage_bytes(buffer.grad_data for ddp in self.engine.wrapped for buffer in ddp.buffers)
        optimizer = self.engine.optimizer.state_bytes()
        if not self.run.config.training.bf16:  # masters are the weights themselves
            own = (self._owned(p) for p in parameters if p.requires_grad)
            optimizer -= sum(4 * (part.stop - part.start) for part in own)
        other = self.resident - weights - gradients - optimizer
        assert other >= 0, f"rank {self.groups.rank}: {-other} bytes are counted twice"
        return Memory(weights, gradients, optimizer, other, step_bytes)


def _read_batches(run: RunShape, groups: ProcessGroups, step: int) -> list[PackedBatch]:
    """What the rank's loader gives for `step`."""
    store, _ = open_stores(run.config)
    order = build_order(run.config, groups.layout, store.rows)
    if not 1 <= step <= order.steps:
        raise ConfigError(f"--step {step} is not one of this run's steps, 1 to {order.steps}")
    with open_loader(run.config, store, order, run.vocabulary, groups) as loader:
        return [batch.to(META) for batch in loader.step_batches(step - 1)]


def _full_batches(run: RunShape) -> list[PackedBatch]:
    """As many micro-batches as a step has, of full rows of one sample."""
    data = run.config.data
    sample = np.full(data.seq_length, run.vocabulary.bos_id)
    row = PackedRow(sample, np.array([data.seq_length], dtype=np.int32))
    with torch.device("cpu"):
        batch = build_packed_batch(
            [row] * data.micro_batch_size,
            range(data.micro_batch_size),
            seq_length=data.seq_length,
            vocabulary=run.vocabulary,
            train_sample_boundaries=True,
            cross_sample_attention=run.config.model.cross_sample_attention,
        )
    count = run.layout.micro_batches(data.global_batch_size, data.micro_batch_size)
    return [batch.to(META) for _ in range(count)]


def _sharded_entries(state: Any) -> Iterator[Any]:
    """Sharded tensors of a state dict, those that are made up of several as one."""
    for value in nested_values(state):
        if isinstance(value, (ShardedTensor, ShardedTensorFactory)):
            yield value


def _boxes(entry: Any) -> Iterator[Shard]:
    parts = nested_values(entry.build()) if isinstance(entry, ShardedTensorFactory) else [entry]
    for part in parts:
        ahead = part.prepend_axis_num  # of the layers' axis, which a layer's tensor does not have
        replica = part.replica_id if isinstance(part.replica_id, tuple) else (part.replica_id,)
        yield Shard(
            key=part.key,
            global_shape=tuple(part.global_shape),
            offset=tuple(part.global_offset),
            shape=(1,) * ahead + tuple(part.local_shape),
            replica=replica,
        )


def _group_members(groups: ProcessGroups) -> Iterator[tuple[str, tuple[int, ...]]]:
    for field in fields(groups.collection):
        group = getattr(groups.collection, field.name, None)
        if isinstance(group, dist.ProcessGroup):
            members = tuple(dist.get_process_group_ranks(group))
            if groups.rank in members:
                yield field.name, members


def _storage_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of these tensors' storages, each counted once."""
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage() for tensor in tensors}
    return sum(storage.nbytes() for storage in storages.values())


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
