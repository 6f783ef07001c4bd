"""The training loop: it knows steps, intervals and reports, and nothing of parallelism."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from usdm_megatron.config import RunConfig
from usdm_megatron.data.loader import MicroBatchLoader
from usdm_megatron.data.order import RowOrder
from usdm_megatron.data.step_work import StepCounter
from usdm_megatron.errors import Preempted, TrainingFault
from usdm_megatron.train.metrics import (
    FlopCounter,
    Reporter,
    accuracy_fields,
    eval_line,
    loss_fields,
    train_line,
)
from usdm_megatron.train.optimizer import AdamW
from usdm_megatron.train.preemption import StopRequest
from usdm_megatron.train.schedule import Schedule, lr_at
from usdm_megatron.train.start import TrainState
from usdm_megatron.train.step import Evaluation, PipelineStep, StepResult


@dataclass(frozen=True)
class Loop:
    """Everything that one run's loop works with."""

    config: RunConfig
    order: RowOrder
    loader: MicroBatchLoader
    valid_order: RowOrder | None
    valid_loader: MicroBatchLoader | None
    counter: StepCounter
    schedule: Schedule
    step: PipelineStep
    optimizer: AdamW
    flops: FlopCounter
    reporter: Reporter
    save: Callable[[TrainState], tuple[Any, float]]
    memory_gib: Callable[[], float]
    world_size: int

    def run(self, state: TrainState, stop: StopRequest) -> TrainState:
        """Train from `state` to the last step; always ends on a saved checkpoint.

        Raises `Preempted` after saving when a rank was asked to stop, `TrainingFault` on a
        non-finite loss or gradient, before the update.
        """
        gc.disable()  # collections at ranks' own times stall every collective; see below
        try:
            saved_step = state.step
            while state.step < self.order.steps:
                result, fields = self._train_step(state.step, stop)
                state = replace(
                    state, step=state.step + 1, consumed_rows=self.order.consumed_rows(state.step + 1)
                )
                self._report(state.step, fields)
                last = state.step == self.order.steps
                preempted = result.stop_requested and not last
                if self._is_due(self.config.training.eval_interval, state.step, last) and not preempted:
                    state = self._evaluate(state)
                is_best = state.best_step == state.step
                if (
                    preempted
                    or is_best
                    or self._is_due(self.config.checkpoint.save_interval, state.step, last)
                ):
                    self._save(state)
                    saved_step = state.step
                    gc.collect()
                if preempted:
                    self.reporter.event(state.step, "preempted")
                    raise Preempted(state.step)
            assert saved_step == state.step
            return state
        finally:
            gc.enable()

    def _train_step(self, step: int, stop: StopRequest) -> tuple[StepResult, dict[str, Any]]:
        started_at = time.perf_counter()
        work = self.counter.count(self._rows_of(step))
        lr = lr_at(step, self.schedule)
        result = self.step.train(
            self.loader.step_batches(step),
            self.optimizer,
            targets=max(1, work.targets),
            lr=lr,
            stop=lambda: stop.requested,
        )
        if not result.finite:
            self._stop_on_non_finite(step, result)
        elapsed_s = time.perf_counter() - started_at
        tflops_per_rank = self.flops.tflops(work) / elapsed_s / self.world_size
        peak = self.flops.peak_tflops
        return result, {
            **loss_fields(result.losses),
            "lr": lr,
            "grad_norm": result.gradient_norm,
            "tokens": result.losses.targets,
            "consumed_rows": self.order.consumed_rows(step + 1),
            "step_time_s": elapsed_s,
            "tokens_per_s": work.tokens / elapsed_s,
            "tflops_per_rank": tflops_per_rank,
            "mfu": None if peak is None else tflops_per_rank / peak,
            "memory_gib": self.memory_gib(),
        }

    def _report(self, step: int, fields: dict[str, Any]) -> None:
        self.reporter.write("train", step, **fields)
        self.reporter.progress(step)
        if step % self.config.logging.log_interval == 0 or step in (1, self.order.steps):
            self.reporter.say(train_line(step, self.order.steps, fields))

    def _evaluate(self, state: TrainState) -> TrainState:
        if self.valid_loader is None or self.valid_order is None:
            return state
        evaluation = self.evaluate()
        fields = {
            **loss_fields(evaluation),
            **accuracy_fields(evaluation),
            "tokens": evaluation.targets,
            "rows": self.valid_order.store_rows,
        }
        if not evaluation.targets:
            fields["loss"] = None  # NaN is no JSON
        self.reporter.write("eval", state.step, **fields)
        self.reporter.say(eval_line(state.step, fields))
        loss = evaluation.objective
        better = math.isfinite(loss) and (state.best_loss is None or loss < state.best_loss)
        if better and self.config.checkpoint.keep_best:
            state = replace(state, best_loss=loss, best_step=state.step)
        return state

    def evaluate(self) -> Evaluation:
        """Losses and accuracy over the whole validation store."""
        assert self.valid_loader is not None and self.valid_order is not None
        totals = [
            self.step.evaluate(self.valid_loader.step_batches(step)) for step in range(self.valid_order.steps)
        ]
        return self.step.reduce_evaluation(sum(totals[1:], totals[0]))

    def _save(self, state: TrainState) -> None:
        saved, stall_s = self.save(state)
        self.reporter.write(
            "checkpoint", state.step, path=str(saved.path), stall_s=stall_s, bytes=saved.size_bytes
        )
        self.reporter.say(f"saved {saved.path} ({saved.size_bytes / 2**20:,.1f} MiB in {stall_s:.2f} s)")

    def _is_due(self, interval: int | str, step: int, last: bool) -> bool:
        if last:
            return True
        return step % (self.order.steps_per_epoch if interval == "epoch" else int(interval)) == 0

    def _rows_of(self, step: int) -> np.ndarray:
        return np.concatenate(
            [self.order.rows_of_step(step, rank).ravel() for rank in range(self.order.dp_size)]
        )

    def _stop_on_non_finite(self, step: int, result: StepResult) -> None:
        rows = [int(row) for row in self._rows_of(step) if row >= 0]
        self.reporter.event(
            step + 1,
            "non-finite",
            loss=str(result.losses.objective),
            grad_norm=str(result.gradient_norm),
            rows=rows,
        )
        raise TrainingFault(
            f"step {step + 1}: loss {result.losses.objective}, gradient norm "
            f"{result.gradient_norm}; the update was "
            f"not applied and the last checkpoint stands; rows of this step: {rows[:16]}"
            + (" …" if len(rows) > 16 else "")
        )
