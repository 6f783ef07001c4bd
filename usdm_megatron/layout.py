"""How ranks are divided among tensor, pipeline and data parallelism: arithmetic only."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from usdm_megatron.config_checks import below_one
from usdm_megatron.errors import ConfigError

Axis = Literal["tp", "dp", "pp"]
RankOrder = Literal["tp-cp-ep-dp-pp", "tp-cp-ep-pp-dp"]


@dataclass(frozen=True)
class RankCoordinates:
    """Where one rank sits: its tensor, data and pipeline parallel rank."""

    tp: int
    dp: int
    pp: int


@dataclass(frozen=True)
class ParallelLayout:
    """A division of `world_size` ranks into tp x dp x pp, with `vpp` model chunks a rank.

    `order` names the axes from the closest ranks to those furthest apart, in megatron-core's words: tensor
    parallel neighbours are adjacent, then come data parallel ranks and last pipeline stages, or the other
    way round (Megatron's `--use-tp-pp-dp-mapping`). cp and ep, of one rank each, change nothing.
    """

    world_size: int
    tp: int = 1
    pp: int = 1
    vpp: int = 1
    order: RankOrder = "tp-cp-ep-dp-pp"

    def __post_init__(self) -> None:
        sizes = {"tp": self.tp, "pp": self.pp, "vpp": self.vpp, "world size": self.world_size}
        problems = below_one("parallel", **sizes)
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

    @property
    def axes(self) -> tuple[Axis, ...]:
        """tp, dp and pp, ranks that are closest together first."""
        return ("tp", "dp", "pp") if self.order == "tp-cp-ep-dp-pp" else ("tp", "pp", "dp")

    def coordinates(self, rank: int) -> RankCoordinates:
        """Coordinates of global rank `rank`."""
        if not 0 <= rank < self.world_size:
            raise ValueError(f"rank {rank} is outside world size {self.world_size}")
        places = {}
        for axis in self.axes:
            rank, places[axis] = divmod(rank, self._size(axis))
        return RankCoordinates(**places)

    def rank_of(self, place: RankCoordinates) -> int:
        """The global rank at these coordinates."""
        rank = 0
        for axis in reversed(self.axes):
            index, size = getattr(place, axis), self._size(axis)
            if not 0 <= index < size:
                raise ValueError(f"{axis} rank {index} is outside {axis}={size}")
            rank = rank * size + index
        return rank

    def group(self, rank: int, axis: Axis) -> tuple[int, ...]:
        """Global ranks of the group of `rank` along `axis`, in the order of their coordinate."""
        here = self.coordinates(rank)
        return tuple(self.rank_of(replace(here, **{axis: index})) for index in range(self._size(axis)))

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

    def _size(self, axis: Axis) -> int:
        return {"tp": self.tp, "dp": self.dp, "pp": self.pp}[axis]
