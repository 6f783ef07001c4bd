"""What a run reports: `metrics.jsonl` always, a log line, TensorBoard, W&B when asked. Rank 0 only."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from usdm_megatron.architecture import HFArchitecture
from usdm_megatron.config import LoggingConfig
from usdm_megatron.data.step_work import StepWork
from usdm_megatron.train.step import Evaluation, Losses
from usdm_megatron.vocab import TargetKind

METRICS_FILE = "metrics.jsonl"
# dense bf16 peak, TFLOP/s, by a part of the device name (vendor data sheets)
_PEAK_TFLOPS = {"A100": 312.0, "H100 PCIe": 756.0, "H100": 989.0, "H200": 989.0, "H800": 989.0}


@dataclass(frozen=True)
class FlopCounter:
    """Model FLOPs of a step: linear layers and attention over the samples as packed, forward + backward."""

    per_token: float
    per_pair: float
    peak_tflops: float | None

    @classmethod
    def of(
        cls,
        architecture: HFArchitecture,
        vocabulary_size: int,
        device_name: str,
        adapter_parameters: int | None = None,
    ) -> FlopCounter:
        """Multiply-adds count two; the backward pass twice the forward; recomputation not at all.

        With LoRA (`adapter_parameters`, rows of new ids left out) a frozen weight has no gradient of its own.
        """
        a = architecture
        attention = a.hidden * a.head_dim * (2 * a.heads + 2 * a.kv_heads)
        linear = a.layers * (attention + 3 * a.hidden * a.ffn) + a.hidden * vocabulary_size
        peak = next((peak for name, peak in _PEAK_TFLOPS.items() if name in device_name), None)
        per_token = 6.0 * linear if adapter_parameters is None else 4.0 * linear + 6.0 * adapter_parameters
        return cls(per_token=per_token, per_pair=12.0 * a.layers * a.heads * a.head_dim, peak_tflops=peak)

    def tflops(self, work: StepWork) -> float:
        return (self.per_token * work.tokens + self.per_pair * work.attention_pairs) / 1e12


def loss_fields(losses: Losses) -> dict[str, float | None]:
    """`loss` and `loss_<kind>` for every kind (None without targets)."""
    return {"loss": losses.objective, **{f"loss_{kind.label}": losses.of_kind(kind) for kind in TargetKind}}


def accuracy_fields(evaluation: Evaluation) -> dict[str, float | None]:
    """`accuracy` and `accuracy_<kind>` for every kind, in [0, 1] (None without targets)."""
    by_kind = {f"accuracy_{kind.label}": evaluation.accuracy_of(kind) for kind in TargetKind}
    return {"accuracy": evaluation.accuracy, **by_kind}


class Reporter:
    """Writes one run's reports; on ranks other than 0 it does nothing (`enabled=False`)."""

    def __init__(
        self,
        run: Path,
        config: LoggingConfig,
        run_config: dict[str, Any],
        steps: int,
        *,
        enabled: bool,
        start_step: int = 0,
    ) -> None:
        self._enabled = enabled
        self._tensorboard = self._wandb = self._file = self._progress = None
        if not enabled:
            return
        self._progress = _progress_bar(steps)
        self._path = run / METRICS_FILE
        self._file = self._path.open("a", encoding="utf-8")
        from torch.utils.tensorboard import SummaryWriter

        self._tensorboard = SummaryWriter(
            config.tensorboard_dir or str(run / "tensorboard"), purge_step=start_step + 1
        )
        if config.wandb_project is not None:
            import wandb

            self._wandb = wandb.init(
                project=config.wandb_project,
                name=config.wandb_exp_name,
                entity=config.wandb_entity,
                config=run_config,
                dir=str(run),
            )

    def write(self, kind: str, step: int, **fields: Any) -> None:
        """One line of `metrics.jsonl` (floats in full repr), and its numbers to the other sinks."""
        if not self._enabled:
            return
        assert self._file is not None and self._tensorboard is not None
        self._file.write(json.dumps({"kind": kind, "step": step, **fields}) + "\n")
        self._file.flush()
        numbers = {
            f"{kind}/{name}": value
            for name, value in fields.items()
            if isinstance(value, (int, float)) and not isinstance(value, bool)
        }
        for name, value in numbers.items():
            self._tensorboard.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(numbers, step=step)

    def event(self, step: int, what: str, **fields: Any) -> None:
        """Something that happened: resume, preempted, skipped checkpoint, non-finite …"""
        self.write("event", step, what=what, **fields)
        self.say(f"step {step}: {what}" + "".join(f" · {key} {value}" for key, value in fields.items()))

    def say(self, line: str) -> None:
        """A line for people."""
        if self._progress is not None:
            self._progress.console.print(line, markup=False, highlight=False, soft_wrap=True)
        elif self._enabled:
            print(line, flush=True)

    def progress(self, step: int) -> None:
        """Move the bar of a terminal; a file gets lines only."""
        if self._progress is not None:
            self._progress.update(self._progress.task_ids[0], completed=step)

    def close(self) -> None:
        if self._progress is not None:
            self._progress.stop()
        for sink in (self._file, self._tensorboard):
            if sink is not None:
                sink.close()
        if self._wandb is not None:
            self._wandb.finish()


