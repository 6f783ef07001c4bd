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
from torch import Tensor

from usdm_megatron.config import LossReduction
from usdm_megatron.data.batch import PackedBatch
from usdm_megatron.model.loss import LossRecord
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
        self._groups = groups
        self._rope = rope
        self._dtype = dtype
        self._loss_reduction = loss_reduction
        self._kind_of_id = torch.from_numpy(vocabulary.kind_of_id()).to(groups.device)
        self._schedule = get_forward_backward_func()
        config = chunks[0].config
        config.finalize_model_grads_func = partial(finalize_model_grads, pg_collection=groups.collection)

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
        totals = self._run(batches, targets=targets, forward_only=False)
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
        """This rank's loss totals of one evaluation step; sum them, then `reduce_evaluation`."""
        for chunk in self._chunks:
            chunk.eval()
        totals = self._run(batches, targets=1, forward_only=True)
        for chunk in self._chunks:
            chunk.train()
        return totals

    def reduce_evaluation(self, totals: Tensor) -> Losses:
        """Losses over all ranks; the objective of an evaluation is the mean over all targets."""
        losses = _losses(self._sum_over_world(totals))
        mean = sum(losses.sums.values()) / losses.targets if losses.targets else math.nan
        return Losses(objective=mean, sums=losses.sums, counts=losses.counts)

    def _run(self, batches: list[PackedBatch], *, targets: int, forward_only: bool) -> Tensor:
        """[objective, sums by kind, counts by kind] of this rank, float64; zeros where it sees no loss."""
        micro_batches = len(batches)
        replicas = micro_batches * self._groups.layout.dp
        device = self._groups.device
        record = LossRecord.zero(device)
        objective = torch.zeros((), dtype=torch.float64, device=device)

        def loss_function(batch: PackedBatch, loss_1S: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            nonlocal record, objective
            loss_S, mask_S = loss_1S.view(-1), batch.loss_mask.view(-1)
            total = torch.where(mask_S, loss_S, 0.0).sum()
            if self._loss_reduction == "token-mean":
                share = total / targets
            else:  # mean of micro-batch means; a fully masked one counts as zero
                share = total / mask_S.sum().clamp(min=1) / replicas
            record = record + LossRecord.of_tokens(loss_S, mask_S, self._kind_of_id[batch.labels.view(-1)])
            objective = objective + share.detach().to(torch.float64)
            return share * replicas, {}

        def forward_step(iterator: Iterator[PackedBatch], chunk: Any) -> tuple[Tensor, Any]:
            batch = next(iterator)
            output = chunk(
                batch.tokens,
                batch.position_ids,
                None,
                labels=batch.labels,
                packed_seq_params=self._rope.pack(batch, self._dtype),
            )
            return output, partial(loss_function, batch)

        iterators = [iter(batches) for _ in self._chunks]  # each chunk walks all micro-batches
        self._schedule(
            forward_step_func=forward_step,
            data_iterator=iterators if len(iterators) > 1 else iterators[0],
            model=self._chunks,
            num_microbatches=micro_batches,
            seq_length=batches[0].tokens.numel(),
            micro_batch_size=1,  # micro-batch rows are flattened into one
            forward_only=forward_only,
        )
        totals = torch.cat((objective.view(1), record.sums_K, record.counts_K))
        # tensor parallel ranks of the last stage all hold the same losses: count the first's
        return totals if self._groups.coordinates.tp == 0 else torch.zeros_like(totals)

    def _sum_over_world(self, values: Tensor) -> list[float]:
        dist.all_reduce(values)
        return values.tolist()  # the one host sync of a step


def _losses(values: list[float]) -> Losses:
    kinds = list(TargetKind)
    sums, counts = values[1 : 1 + len(kinds)], values[1 + len(kinds) :]
    return Losses(
        objective=values[0],
        sums=dict(zip(kinds, sums, strict=True)),
        counts={kind: round(count) for kind, count in zip(kinds, counts, strict=True)},
    )
