"""Feeds the training step: a step's micro-batches, built one step ahead in a background thread."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

import torch

from usdm_megatron.data.batch import CrossSampleAttention, PackedBatch, build_packed_batch
from usdm_megatron.data.blend import TrainRows, stores_of
from usdm_megatron.data.order import EMPTY_ROW, RowOrder
from usdm_megatron.data.token_store import PackedRow, TokenStore
from usdm_megatron.errors import DataError
from usdm_megatron.vocab import Vocabulary


class MicroBatchLoader:
    """The micro-batches of every step on one data-parallel rank.

    Stateless but for the step built ahead: any step may be asked for at any time, so a resume only
    needs its step number. Each rank reads the map itself; nothing is broadcast. On a CUDA `device`
    batches come from pinned memory by non-blocking copies on the caller's stream.

    With `pad_to_multiple_of` rows are laid end to end and each micro-batch is padded to a multiple of it, or
    with `one_length` all micro-batches of a step to that of the longest; without, every row is padded to
    `seq_length`.

    Raises `DataError` if the store does not fit `seq_length` or `vocabulary`.
    """

    def __init__(
        self,
        store: TrainRows,
        order: RowOrder,
        dp_rank: int,
        *,
        seq_length: int,
        vocabulary: Vocabulary,
        train_sample_boundaries: bool,
        cross_sample_attention: CrossSampleAttention = "masked",
        pad_to_multiple_of: int | None = None,
        one_length: bool = True,
        device: torch.device | str = "cpu",
    ) -> None:
        for part in stores_of(store):
            check_store_fits(part, seq_length=seq_length, vocabulary=vocabulary)
        if order.store_rows != store.rows:
            raise ValueError(f"the order is of {order.store_rows} rows, the store has {store.rows}")
        self._store = store
        self._order = order
        self._dp_rank = dp_rank
        self._seq_length = seq_length
        self._vocabulary = vocabulary
        self._train_sample_boundaries = train_sample_boundaries
        self._cross_sample_attention = cross_sample_attention
        self._pad_to_multiple_of = pad_to_multiple_of
        self._one_length = one_length
        self._device = torch.device(device)
        self._builder = ThreadPoolExecutor(1, "micro-batch-loader", initializer=self._enter_thread)
        self._ahead: tuple[int, Future[list[PackedBatch]]] | None = None

    def step_batches(self, step: int) -> list[PackedBatch]:
        """The micro-batches of `step` (0-based) on this rank, on `device`; the next step's are begun.

        An exception of the background thread is raised here.
        """
        ahead, self._ahead = self._ahead, None
        if ahead is not None and ahead[0] == step:
            batches = ahead[1].result()
        else:
            if ahead is not None:
                ahead[1].cancel()
            batches = self._builder.submit(self._build, step).result()
        if step + 1 < self._order.steps:
            self._ahead = (step + 1, self._builder.submit(self._build, step + 1))
        if self._device.type == "cpu":
            return batches
        return [batch.to(self._device, non_blocking=True) for batch in batches]

    def close(self) -> None:
        """Stop the background thread; the loader cannot be used afterwards."""
        self._builder.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> MicroBatchLoader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _enter_thread(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)  # else pinning opens a context on GPU 0 from every rank

    def _build(self, step: int) -> list[PackedBatch]:
        ids_of_step: list[list[int]] = self._order.rows_of_step(step, self._dp_rank).tolist()
        rows_of_step = [
            [None if row_id == EMPTY_ROW else self._store.row(row_id) for row_id in row_ids]
            for row_ids in ids_of_step
        ]
        lengths = self._batch_lengths(rows_of_step)
        batches = [
            build_packed_batch(
                rows,
                row_ids,
                seq_length=self._seq_length,
                vocabulary=self._vocabulary,
                train_sample_boundaries=self._train_sample_boundaries,
                cross_sample_attention=self._cross_sample_attention,
                batch_length=length,
            )
            for rows, row_ids, length in zip(rows_of_step, ids_of_step, lengths, strict=True)
        ]
        return [batch.pin_memory() for batch in batches] if self._device.type == "cuda" else batches

    def _batch_lengths(self, rows_of_step: Sequence[Sequence[PackedRow | None]]) -> Sequence[int | None]:
        """Tokens of each micro-batch of a step on this rank.

        Replicas differ: they exchange gradients alone.
        """
        multiple = self._pad_to_multiple_of
        if multiple is None:
            return [None] * len(rows_of_step)
        most = len(rows_of_step[0]) * self._seq_length
        held = [sum(len(row.tokens) for row in rows if row is not None) for rows in rows_of_step]
        padded = [min(-(-max(1, tokens) // multiple) * multiple, most) for tokens in held]
        return [max(padded)] * len(padded) if self._one_length else padded


def check_store_fits(store: TokenStore, *, seq_length: int, vocabulary: Vocabulary) -> None:
    """Raise `DataError` (all problems at once) if training cannot use `store`; reads no tokens."""
    problems = []
    if store.longest_row > seq_length:
        problems.append(
            f"{store.prefix}: its longest row holds {store.longest_row} tokens, more than --seq-length "
            f"{seq_length}; train with --seq-length {store.longest_row} or preprocess with a smaller one"
        )
    if store.summary.largest_id >= vocabulary.size:
        problems.append(
            f"{store.prefix}: its largest id is {store.summary.largest_id}, the model's vocabulary has "
            f"{vocabulary.size} ids; convert the model with --extend-vocab usdm or use its own data"
        )
    elif store.summary.vocabulary != vocabulary:
        problems.append(
            f"{store.prefix}: made for {store.summary.vocabulary.to_dict()}, the model has "
            f"{vocabulary.to_dict()}; the same ids would mean other tokens: preprocess for this model"
        )
    if problems:
        raise DataError(*problems)
