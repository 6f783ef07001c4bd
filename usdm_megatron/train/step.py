"""One optimizer step over a pipeline of packed micro-batches, and one evaluation pass.

The objective is a weighted sum of micro-batch losses; core then divides by micro-batches and data
parallel ranks, so what is handed to it is multiplied by both. Everything that the host needs (losses
by kind, gradient norm, whether to stop) is reduced in one tensor and read once, before the update.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.utils import unwrap_model
from torch import Tensor

from usdm_megatron.config import LossReduction
from usdm_megatron.data.batch import PackedBatch
from usdm_megatron.model.lora.new_rows import sum_tied_rows
from usdm_megatron.model.loss import LossRecord, count_by_kind, packed_cross_entropy, predicted_ids
from usdm_megatron.model.packed_sequence import RopeTable
from usdm_megatron.runtime.process_groups import ProcessGroups
from usdm_megatron.train.optimizer import AdamW
from usdm_megatron.vocab import TargetKind, Vocabulary


@dataclass(frozen=True)
class Losses:
    """Losses of a step or an evaluation, on the host: the mean over targets, and by kind."""

    objective: float  # the recipe's objective; of an evaluation the mean over targets
    sums: dict[TargetKind, float]
    counts: dict[TargetKind, int]

    @property
    def targets(self) -> int:
        return sum(self.counts.values())

    def of_kind(self, kind: TargetKind) -> float | None:
        """Mean loss over targets of `kind`; None without any."""
        return self.sums[kind] / self.counts[kind] if self.counts[kind] else None


@dataclass(frozen=True)
class Evaluation(Losses):
    """Losses of an evaluation, and how many targets were the likeliest token (teacher-forced)."""

    correct: dict[TargetKind, int]

    @property
    def accuracy(self) -> float | None:
        """Share of all targets; None without any."""
        return sum(self.correct.values()) / self.targets if self.targets else None

    def accuracy_of(self, kind: TargetKind) -> float | None:
        """Share of the targets of `kind`; None without any."""
        return self.correct[kind] / self.counts[kind] if self.counts[kind] else None


@dataclass(frozen=True)
class StepResult:
    """What a training step reports; with `finite` false the update was not applied."""

    losses: Losses
    gradient_norm: float
    finite: bool
    stop_requested: bool


class PipelineStep:
    """Runs micro-batches through this rank's chunks under core's pipeline schedule."""

    def __init__(
        self,
        chunks: list[Any],
        groups: ProcessGroups,
        rope: RopeTable,
        vocabulary: Vocabulary,
        *,
        dtype: torch.dtype,
        loss_reduction: LossReduction,
    ) -> None:
        self._chunks = chunks
        self._bare_chunks = unwrap_model(chunks)
        self._groups = groups
        self._rope = rope
        self._dtype = dtype
        self._loss_reduction = loss_reduction
        self._vocabulary_size = vocabulary.size
        self._kind_of_id = torch.from_numpy(vocabulary.kind_of_id()).to(groups.device)
        self._schedule = get_forward_backward_func()
        chunks[0].config.finalize_model_grads_func = self._finalize_gradients

    def train(
        self,
        batches: list[PackedBatch],
        optimizer: AdamW,
        *,
        targets: int,
        lr: float,
        stop: Callable[[], bool],
    ) -> StepResult:
        """Forward, backward and, if everything is finite, the update at `lr`.

        `batches` are this rank's micro-batches, `targets` the number of target tokens in the global
        batch, `stop` says whether this rank was asked to stop (one rank is enough); it is asked last.
        """
        for chunk in self._chunks:
            chunk.zero_grad_buffer()
        optimizer.zero_grad()
        totals = self._train_totals(batches, targets)
        squared_norm = optimizer.collect_gradients().to(torch.float64)
        tail = torch.stack((squared_norm, torch.full_like(squared_norm, float(stop()))))
        *losses, squared, stops = self._sum_over_world(torch.cat((totals, tail)))
        result = StepResult(
            losses=_losses(losses),
            gradient_norm=math.sqrt(squared) if squared >= 0 else math.nan,
            finite=math.isfinite(losses[0]) and math.isfinite(squared),
            stop_requested=stops > 0,
        )
        if result.finite:
            optimizer.update(lr, result.gradient_norm)
        return result

    @torch.no_grad()
    def evaluate(self, batches: list[PackedBatch]) -> Tensor:
        """This rank's totals of one evaluation step; sum them, then `reduce_evaluation`."""
        record = LossRecord.zero(self._groups.device)
        correct_K = torch.zeros_like(record.counts_K)
        over_vocabulary: dict[str, Any] = {
            "vocabulary_size": self._vocabulary_size,
            "tp_rank": self._groups.coordinates.tp,
            "group": self._groups.collection.tp,
        }

        def tally(batch: PackedBatch, logits_1SV: Tensor) -> Tensor:
            nonlocal record, correct_K
            logits_SV, labels_S, mask_S = logits_1SV[0], batch.labels.view(-1), batch.loss_mask.view(-1)
            kind_S = self._kind_of_id[labels_S]
            correct_S = predicted_ids(logits_SV, **over_vocabulary) == labels_S
            loss_S = packed_cross_entropy(logits_SV, labels_S, **over_vocabulary)
            record = record + LossRecord.of_tokens(loss_S, mask_S, kind_S)
            correct_K = correct_K + count_by_kind(correct_S & mask_S, kind_S)
            return loss_S.sum()  # core wants a scalar and does nothing with it

        for chunk in self._chunks:
            chunk.eval()
        # bare: around a bf16 model, core's wrapper would bring the logits to fp32, 1.4 GB at 8,192 x 42,003
        self._run_schedule(self._bare_chunks, batches, tally, with_labels=False, forward_only=True)
        for chunk in self._chunks:
            chunk.train()
        return self._once(torch.cat((record.sums_K, record.counts_K, correct_K)))

    def reduce_evaluation(self, totals: Tensor) -> Evaluation:
        """Losses over all ranks; the objective of an evaluation is the mean over all targets."""
        values, kinds = self._sum_over_world(totals), len(TargetKind)
        sums, counts = _by_kind(values[:kinds]), _whole(values[kinds : 2 * kinds])
        targets = sum(counts.values())
        mean = sum(sums.values()) / targets if targets else math.nan
        return Evaluation(mean, sums, counts, correct=_whole(values[2 * kinds :]))

    def _train_totals(self, batches: list[PackedBatch], targets: int) -> Tensor:
        """[objective, sums by kind, counts by kind] of this rank, float64; gradients are accumulated."""
        replicas = len(batches) * self._groups.layout.dp
        record = LossRecord.zero(self._groups.device)
        objective = torch.zeros_like(record.sums_K[:1])

        def weigh(batch: PackedBatch, loss_1S: Tensor) -> Tensor:
            nonlocal record, objective
            loss_S, mask_S = loss_1S.view(-1), batch.loss_mask.view(-1)
            total = torch.where(mask_S, loss_S, 0.0).sum()
            if self._loss_reduction == "token-mean":
                share = total / targets
            else:  # mean of micro-batch means; a fully masked one counts as zero
                share = total / mask_S.sum().clamp(min=1) / replicas
            record = record + LossRecord.of_tokens(loss_S, mask_S, self._kind_of_id[batch.labels.view(-1)])
            objective = objective + share.detach().to(torch.float64)
            return share * replicas

        self._run_schedule(self._chunks, batches, weigh, with_labels=True, forward_only=False)
        return self._once(torch.cat((objective, record.sums_K, record.counts_K)))

    def _run_schedule(
        self,
        chunks: list[Any],
        batches: list[PackedBatch],
        loss_of: Callable[[PackedBatch, Tensor], Tensor],
        *,
        with_labels: bool,
        forward_only: bool,
    ) -> None:
        """Core's schedule over these micro-batches.

        On the last stage `loss_of(batch, output)` is the scalar that is differentiated; `output` are losses
        `[1, S]` with labels and logits `[1, S, V]` without.
        """

        def loss_function(batch: PackedBatch, output: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            return loss_of(batch, output), {}

        def forward_step(iterator: Iterator[PackedBatch], chunk: Any) -> tuple[Tensor, Any]:
            batch = next(iterator)
            output = chunk(
                batch.tokens,
                batch.position_ids,
                None,
                labels=batch.labels if with_labels else None,
                packed_seq_params=self._rope.pack(batch, self._dtype),
            )
            return output, partial(loss_function, batch)

        iterators = [iter(batches) for _ in chunks]  # each chunk walks all micro-batches
        self._schedule(
            forward_step_func=forward_step,
            data_iterator=iterators if len(iterators) > 1 else iterators[0],
            model=chunks,
            num_microbatches=len(batches),
            seq_length=batches[0].tokens.numel(),
            micro_batch_size=1,  # micro-batch rows are flattened into one
            forward_only=forward_only,
        )

    def _finalize_gradients(self, *args: Any, **kwargs: Any) -> None:
        """Core's, then what it does not know of: rows that the first and the last stage train together."""
        finalize_model_grads(*args, **{**kwargs, "pg_collection": self._groups.collection})
        sum_tied_rows(self._bare_chunks, self._groups.collection.embd)

    def _once(self, totals: Tensor) -> Tensor:
        """Tensor parallel ranks of the last stage all hold the same totals: count the first's."""
        return totals if self._groups.coordinates.tp == 0 else torch.zeros_like(totals)

    def _sum_over_world(self, values: Tensor) -> list[float]:
        dist.all_reduce(values)
        return values.tolist()  # the one host sync of a step


def _losses(values: list[float]) -> Losses:
    kinds = len(TargetKind)
    return Losses(values[0], sums=_by_kind(values[1 : 1 + kinds]), counts=_whole(values[1 + kinds :]))


def _by_kind(values: list[float]) -> dict[TargetKind, float]:
    return dict(zip(TargetKind, values, strict=True))


def _whole(counts: list[float]) -> dict[TargetKind, int]:
    return {kind: round(count) for kind, count in _by_kind(counts).items()}
