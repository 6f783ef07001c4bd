"""What a simulated run consists of: plain records, without torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from usdm_megatron.architecture import HFArchitecture
from usdm_megatron.config import RunConfig
from usdm_megatron.layout import ParallelLayout, RankCoordinates
from usdm_megatron.vocab import Vocabulary

GIB = 2**30


@dataclass(frozen=True)
class RunShape:
    """What decides what every rank builds; rows are read where `config` names a store."""

    config: RunConfig
    architecture: HFArchitecture
    vocabulary: Vocabulary
    layout: ParallelLayout

    @property
    def has_rows(self) -> bool:
        return bool(self.config.data.train_stores)


@dataclass(frozen=True)
class Shard:
    """The box of a tensor that a rank holds, in the tensor's own coordinates as checkpoints know them."""

    key: str
    global_shape: tuple[int, ...]
    offset: tuple[int, ...]
    shape: tuple[int, ...]
    replica: tuple[int, ...]  # core's replica_id: shards of equal ids make up one whole tensor

    def of(self, key: str) -> Shard:
        """The same box of another tensor."""
        return replace(self, key=key)

    @property
    def box(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return self.offset, self.shape


@dataclass(frozen=True)
class Buffer:
    """One of DDP's contiguous buffers of a model chunk: weights and gradients of as many elements."""

    chunk: int
    weight_dtype: str
    gradient_dtype: str
    elements: int  # padding included
    padding: int
    buckets: int


@dataclass(frozen=True)
class OwnedPart:
    """The elements of a weight's shard, flattened, whose optimizer state this replica holds."""

    elements: int  # of the shard
    start: int
    stop: int


@dataclass(frozen=True)
class Memory:
    """Bytes on the device, as an allocator without rounding has them; no CUDA context, no NCCL buffers."""

    weights: int
    gradients: int
    optimizer: int
    other: int  # the step's micro-batches, tables
    step: int | None = None  # what a step needs at most beside these; None: not traced

    @property
    def resident(self) -> int:
        """Between steps."""
        return self.weights + self.gradients + self.optimizer + self.other

    @property
    def peak(self) -> int | None:
        return None if self.step is None else self.resident + self.step


@dataclass(frozen=True)
class SimulatedRank:
    """What a rank of the run holds, whom it talks to and what it reads in the step that was asked for."""

    rank: int
    place: RankCoordinates
    parameters: Mapping[str, tuple[int, ...]]  # shapes of this rank's shards, by `chunk_0.decoder…`
    shards: tuple[Shard, ...]
    owned: Mapping[str, OwnedPart]  # of the weights that train, by the names in `parameters`
    buffers: tuple[Buffer, ...]
    groups: Mapping[str, tuple[int, ...]]  # global ranks of each of core's groups that the rank is in
    next_stage: int | None  # the rank that takes this one's outputs
    previous_stage: int | None  # the rank whose outputs this one takes
    rows: tuple[tuple[int, ...], ...] | None  # by micro-batch, -1 for an empty row; None: no store
    tokens: tuple[int, ...]  # of each micro-batch, padding included
    memory: Memory

    @property
    def parameter_count(self) -> int:
        return sum(math.prod(shape) for shape in self.parameters.values())
