"""Which rows a step reads, on which data-parallel rank: pure arithmetic, no state but a step number.

The global batch of a step is a window of `global_batch_size` rows of the epoch's order. Micro-batch k
of rank r covers its slots `[(k * dp + r) * mbs, + mbs)` (as accelerate's `BatchSamplerShard` deals them),
so the rows of a step do not depend on how many ranks share them. The last window of an epoch takes what
is left and is filled with `EMPTY_ROW`; the next epoch begins in a fresh step.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from usdm_megatron.errors import ConfigError

EMPTY_ROW = -1


@dataclass(frozen=True)
class RowOrder:
    """The order in which a run consumes the rows of a store.

    `total_rows` is what the whole run consumes: epochs x `store_rows`, or fewer. `global_batch_size`
    and `micro_batch_size` count rows; `dp_size` is the number of data-parallel ranks.
    """

    store_rows: int
    total_rows: int
    global_batch_size: int
    micro_batch_size: int
    dp_size: int
    shuffle: bool = False
    seed: int = 42

    def __post_init__(self) -> None:
        problems = [
            f"data: {name} is {getattr(self, name)}, the least is 1"
            for name in ("store_rows", "total_rows", "global_batch_size", "micro_batch_size", "dp_size")
            if getattr(self, name) < 1
        ]
        if self.seed < 0:
            problems.append(f"data: seed is {self.seed}, the least is 0")
        if not problems and self.global_batch_size % (self.micro_batch_size * self.dp_size):
            problems.append(
                f"training: --global-batch-size {self.global_batch_size} is not a multiple of micro-batch "
                f"size {self.micro_batch_size} x {self.dp_size} data-parallel ranks = "
                f"{self.micro_batch_size * self.dp_size}; change --global-batch-size or --micro-batch-size"
            )
        if problems:
            raise ConfigError(*problems)

    @property
    def micro_batches(self) -> int:
        """Micro-batches of a step on each rank."""
        return self.global_batch_size // (self.micro_batch_size * self.dp_size)

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.store_rows // self.global_batch_size)

    @property
    def steps(self) -> int:
        """Steps of the whole run."""
        epochs, rest = divmod(self.total_rows, self.store_rows)
        return epochs * self.steps_per_epoch + -(-rest // self.global_batch_size)

    def consumed_rows(self, step_count: int) -> int:
        """Rows consumed by the first `step_count` steps."""
        if not 0 <= step_count <= self.steps:
            raise ValueError(f"{step_count} steps of {self.steps}")
        return min(rows_of_steps(self.store_rows, self.global_batch_size, step_count), self.total_rows)

    def step_of_consumed(self, consumed: int) -> int:
        """How many steps consume exactly `consumed` rows; `ConfigError` if that is inside a step."""
        if not 0 <= consumed <= self.total_rows:
            raise ConfigError(
                f"data: {consumed} rows are consumed already, the run ends after {self.total_rows}; "
                "raise --num-train-epochs, --train-samples or --train-iters"
            )
        epoch, offset = divmod(consumed, self.store_rows)
        step = epoch * self.steps_per_epoch + -(-offset // self.global_batch_size)
        if self.consumed_rows(step) != consumed:
            raise ConfigError(
                f"data: {consumed} consumed rows lie inside step {step} of --global-batch-size "
                f"{self.global_batch_size} over {self.store_rows} rows; resume with the global batch size "
                "(and the number of rows) that the checkpoint was written with"
            )
        return step

    def rows_of_step(self, step: int, dp_rank: int) -> np.ndarray:
        """Row ids that `dp_rank` reads in `step` (0-based), int64 `[micro_batches, micro_batch_size]`.

        `EMPTY_ROW` where the epoch, or the run, has no rows left.
        """
        if not 0 <= dp_rank < self.dp_size:
            raise ValueError(f"data-parallel rank {dp_rank} of {self.dp_size}")
        slots = self._global_batch(step).reshape(self.micro_batches, self.dp_size, self.micro_batch_size)
        return slots[:, dp_rank].copy()

    def _global_batch(self, step: int) -> np.ndarray:
        if not 0 <= step < self.steps:
            raise ValueError(f"step {step} of {self.steps}")
        epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
        start = step_in_epoch * self.global_batch_size
        stop = min(start + self.global_batch_size, self.store_rows, self.total_rows - epoch * self.store_rows)
        rows = np.full(self.global_batch_size, EMPTY_ROW, dtype=np.int64)
        if self.shuffle:
            rows[: stop - start] = _permutation(self.store_rows, self.seed, epoch)[start:stop]
        else:
            rows[: stop - start] = np.arange(start, stop)
        return rows


def rows_of_steps(store_rows: int, global_batch_size: int, steps: int) -> int:
    """Rows that `steps` steps consume, over as many epochs as they need (`--train-iters` → `total_rows`)."""
    steps_per_epoch = -(-store_rows // global_batch_size)
    epochs, steps_in_epoch = divmod(steps, steps_per_epoch)
    return epochs * store_rows + min(steps_in_epoch * global_batch_size, store_rows)


def rows_by_dp_rank(order: RowOrder, step: int) -> dict[int, list[int]]:
    """The rows that each data-parallel rank reads in `step`, in its order, without the empty ones."""
    ledger = {}
    for dp_rank in range(order.dp_size):
        rows = order.rows_of_step(step, dp_rank).ravel()
        ledger[dp_rank] = rows[rows != EMPTY_ROW].tolist()
    return ledger


@lru_cache(maxsize=2)  # the current epoch, and the next while its first batches are built ahead
def _permutation(rows: int, seed: int, epoch: int) -> np.ndarray:
    """A permutation from (seed, epoch) alone, int64 `[rows]`.

    Sorts raw draws: numpy promises the bit stream of PCG64 for ever, but not `Generator.permutation`
    (NEP 19), and a resumed run must see the same order under a newer numpy.
    """
    draws = np.random.PCG64(np.random.SeedSequence([seed, epoch])).random_raw(rows)
    permutation = np.argsort(draws, kind="stable")
    permutation.setflags(write=False)
    return permutation
