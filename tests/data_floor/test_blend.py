"""Blends: the order is arithmetic, the proportions hold at every prefix, the rows are the stores' own."""

from __future__ import annotations

import json
import random
import shutil
from collections import Counter
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from usdm_megatron.data.blend import Blend, BlendOrder, RowPlace, TrainRows, open_rows, shares_of, stores_of
from usdm_megatron.data.loader import MicroBatchLoader
from usdm_megatron.data.order import EMPTY_ROW, RowOrder
from usdm_megatron.data.step_work import StepCounter
from usdm_megatron.data.token_store import TokenStore
from usdm_megatron.errors import DataError
from usdm_megatron.vocab import Vocabulary

SEQ_LENGTH = 24
WEIGHT = st.fractions(Fraction(1, 10**6), 10**6, max_denominator=10**6)
WEIGHTS = st.lists(WEIGHT | st.integers(1, 9).map(Fraction), min_size=1, max_size=9)


def fractions(*weights: str) -> list[Fraction]:
    return list(map(Fraction, weights))


def sequence(order: BlendOrder, rows: int) -> list[RowPlace]:
    return [order.place(row) for row in range(rows)]


# --- the order


def test_a_known_order() -> None:
    order = BlendOrder.of(fractions("0.7", "0.3"))
    assert order.weights == (7, 3)
    letters = "".join("AB"[place.store] for place in sequence(order, 20))
    assert letters == "ABAABAAABA" * 2  # B at row m where round(0.3 m), halves up, becomes one more
    assert [place.row for place in sequence(order, 10)] == [0, 0, 1, 2, 1, 3, 4, 5, 2, 6]


@settings(deadline=None)
@given(WEIGHTS, st.integers(1, 400))
def test_every_store_is_read_in_order_and_its_counts_are_a_tally(weights: list[Fraction], rows: int) -> None:
    order = BlendOrder.of(weights)
    taken = [0] * len(weights)
    for row in range(rows):
        assert order.counts(row) == tuple(taken)
        place = order.place(row)
        assert place.row == taken[place.store]
        taken[place.store] += 1


@settings(deadline=None)
@given(WEIGHTS, st.integers(0, 10**12), st.integers(1, 100))
def test_proportions_at_every_prefix(weights: list[Fraction], first: int, length: int) -> None:
    """Within half a row of two, one of three, 1.7 of any number, wherever one looks."""
    order = BlendOrder.of(weights)
    bound = {1: 0, 2: Fraction(1, 2), 3: 1}.get(len(weights), Fraction(17, 10))
    for rows in (*range(length), *range(first, first + length)):
        counts = order.counts(rows)
        assert sum(counts) == rows
        for count, weight in zip(counts, weights, strict=True):
            assert abs(count - rows * weight / sum(weights)) <= bound


@given(WEIGHTS, st.randoms(use_true_random=False))
def test_random_access_equals_sequential(weights: list[Fraction], shuffler: random.Random) -> None:
    expected = sequence(BlendOrder.of(weights), 60)
    rows = list(range(60))
    shuffler.shuffle(rows)
    order = BlendOrder.of(weights)
    assert {row: order.place(row) for row in rows} == dict(enumerate(expected))


@given(st.lists(st.integers(1, 60), min_size=1, max_size=6))
def test_a_cycle_gives_every_store_its_weight(weights: list[int]) -> None:
    order = BlendOrder.of(list(map(Fraction, weights)))
    cycle = sum(order.weights)
    assert order.counts(cycle) == order.weights
    ahead = [RowPlace(place.store, place.row + order.weights[place.store]) for place in sequence(order, 50)]
    assert [order.place(cycle + row) for row in range(50)] == ahead


def test_only_ratios_count() -> None:
    assert BlendOrder.of(fractions("0.7", "0.3")) == BlendOrder.of(fractions("70", "30"))
    assert BlendOrder.of(fractions("1e-9", "3e-9", "2e-9")).weights == (1, 3, 2)


@settings(deadline=None)
@given(
    st.lists(st.tuples(WEIGHT | st.integers(1, 5).map(Fraction), st.integers(1, 40)), min_size=1, max_size=5)
)
def test_an_epoch_is_the_longest_prefix_that_exhausts_no_store(stores: list[tuple[Fraction, int]]) -> None:
    order = BlendOrder.of([weight for weight, _ in stores])
    left = [rows for _, rows in stores]
    rows = 0
    while left[order.place(rows).store]:
        left[order.place(rows).store] -= 1
        rows += 1
    assert order.epoch_rows([rows for _, rows in stores]) == rows


