"""The ledger of rows: nothing skipped, nothing repeated, whatever the layout and wherever it changes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from usdm_megatron.data.order import EMPTY_ROW, RowOrder, rows_by_dp_rank, rows_of_steps
from usdm_megatron.errors import ConfigError

REPOSITORY = Path(__file__).parents[2]


def rows_of_global_step(order: RowOrder, step: int) -> list[int]:
    """The rows of a step in the order of the global batch, put together from what every rank reads."""
    by_rank = [order.rows_of_step(step, rank) for rank in range(order.dp_size)]
    slots = []
    for k in range(order.micro_batches):
        for rank in range(order.dp_size):
            slots += by_rank[rank][k].tolist()
    real = [row for row in slots if row != EMPTY_ROW]
    assert slots[: len(real)] == real  # empty rows come last
    return real


@st.composite
def orders(draw: st.DrawFn, shuffle: bool | None = None) -> RowOrder:
    micro, dp, accumulation = (draw(st.integers(1, 4)) for _ in range(3))
    store_rows = draw(st.integers(1, 40))
    return RowOrder(
        store_rows=store_rows,
        total_rows=draw(st.integers(1, 3 * store_rows)),
        global_batch_size=micro * dp * accumulation,
        micro_batch_size=micro,
        dp_size=dp,
        shuffle=draw(st.booleans()) if shuffle is None else shuffle,
        seed=draw(st.integers(0, 3)),
    )


@given(orders(shuffle=False))
def test_the_ledger_over_all_ranks_is_the_store_in_order(order: RowOrder) -> None:
    ledger = [row for step in range(order.steps) for row in rows_of_global_step(order, step)]
    assert ledger == [n % order.store_rows for n in range(order.total_rows)]


@given(orders(shuffle=True))
def test_shuffled_epochs_are_permutations(order: RowOrder) -> None:
    ledger = [row for step in range(order.steps) for row in rows_of_global_step(order, step)]
    assert len(ledger) == order.total_rows
    for start in range(0, order.total_rows, order.store_rows):
        epoch = ledger[start : start + order.store_rows]
        assert len(set(epoch)) == len(epoch)
        assert set(epoch) <= set(range(order.store_rows))


def divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]


@given(orders(), st.data())
def test_a_step_reads_the_same_rows_at_every_layout_and_across_a_change_of_it(
    order: RowOrder, data: st.DataObject
) -> None:
    dp = data.draw(st.sampled_from(divisors(order.global_batch_size)))
    micro = data.draw(st.sampled_from(divisors(order.global_batch_size // dp)))
    other = RowOrder(
        order.store_rows, order.total_rows, order.global_batch_size, micro, dp, order.shuffle, order.seed
    )
    expected = [rows_of_global_step(order, step) for step in range(order.steps)]
    # Run under the first layout up to a step, resume there from the consumed rows under the second.
    stop = data.draw(st.integers(0, order.steps))
    resumed_at = other.step_of_consumed(order.consumed_rows(stop))
    assert resumed_at == stop
    ledger = [rows_of_global_step(order, step) for step in range(stop)]
    ledger += [rows_of_global_step(other, step) for step in range(resumed_at, other.steps)]
    assert ledger == expected


@given(orders())
def test_consumed_rows_count_what_was_read(order: RowOrder) -> None:
    consumed = 0
    for step in range(order.steps):
        assert order.consumed_rows(step) == consumed
        assert order.step_of_consumed(consumed) == step
        consumed += len(rows_of_global_step(order, step))
    assert order.consumed_rows(order.steps) == consumed == order.total_rows
    assert order.step_of_consumed(order.total_rows) == order.steps


def test_slots_are_dealt_as_accelerate_does() -> None:
    order = RowOrder(store_rows=8, total_rows=8, global_batch_size=8, micro_batch_size=2, dp_size=2)
    assert order.rows_of_step(0, 0).tolist() == [[0, 1], [4, 5]]
    assert order.rows_of_step(0, 1).tolist() == [[2, 3], [6, 7]]
    assert order.rows_of_step(0, 0).dtype == np.int64


def test_the_last_step_of_an_epoch_is_filled_with_empty_rows() -> None:
    order = RowOrder(store_rows=5, total_rows=10, global_batch_size=4, micro_batch_size=1, dp_size=2)
    assert (order.steps_per_epoch, order.steps) == (2, 4)
    assert order.rows_of_step(1, 0).tolist() == [[4], [-1]]
    assert order.rows_of_step(1, 1).tolist() == [[-1], [-1]]
    assert order.rows_of_step(2, 0).tolist() == [[0], [2]]  # the next epoch begins in a fresh step
    assert rows_by_dp_rank(order, 1) == {0: [4], 1: []}
    assert rows_by_dp_rank(order, 2) == {0: [0, 2], 1: [1, 3]}
    assert [order.consumed_rows(step) for step in range(5)] == [0, 4, 5, 9, 10]


@pytest.mark.parametrize(("steps", "rows"), [(0, 0), (1, 4), (2, 5), (3, 9), (5, 14)])
def test_rows_of_a_number_of_steps(steps: int, rows: int) -> None:
    assert rows_of_steps(store_rows=5, global_batch_size=4, steps=steps) == rows
    if rows:
        assert RowOrder(5, rows, 4, 1, 1).steps == steps


def test_shuffle_depends_on_seed_and_epoch_alone() -> None:
    def ledger(seed: int, epoch: int) -> list[int]:
        order = RowOrder(100, 200, 100, 1, 1, shuffle=True, seed=seed)
        return order.rows_of_step(epoch, 0).ravel().tolist()

    assert ledger(1, 0) == ledger(1, 0)
    assert len({tuple(ledger(seed, epoch)) for seed in (1, 2) for epoch in (0, 1)}) == 4
    assert ledger(1, 0) != sorted(ledger(1, 0))


GOLDEN_EPOCH_0 = [4, 8, 1, 9, 3, 6, 0, 7, 2, 5]
GOLDEN_EPOCH_1 = [1, 2, 8, 5, 3, 9, 6, 0, 4, 7]


def test_shuffled_order_is_frozen() -> None:
    """Golden: a checkpoint of today must resume into the same order under any later version."""
    order = RowOrder(10, 20, 10, 1, 1, shuffle=True, seed=42)
    assert order.rows_of_step(0, 0).ravel().tolist() == GOLDEN_EPOCH_0
    assert order.rows_of_step(1, 0).ravel().tolist() == GOLDEN_EPOCH_1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"global_batch_size": 6},
            r"--global-batch-size 6 is not a multiple of micro-batch size 2 x 2 .* = 4",
        ),
        ({"store_rows": 0}, "store_rows is 0, the least is 1"),
        ({"total_rows": 0}, "total_rows is 0"),
        ({"micro_batch_size": 0}, "micro_batch_size is 0"),
        ({"dp_size": -1}, "dp_size is -1"),
        ({"global_batch_size": 0}, "global_batch_size is 0"),
        ({"seed": -1}, "seed is -1, the least is 0"),
    ],
)
def test_impossible_orders(changes: dict[str, int], message: str) -> None:
    valid = {
        "store_rows": 8,
        "total_rows": 8,
        "global_batch_size": 8,
        "micro_batch_size": 2,
        "dp_size": 2,
    }
    with pytest.raises(ConfigError, match=message):
        RowOrder(**(valid | changes))


def test_all_problems_are_reported_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        RowOrder(0, 0, 4, 1, 1, seed=-1)
    assert len(caught.value.problems) == 3


def test_consumed_rows_of_another_batch_size_are_refused() -> None:
    order = RowOrder(100, 100, 8, 1, 1)
    with pytest.raises(ConfigError, match="12 consumed rows lie inside step 2 of --global-batch-size 8"):
        order.step_of_consumed(12)
    with pytest.raises(ConfigError, match="101 rows are consumed already, the run ends after 100"):
        order.step_of_consumed(101)


@pytest.mark.parametrize(("step", "rank"), [(-1, 0), (2, 0), (0, 2), (0, -1)])
def test_outside_the_run(step: int, rank: int) -> None:
    with pytest.raises(ValueError, match=r"(step|rank) -?\d of 2"):
        RowOrder(8, 8, 4, 1, 2).rows_of_step(step, rank)


def test_order_and_preprocessing_import_no_torch() -> None:
    code = (
        "import sys, usdm_megatron.data.order, usdm_megatron.cli.preprocess, usdm_megatron.cli.inspect_store;"
        "print([m for m in ('torch', 'datasets', 'transformers', 'megatron') if m in sys.modules])"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True, cwd=REPOSITORY).strip() == "[]"