def _progress_bar(steps: int) -> Any:
    """rich's progress on a terminal, None elsewhere."""
    if not sys.stdout.isatty():
        return None
    from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn, TimeRemainingColumn

    bar = Progress(
        *Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn()
    )
    bar.add_task("training", total=steps)
    bar.start()
    return bar


def forget_steps_after(run: Path, step: int) -> int:
    """Drop the lines of steps beyond `step`, which a resumed run will write again; returns how many.

    Events stay: they are what happened, not what a step computed.
    """
    path = run / METRICS_FILE
    if not path.is_file():
        return 0
    lines = path.read_text(encoding="utf-8").splitlines()
    kept = [line for line in lines if _survives(line, step)]
    if len(kept) < len(lines):
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
        temporary.replace(path)
    return len(lines) - len(kept)


def _survives(line: str, step: int) -> bool:
    try:
        record = json.loads(line)
        return record["kind"] == "event" or record["step"] <= step
    except (ValueError, KeyError, TypeError):
        return False  # a line cut short by a kill


def train_line(step: int, steps: int, fields: dict[str, Any]) -> str:
    """The log line of a training step."""
    rate = f"{fields['tokens_per_s']:,.0f} tokens/s · {fields['step_time_s']:.2f} s"
    mfu = "" if fields["mfu"] is None else f" ({100 * fields['mfu']:.1f} % MFU)"
    return (
        f"step {step}/{steps} · loss {fields['loss']:.4f} {_by_kind(fields)} · lr {fields['lr']:.3g} · "
        f"grad norm {fields['grad_norm']:.3f} · {rate} · {fields['tflops_per_rank']:.3g} TFLOP/s a "
        f"rank{mfu} · "
        f"{fields['memory_gib']:.2f} GiB"
    )


def eval_line(step: int, fields: dict[str, Any]) -> str:
    """The log line of an evaluation."""
    if fields["loss"] is None:
        return f"eval at step {step} · no targets"
    return (
        f"eval at step {step} · loss {fields['loss']:.4f} {_by_kind(fields)} · accuracy "
        f"{fields['accuracy']:.2%} {_by_kind(fields, 'accuracy', '.2%')} · {fields['tokens']:,} targets"
    )


def _by_kind(fields: dict[str, Any], name: str = "loss", form: str = ".4f") -> str:
    values = ((kind.label, fields[f"{name}_{kind.label}"]) for kind in TargetKind)
    return "[" + " ".join(f"{label} {value:{form}}" for label, value in values if value is not None) + "]"
