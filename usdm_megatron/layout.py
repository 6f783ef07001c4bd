"""How ranks are divided among tensor, pipeline and data parallelism: arithmetic only.

Rank order is megatron-core's default `tp-cp-ep-dp-pp`: tensor parallel
neighbours are adjacent, then data parallel, pipeline stages lie furthest apart.
"""

from __future__ import annotations

from dataclasses import dataclass

from usdm_megatron.errors import ConfigError


@dataclass(frozen=True)
class RankCoordinates:
    """Where one rank sits: its tensor, data and pipeline parallel rank."""

    tp: int
    dp: int
    pp: int


@dataclass(frozen=True)
class ParallelLayout:
    """A division of `world_size` ranks into tp x dp x pp, with `vpp` model chunks a rank."""

    world_size: int
    tp: int = 1
    pp: int = 1
    vpp: int = 1

    def __post_init__(self) -> None:
        problems = [
            f"parallel: {name} is {size}; it must be at least 1"
            for name, size in (
                ("tp", self.tp),
                ("pp", self.pp),
                ("vpp", self.vpp),
                ("world size", self.world_size),
            )
            if size < 1
        ]
        if not problems and self.world_size % (self.tp * self.pp):
            ranks = self.tp * self.pp
            problems.append(
                f"parallel: tp={self.tp} x pp={self.pp} = {ranks} does not divide world size "
                f"{self.world_size}; "
                f"launch {ranks}, {2 * ranks}, {3 * ranks}, … ranks, or change "
                f"--tensor-model-parallel-size / --pipeline-model-parallel-size"
            )
        if problems:
            raise ConfigError(*problems)

    @property
    def dp(self) -> int:
        """Data parallel size: how many ranks read different rows."""
        return self.world_size // (self.tp * self.pp)

    def coordinates(self, rank: int) -> RankCoordinates:
        """Coordinates of global rank `rank`."""
        if not 0 <= rank < self.world_size:
            raise ValueError(f"rank {rank} is outside world size {self.world_size}")
        return RankCoordinates(
            tp=rank % self.tp, dp=rank // self.tp % self.dp, pp=rank // (self.tp * self.dp)
        )

    def micro_batches(self, global_batch_size: int, micro_batch_size: int) -> int:
        """Micro-batches that each data parallel rank runs in one step."""
        return global_batch_size // (micro_batch_size * self.dp)

    def problems_with_batch(self, global_batch_size: int, micro_batch_size: int) -> list[str]:
        """What is wrong with this batch on this layout, as sentences."""
        rows = micro_batch_size * self.dp
        if global_batch_size % rows:
            return [
                f"data: global batch size {global_batch_size} is not divisible by micro batch size "
                f"{micro_batch_size} x data parallel size {self.dp} = {rows}; "
                f"set --global-batch-size to a multiple of {rows}"
            ]
        count = self.micro_batches(global_batch_size, micro_batch_size)
        if self.vpp > 1 and count % self.pp:
            return [
                f"data: an interleaved pipeline needs the {count} micro-batches of a step to be a "
                "multiple of "
                f"pp={self.pp}; set --global-batch-size to a multiple of {rows * self.pp}"
            ]
        return []
