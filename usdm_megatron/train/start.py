"""Where a run's weights come from: a run to continue, or weights to start with."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from usdm_megatron.checkpoint.resolve import ResolvedCheckpoint, has_checkpoint, resolve_checkpoint
from usdm_megatron.config import CheckpointConfig, RunConfig
from usdm_megatron.config_file import load_config
from usdm_megatron.errors import CheckpointError, ConfigError
from usdm_megatron.recipes import Task
from usdm_megatron.train.lora_start import LoraStart, find_lora_start

RUN_CONFIG_FILE = "run_config.yaml"
STATE_FILE = "train_state.json"

# What may differ between the checkpoint and the run that continues it: layout, micro-batch, duration (and
# lr_decay_iters, which belongs to it), intervals, logging, kernels. Everything else decides the numbers or
# the order of the rows.
_FIXED_ON_RESUME: dict[str, tuple[str, ...]] = {
    "model": ("cross_sample_attention",),
    "data": ("seq_length", "global_batch_size", "shuffle"),
    "optimizer": ("lr", "min_lr", "lr_decay_style", "lr_warmup_fraction", "lr_warmup_iters", "weight_decay",
                  "decay_norms", "clip_grad", "adam_beta1", "adam_beta2", "adam_eps"),
    "training": ("seed", "bf16", "train_sample_boundaries", "loss_reduction"),
    "lora": ("enabled",),  # the rest of it is compared with the adapter itself
}  # fmt: skip


@dataclass(frozen=True)
class TrainState:
    """What a run's checkpoint knows besides tensors (`train_state.json`)."""

    task: Task
    step: int  # completed steps
    consumed_rows: int
    train_store: str  # identity of the token store, or of the blend
    layout: dict[str, Any]  # the `ParallelLayout` that wrote it: its RNG states belong to these ranks
    best_loss: float | None = None  # lowest evaluation loss so far
    best_step: int | None = None

    def write(self, directory: Path) -> None:
        (directory / STATE_FILE).write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, directory: Path) -> TrainState:
        """Raises `CheckpointError` where the file is missing or not ours."""
        try:
            return cls(**json.loads((directory / STATE_FILE).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise CheckpointError(f"{directory / STATE_FILE} cannot be read: {error}") from error


@dataclass(frozen=True)
class StartPoint:
    """The checkpoint that a run begins from; `state` only when it continues a run, `lora` only with LoRA."""

    checkpoint: ResolvedCheckpoint
    state: TrainState | None
    lora: LoraStart | None = None

    @property
    def directory(self) -> Path:
        return self.checkpoint.path

    @property
    def step(self) -> int:
        return self.state.step if self.state else 0


def find_start(config: RunConfig) -> StartPoint:
    """Resolve `--load` / `--pretrained-checkpoint`; reads every byte of the chosen checkpoint.

    With LoRA it may hold whole weights, which become the base, or an adapter, which trains on over the base
    that it records: the checkpoint itself, or wherever `--pretrained-checkpoint` has it.
    Raises `CheckpointError` or `ConfigError` when there is nothing to start from, or what is there
    belongs to another run.
    """
    start = _find_checkpoint(config)
    return replace(start, lora=find_lora_start(config, start.directory, resumes=start.state is not None))


def _find_checkpoint(config: RunConfig) -> StartPoint:
    checkpoint = config.checkpoint
    check_save_directory(checkpoint)
    if checkpoint.load is not None and has_checkpoint(Path(checkpoint.load)):
        # beside --pretrained-checkpoint the step is one of its steps: a restart takes this run's newest
        step = None if checkpoint.pretrained_checkpoint else checkpoint.ckpt_step
        resolved = resolve_checkpoint(Path(checkpoint.load), step, fallback=True)
        if not (resolved.path / STATE_FILE).is_file():
            return StartPoint(resolved, None)  # a converted checkpoint: weights, step 0
        state = TrainState.read(resolved.path)
        check_resumable(config, resolved.path, state)
        return StartPoint(resolved, state)
    if checkpoint.load is not None and (
        checkpoint.exit_on_missing_checkpoint or not checkpoint.pretrained_checkpoint
    ):
        raise CheckpointError(
            f"checkpoint: --load {checkpoint.load} holds no checkpoint; "
            + (
                "drop --exit-on-missing-checkpoint to start afresh"
                if checkpoint.pretrained_checkpoint
                else "name weights to start from with --pretrained-checkpoint"
            )
        )
    if checkpoint.pretrained_checkpoint is None:
        raise ConfigError(
            "checkpoint: there are no weights to start from; give --pretrained-checkpoint CK "
            "(python tools/convert_hf_checkpoint.py import … makes one) or --load RUN"
        )
    path = Path(checkpoint.pretrained_checkpoint)
    if not has_checkpoint(path):
        raise CheckpointError(
            f"checkpoint: --pretrained-checkpoint {path} "
            + ("holds no checkpoint" if path.is_dir() else "is not a directory")
            + "; name a run or a converted model (python tools/convert_hf_checkpoint.py import … makes one)"
        )
    return StartPoint(resolve_checkpoint(path, checkpoint.ckpt_step, fallback=False), None)


def check_save_directory(checkpoint: CheckpointConfig) -> None:
    """Refuse `--save` into a directory that holds another run, or a converted model."""
    if checkpoint.save is None:
        raise ConfigError("checkpoint: --save is missing; name the run directory to write to")
    save = Path(checkpoint.save)
    for path in (save, *save.parents):
        if path.exists():
            if not path.is_dir():
                raise ConfigError(f"checkpoint: --save {save}: {path} is a file; name a directory")
            break
    if (save / "release").exists():
        raise ConfigError(f"checkpoint: --save {save} holds a converted model; name another directory")
    holds_run = (save / RUN_CONFIG_FILE).exists() or has_checkpoint(save)
    continues = checkpoint.load is not None and Path(checkpoint.load).resolve() == save.resolve()
    if holds_run and not continues:
        raise ConfigError(
            f"checkpoint: --save {save} holds another run; name a fresh directory, "
            f"or continue that run with --load {save}"
        )


def check_resumable(config: RunConfig, directory: Path, state: TrainState) -> None:
    """Refuse to continue a run of another task or under other numbers, field by field."""
    if state.task != config.task:
        raise CheckpointError(
            f"{directory} is a {state.task} run and this is {config.task}; start from its weights with "
            f"--pretrained-checkpoint {directory}"
        )
    saved = load_config(directory / RUN_CONFIG_FILE)
    problems = [
        f"resume: {section}.{field} was {before!r} in {directory} and is {now!r} now; keep it, "
        f"or start a new run with --pretrained-checkpoint"
        for section, fields in _FIXED_ON_RESUME.items()
        for field in fields
        if (before := _get(saved, section, field)) != (now := _get(config, section, field))
    ]
    if problems:
        raise ConfigError(*problems)


def _get(config: RunConfig, section: str, field: str) -> Any:
    return getattr(getattr(config, section), field)