@given(st.lists(st.integers(1, 10**9), min_size=1, max_size=6))
def test_weights_that_are_row_counts_read_every_row(row_counts: list[int]) -> None:
    order = BlendOrder.of(list(map(Fraction, row_counts)))
    assert order.epoch_rows(row_counts) == sum(row_counts)


# --- the stores


@pytest.fixture
def stores(write_store: Callable[..., TokenStore], make_rows: Callable[..., list]) -> list[TokenStore]:
    return [write_store(make_rows(rows, seed=rows), f"store{rows}") for rows in (20, 30, 5)]


def opened(stores: list[TokenStore], *weights: str) -> TrainRows:
    return open_rows([store.prefix for store in stores], fractions(*weights))


def test_rows_are_those_of_the_stores(stores: list[TokenStore]) -> None:
    blend = opened(stores, "0.5", "0.3", "0.2")
    assert isinstance(blend, Blend)
    assert stores_of(blend) == blend.stores
    read: dict[int, list[int]] = {0: [], 1: [], 2: []}
    tokens = 0
    for row_id in range(blend.rows):
        place = blend.place(row_id)
        read[place.store].append(place.row)
        expected, found = stores[place.store].row(place.row), blend.row(row_id)
        assert np.array_equal(found.tokens, expected.tokens)
        assert np.array_equal(found.sample_lengths, expected.sample_lengths)
        tokens += len(found.tokens)
    assert tokens == blend.tokens
    counts = [share.rows_read for share in shares_of(blend)]
    assert counts[2] == 5 and sum(counts) == blend.rows  # ends with the smallest store
    assert read == {store: list(range(count)) for store, count in enumerate(counts)}  # in order, each once
    for row_id in (-1, blend.rows):
        with pytest.raises(IndexError, match=f"row {row_id} of {blend.rows}"):
            blend.row(row_id)


def test_shares_say_what_is_left(stores: list[TokenStore]) -> None:
    blend = opened(stores[:2], "0.7", "0.3")
    assert blend.prefix == f"7 {stores[0].prefix} 3 {stores[1].prefix}"
    first, second = map(str, shares_of(blend))
    assert first == f"70.00% {stores[0].prefix}: 20 of its 20 rows an epoch"
    assert second == f"30.00% {stores[1].prefix}: 9 of its 30 rows an epoch"
    assert blend.rows == 29  # row 29 would be the 21st of the first


@pytest.mark.parametrize("weight", ["1", "0.3"])
def test_one_store_is_that_store(stores: list[TokenStore], weight: str) -> None:
    source = opened(stores[:1], weight)
    assert isinstance(source, TokenStore)
    assert source.identity == stores[0].identity
    assert stores_of(source) == (source,) and shares_of(source) == ()


def test_identity(stores: list[TokenStore], tmp_path: Path) -> None:
    a, b, c = stores
    blend = opened([a, b], "0.7", "0.3")
    others = [
        opened([a, b], "0.6", "0.4"), opened([a, b], "0.3", "0.7"), opened([b, a], "0.3", "0.7"),
        opened([a, c], "0.7", "0.3"), opened([a, b, c], "0.7", "0.3", "0.1"), a, b,
    ]  # fmt: skip
    identities = {blend.identity, *(other.identity for other in others)}
    assert len(identities) == 1 + len(others)
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    for suffix in ("bin", "idx", "json"):
        shutil.copy(f"{b.prefix}.{suffix}", moved / f"b.{suffix}")
    again = open_rows([a.prefix, str(moved / "b")], fractions("14", "6"))
    assert again.identity == blend.identity


# --- through the loader


def loader_of(rows: TrainRows, order: RowOrder, rank: int, vocabulary: Vocabulary) -> MicroBatchLoader:
    return MicroBatchLoader(
        rows, order, rank, seq_length=SEQ_LENGTH, vocabulary=vocabulary, train_sample_boundaries=False
    )


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize(("micro", "dp"), [(1, 1), (2, 2), (1, 4)])
def test_ranks_partition_the_rows_of_every_epoch(
    stores: list[TokenStore], vocabulary: Vocabulary, micro: int, dp: int, shuffle: bool
) -> None:
    blend = opened(stores, "0.2", "0.7", "0.1")
    assert isinstance(blend, Blend)
    order = RowOrder(blend.rows, 2 * blend.rows, 8, micro, dp, shuffle=shuffle)
    counter = StepCounter(blend, window=None, train_sample_boundaries=False, cross_sample_attention="masked")
    read: list[int] = []
    for step in range(order.steps):
        row_ids, targets = [], 0
        for rank in range(dp):
            with loader_of(blend, order, rank, vocabulary) as loader:
                for batch in loader.step_batches(step):
                    row_ids += batch.row_ids
                    targets += int(batch.loss_mask.sum())
                    for slot, row_id in enumerate(batch.row_ids):
                        if row_id != EMPTY_ROW:
                            tokens = blend.row(row_id).tokens
                            start = slot * SEQ_LENGTH
                            assert batch.tokens[0, start : start + len(tokens)].tolist() == tokens.tolist()
        work = counter.count(np.array(row_ids))
        assert work.targets == targets  # what the objective is divided by, known before the step
        read += [row_id for row_id in row_ids if row_id != EMPTY_ROW]
    first, second = read[: blend.rows], read[blend.rows :]
    assert sorted(first) == sorted(second) == list(range(blend.rows))
    assert (first == second) is not shuffle
    places = Counter((place.store, place.row) for place in map(blend.place, read))
    assert set(places.values()) == {2}


