"""The loader gives the order's rows as batches, one step ahead, and hides nothing."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

from usdm_megatron.data.loader import MicroBatchLoader, check_store_fits
from usdm_megatron.data.order import EMPTY_ROW, RowOrder
from usdm_megatron.data.token_store import TokenStore
from usdm_megatron.errors import DataError
from usdm_megatron.vocab import Vocabulary

SEQ_LENGTH = 24


@pytest.fixture
def store(write_store: Callable[..., TokenStore], make_rows: Callable[..., list]) -> TokenStore:
    return write_store(make_rows(11, longest=SEQ_LENGTH))


def open_loader(
    store: TokenStore, vocabulary: Vocabulary, *, micro: int, dp: int, rank: int, **changes: Any
) -> MicroBatchLoader:
    order = RowOrder(store.rows, 2 * store.rows, 4, micro, dp)
    options: dict[str, Any] = {
        "seq_length": SEQ_LENGTH,
        "vocabulary": vocabulary,
        "train_sample_boundaries": True,
    }
    return MicroBatchLoader(store, order, rank, **(options | changes))


@pytest.mark.parametrize(("micro", "dp"), [(1, 1), (2, 1), (1, 2), (2, 2), (4, 1)])
def test_every_row_of_every_epoch_arrives_once(
    store: TokenStore, vocabulary: Vocabulary, micro: int, dp: int
) -> None:
    seen: list[int] = []
    loaders = [open_loader(store, vocabulary, micro=micro, dp=dp, rank=rank) for rank in range(dp)]
    for step in range(6):
        by_rank = [loader.step_batches(step) for loader in loaders]
        for micro_batches in zip(*by_rank, strict=True):
            for batch in micro_batches:
                for slot, row_id in enumerate(batch.row_ids):
                    tokens = batch.tokens[0, slot * SEQ_LENGTH : (slot + 1) * SEQ_LENGTH].tolist()
                    expected = [] if row_id == EMPTY_ROW else store.row(row_id).tokens.tolist()
                    padding = [vocabulary.pad_id] * (SEQ_LENGTH - len(expected))
                    assert tokens == expected + padding
                    seen += [row_id] if row_id != EMPTY_ROW else []
    assert seen == [*range(11), *range(11)]
    for loader in loaders:
        loader.close()


def test_any_step_may_be_asked_for(store: TokenStore, vocabulary: Vocabulary) -> None:
    """A resume starts anywhere; asking twice or out of order gives the same batches."""
    with open_loader(store, vocabulary, micro=2, dp=1, rank=0) as loader:
        rows = {
            step: [batch.row_ids for batch in loader.step_batches(step)] for step in (4, 1, 2, 2, 5, 0, 1)
        }
    assert rows == {
        0: [(0, 1), (2, 3)],
        1: [(4, 5), (6, 7)],
        2: [(8, 9), (10, EMPTY_ROW)],
        4: [(4, 5), (6, 7)],
        5: [(8, 9), (10, EMPTY_ROW)],
    }


def test_the_next_step_is_built_ahead_and_only_that(
    store: TokenStore, vocabulary: Vocabulary, monkeypatch: pytest.MonkeyPatch
) -> None:
    built: list[tuple[int, str]] = []
    ready = threading.Semaphore(0)
    build = MicroBatchLoader._build

    def recording(loader: MicroBatchLoader, step: int) -> list:
        batches = build(loader, step)
        built.append((step, threading.current_thread().name))
        ready.release()
        return batches

    monkeypatch.setattr(MicroBatchLoader, "_build", recording)
    with open_loader(store, vocabulary, micro=1, dp=1, rank=0) as loader:
        loader.step_batches(0)
        assert all(ready.acquire(timeout=10) for _ in range(2))
        assert [step for step, _ in built] == [0, 1]
        loader.step_batches(1)
        assert ready.acquire(timeout=10)
    assert [step for step, _ in built] == [0, 1, 2]
    assert {name for _, name in built} == {"micro-batch-loader_0"}


def test_an_error_in_the_background_reaches_the_caller(
    store: TokenStore, vocabulary: Vocabulary, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = TokenStore.row

    def failing(self: TokenStore, row_id: int) -> Any:
        if row_id == 5:
            raise OSError("the disk went away")
        return row(self, row_id)

    monkeypatch.setattr(TokenStore, "row", failing)
    with open_loader(store, vocabulary, micro=1, dp=1, rank=0) as loader:
        assert len(loader.step_batches(0)) == 4
        with pytest.raises(OSError, match="the disk went away"):
            loader.step_batches(1)


def test_close_ends_the_thread_and_the_loader(store: TokenStore, vocabulary: Vocabulary) -> None:
    loader = open_loader(store, vocabulary, micro=1, dp=1, rank=0)
    loader.step_batches(0)
    loader.close()
    assert not any(thread.name.startswith("micro-batch-loader") for thread in threading.enumerate())
    with pytest.raises(RuntimeError):
        loader.step_batches(3)


def test_options_reach_the_builder(write_store: Callable[..., TokenStore], vocabulary: Vocabulary) -> None:
    store = write_store([[[1, 5, 2], [1, 6, 2]]])
    lengths, targets = [], []
    for cross, boundaries in (("masked", True), ("allowed", False)):
        with MicroBatchLoader(
            store,
            RowOrder(1, 1, 1, 1, 1),
            0,
            seq_length=8,
            vocabulary=vocabulary,
            train_sample_boundaries=boundaries,
            cross_sample_attention=cross,
        ) as loader:
            (batch,) = loader.step_batches(0)
        lengths.append(batch.segment_lengths)
        targets.append(int(batch.loss_mask.sum()))
    assert lengths == [(3, 3, 2), (6, 2)]
    assert targets == [5, 4]


def test_a_store_that_does_not_fit_the_run(store: TokenStore, vocabulary: Vocabulary) -> None:
    with pytest.raises(DataError) as caught:
        check_store_fits(
            store, seq_length=store.longest_row - 1, vocabulary=Vocabulary(text_size=20, unit_count=0)
        )
    too_long, outside = caught.value.problems
    assert f"its longest row holds {store.longest_row} tokens, more than --seq-length" in too_long
    assert "its largest id is 28, the model's vocabulary has 20 ids" in outside
    with pytest.raises(DataError, match="the same ids would mean other tokens"):
        check_store_fits(store, seq_length=SEQ_LENGTH, vocabulary=Vocabulary(text_size=21, unit_count=7))
    with pytest.raises(DataError, match="more than --seq-length 3"):
        open_loader(store, vocabulary, micro=1, dp=1, rank=0, seq_length=3)


def test_an_order_of_another_store_is_our_bug(store: TokenStore, vocabulary: Vocabulary) -> None:
    with pytest.raises(ValueError, match="the order is of 5 rows, the store has 11"):
        MicroBatchLoader(
            store,
            RowOrder(5, 5, 1, 1, 1),
            0,
            seq_length=SEQ_LENGTH,
            vocabulary=vocabulary,
            train_sample_boundaries=True,
        )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_batches_on_cuda_equal_those_on_cpu(store: TokenStore, vocabulary: Vocabulary) -> None:
    with (
        open_loader(store, vocabulary, micro=2, dp=1, rank=0) as on_cpu,
        open_loader(store, vocabulary, micro=2, dp=1, rank=0, device="cuda:0") as on_cuda,
    ):
        for step in range(6):
            for expected, found in zip(on_cpu.step_batches(step), on_cuda.step_batches(step), strict=True):
                assert found.segment_lengths == expected.segment_lengths
                for name in ("tokens", "labels", "loss_mask", "position_ids", "cu_seqlens"):
                    assert getattr(found, name).is_cuda
                    assert torch.equal(getattr(found, name).cpu(), getattr(expected, name)), name