def test_reading_goes_on_inside_an_epoch(stores: list[TokenStore], vocabulary: Vocabulary) -> None:
    """Consumed rows are the whole state: they say the step, and the step says the rows of each store."""
    blend = opened(stores, "0.5", "0.3", "0.2")
    assert isinstance(blend, Blend)
    order = RowOrder(blend.rows, 3 * blend.rows, 4, 1, 1)
    for done in range(order.steps):
        consumed = order.consumed_rows(done)
        with loader_of(blend, order, 0, vocabulary) as resumed:
            batches = resumed.step_batches(order.step_of_consumed(consumed))
        first = consumed % blend.rows
        stop = min(first + 4, blend.rows)
        rows = [row for batch in batches for row in batch.row_ids if row != EMPTY_ROW]
        assert rows == list(range(first, stop))
        counts = blend.order.counts(first)
        for store in range(3):
            own = [place.row for place in map(blend.place, rows) if place.store == store]
            assert own == list(range(counts[store], counts[store] + len(own)))


# --- refused


def refusal(prefixes: list[str], *weights: str) -> tuple[str, ...]:
    with pytest.raises(DataError) as refused:
        open_rows(prefixes, fractions(*weights))
    return refused.value.problems


def test_missing_stores_are_all_named(stores: list[TokenStore]) -> None:
    first, second = refusal(["nowhere", stores[0].prefix, "missing"], "1", "1", "1")
    assert first.startswith("nowhere: no token store") and second.startswith("missing: no token store")


def test_stores_of_other_vocabularies(
    stores: list[TokenStore], write_store: Callable[..., TokenStore], make_rows: Callable[..., list]
) -> None:
    other = Vocabulary(text_size=19, unit_count=8)
    strange = write_store(make_rows(3, vocabulary=other), "strange", other)
    (problem,) = refusal([stores[0].prefix, stores[1].prefix, strange.prefix], "1", "1", "1")
    assert problem.startswith(f"{strange.prefix} and {stores[0].prefix} cannot be blended: ")
    assert "'text_size': 19" in problem and "'text_size': 20" in problem


def test_stores_of_other_tokenizers(stores: list[TokenStore]) -> None:
    """A store without a recorded tokenizer fits any; two recorded ones must be equal."""
    for store, digest in ((stores[1], "ab" * 32), (stores[2], "cd" * 32)):
        path = Path(f"{store.prefix}.json")
        path.write_text(json.dumps({**json.loads(path.read_text()), "tokenizer_sha256": digest}))
    assert isinstance(opened(stores[:2], "1", "1"), Blend)
    (problem,) = refusal([store.prefix for store in stores], "1", "1", "1")
    assert problem.startswith(f"{stores[2].prefix} and {stores[1].prefix} cannot be blended: ")
    assert "cdcdcdcdcdcd… and abababababab…" in problem


def test_a_weight_that_reads_nothing_of_its_store(stores: list[TokenStore]) -> None:
    (problem,) = refusal([stores[0].prefix, stores[1].prefix], "1", "1e-320")
    assert problem.startswith(f"{stores[1].prefix}: its weight, 1e-320 of all, reads none of its ")
    assert "raise the weight, or leave the store out" in problem


def test_a_copy_of_a_store(stores: list[TokenStore], tmp_path: Path) -> None:
    for suffix in ("bin", "idx", "json"):
        shutil.copy(f"{stores[0].prefix}.{suffix}", tmp_path / f"copy.{suffix}")
    (problem,) = refusal([stores[0].prefix, str(tmp_path / "copy")], "0.7", "0.3")
    assert "hold the same rows; name one of them, with the sum of the weights" in problem
