"""The contestants of `sft.py`, each in a process of its own that trains when it is its turn.

Ours is `run_training`, the peer transformers' `Trainer`, both as a user calls them. A turn is one round of
their loop: from where a step begins to where the next does, data, update, bookkeeping and all.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

from sft_inputs import ADAPTER_FILE, ADAPTER_SEED, IGNORED, Shape, make_dialogs

Form = Literal["ours", "padded", "flattened"]
Precision = Literal["fp32", "bf16"]


@dataclass(frozen=True)
class Job:
    """What one process trains; the inputs lie in `directory` (`sft.prepare`)."""

    form: Form
    targets: tuple[str, ...]  # of LoRA; none: all weights train
    precision: Precision
    autocast: (
        bool  # of the peer in bf16: fp32 weights (a LoRA's base excepted) under autocast, else bf16 ones
    )
    threads: int
    steps: int
    micro_batch: int
    global_batch: int
    r: int
    alpha: int
    dropout: float
    lr: float
    shape: Shape
    directory: Path

    @property
    def rows(self) -> int:
        return (self.steps + 1) * self.global_batch


@dataclass(frozen=True)
class Facts:
    """What a contestant trains, and what its optimizer holds beside the weights, in bytes."""

    trainable_parameters: int
    optimizer_bytes: int


@dataclass(frozen=True)
class Turn:
    """One step; `compute_s` is forward, backward and optimizer, the rest of `wall_s` is the trainer's."""

    wall_s: float
    cpu_s: float
    compute_s: float
    loss: float
    facts: Facts


class Turns:
    """A contestant's side of the pipe."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._began_at: tuple[float, float] | None = None
        self._compute_s = 0.0
        self.loss = 0.0
        self.facts = Facts(0, 0)

    def ready(self) -> None:
        """Imports are done; wait to be told to begin."""
        self._connection.send("imported")
        self._connection.recv()

    def next(self, facts: Callable[[], Facts]) -> None:
        """A step begins: tell how the one before went, and wait for the turn."""
        if self._began_at is not None:
            wall_s, cpu_s = (now - then for now, then in zip(_clocks(), self._began_at, strict=True))
            self._connection.send(Turn(wall_s, cpu_s, self._compute_s, self.loss, facts()))
        else:
            self._connection.send("loaded")
        self._connection.recv()
        self._compute_s = self.loss = 0.0
        self._began_at = _clocks()

    def computing(self, function: Callable[..., Any], sign: int = 1) -> Callable[..., Any]:
        """`function`, whose time counts as forward, backward or optimizer (or, with -1, does not)."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            started_at = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self._compute_s += sign * (time.perf_counter() - started_at)

        return timed


def _clocks() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


def contestant_main(connection: Connection, job: Job) -> None:
    """Body of a contestant's process; it ends with the one that gives the turns."""
    os.environ["OMP_NUM_THREADS"] = str(job.threads)
    import torch

    torch.set_num_threads(job.threads)
    turns = Turns(connection)
    train = _ours if job.form == "ours" else _peer
    gone = contextlib.suppress(EOFError, BrokenPipeError)  # whoever gives the turns: then there are no more
    with (
        gone,
        open(os.devnull, "w") as nowhere,
        contextlib.redirect_stdout(nowhere),
    ):  # they report as they go
        train(job, turns)


def _ours(job: Job, turns: Turns) -> None:
    from usdm_megatron.log import quiet_upstream

    quiet_upstream()
    from usdm_megatron.model.build import parameter_count
    from usdm_megatron.runtime.ranks import RankEnvironment
    from usdm_megatron.train.loop import Loop
    from usdm_megatron.train.run import run_training
    from usdm_megatron.train.step import LossRecord

    turns.ready()
    original = Loop._train_step
    begun = False

    def facts(loop: Any) -> Facts:
        chunks = loop.step._bare_chunks
        masters = 0 if job.precision == "bf16" else 4  # in fp32 they are the weights
        trainable = parameter_count(chunks, trainable=True)
        return Facts(trainable, loop.optimizer.state_bytes() - masters * trainable)

    def train_step(loop: Any, step: int, stop: Any) -> Any:
        nonlocal begun
        if not begun:
            begun = True
            _time(turns, loop.step, "_run_schedule")
            _time(turns, loop.optimizer, "zero_grad", "collect_gradients", "update")
            for chunk in loop.step._chunks:
                _time(turns, chunk, "zero_grad_buffer")
            _time(turns, LossRecord, "of_tokens", sign=-1)
        turns.next(lambda: facts(loop))
        result = original(loop, step, stop)
        turns.loss = result[0].losses.objective
        return result

    Loop._train_step = train_step  # type: ignore[assignment,method-assign]  # to time it
    run_training(_config(job), RankEnvironment())


def _config(job: Job) -> Any:
    from usdm_megatron.config import (
        CheckpointConfig,
        DataConfig,
        LoggingConfig,
        LoraConfig,
        OptimizerConfig,
        RunConfig,
        TrainingConfig,
    )

    return RunConfig(
        task="sft",
        data=DataConfig(
            train_data_path=(str(job.directory / "dialogs"),),
            seq_length=8192,
            row_padding="step",
            micro_batch_size=job.micro_batch,
            global_batch_size=job.global_batch,
        ),
        optimizer=OptimizerConfig(lr=job.lr, lr_decay_style="constant", lr_warmup_iters=0),
        training=TrainingConfig(train_iters=job.steps + 1, bf16=job.precision == "bf16", seed=ADAPTER_SEED),
        lora=LoraConfig(
            enabled=bool(job.targets),
            r=job.r,
            alpha=job.alpha,
            dropout=job.dropout,
            target_modules=job.targets or ("q_proj",),
            train_new_embeddings=False,
        ),
        checkpoint=CheckpointConfig(
            save=str(job.directory / f"run-{os.getpid()}"),
            pretrained_checkpoint=str(job.directory / "checkpoint"),
        ),
        logging=LoggingConfig(),
    )


def _time(turns: Turns, owner: Any, *names: str, sign: int = 1) -> None:
    for name in names:
        setattr(owner, name, turns.computing(getattr(owner, name), sign))


def _peer(job: Job, turns: Turns) -> None:
    import peft
    import transformers
    from transformers import Trainer, TrainerCallback

    del peft  # imported before memory is counted
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    turns.ready()
    model = _peer_model(job)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]

    class TurnTaking(TrainerCallback):
        begun = False

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            optimizer = kwargs["optimizer"].optimizer
            if not self.begun:
                self.begun = True
                _time(turns, trainer, "_clip_grad_norm")
                _time(turns, optimizer, "step")
                _time(turns, model, "zero_grad")
            turns.next(lambda: Facts(sum(p.numel() for p in trainable), _state_bytes(optimizer)))

    class TimedTrainer(Trainer):
        def training_step(self, *args: Any, **kwargs: Any) -> Any:
            loss = turns.computing(super().training_step)(*args, **kwargs)
            turns.loss += loss.item()
            return loss

    trainer = TimedTrainer(
        model=model,
        args=_training_arguments(job),
        train_dataset=_rows(job),
        data_collator=_collator(job),
        callbacks=[TurnTaking()],
    )
    trainer.train()


def _training_arguments(job: Job) -> Any:
    from transformers import TrainingArguments

    return TrainingArguments(
        output_dir=str(job.directory / f"peer-{os.getpid()}"),
        use_cpu=True,
        bf16=job.precision == "bf16" and job.autocast,
        per_device_train_batch_size=job.micro_batch,
        gradient_accumulation_steps=job.global_batch // job.micro_batch,
        max_steps=job.steps + 1,
        train_sampling_strategy="sequential",
        learning_rate=job.lr,
        lr_scheduler_type="constant",
        weight_decay=0.01,
        adam_beta1=0.9,
        adam_beta2=0.95,
        adam_epsilon=1e-8,
        max_grad_norm=1.0,
        remove_unused_columns=False,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        seed=ADAPTER_SEED,
    )


def _peer_model(job: Job) -> Any:
    import torch
    import transformers

    narrow = job.precision == "bf16" and (bool(job.targets) or not job.autocast)
    dtype = torch.bfloat16 if narrow else torch.float32
    keyword = "torch_dtype" if transformers.__version__.startswith("4.") else "dtype"
    model = transformers.MistralForCausalLM.from_pretrained(job.directory / "hf", **{keyword: dtype})
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()  # out of the file's pages, which count as nobody's memory
    return _with_adapters(job, model) if job.targets else model


def _with_adapters(job: Job, model: Any) -> Any:
    """PEFT's, each A as ours draws it."""
    import torch
    from peft import LoraConfig, get_peft_model
    from safetensors.torch import load_file

    first_a = load_file(job.directory / ADAPTER_FILE)
    spec = LoraConfig(
        r=job.r, lora_alpha=job.alpha, lora_dropout=job.dropout, target_modules=list(job.targets)
    )
    model = get_peft_model(model, spec)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_A" in name:
                parameter.copy_(first_a[name.replace(".default", "")])
    return model


def _state_bytes(optimizer: Any) -> int:
    return sum(
        tensor.numel() * tensor.element_size()
        for entry in optimizer.state.values()
        for tensor in entry.values()
    )


def _rows(job: Job) -> list[dict[str, list[int]]]:
    dialogs = make_dialogs(job.rows, job.shape.vocabulary)
    pairs = zip(dialogs.ids, dialogs.labels, strict=True)
    return [{"input_ids": ids.tolist(), "labels": labels.tolist()} for ids, labels in pairs]


def _collator(job: Job) -> Callable[[Sequence[dict[str, list[int]]]], Any]:
    """As the original pads, to the longest of a micro-batch; or transformers' own way without padding."""
    import torch
    from torch.nn.utils.rnn import pad_sequence
    from transformers import DataCollatorWithFlattening

    if job.form == "flattened":
        return DataCollatorWithFlattening()
    pad = job.shape.vocabulary.pad_id

    def padded(rows: Sequence[dict[str, list[int]]]) -> dict[str, Any]:
        ids, labels = (
            pad_sequence([torch.tensor(row[name]) for row in rows], batch_first=True, padding_value=value)
            for name, value in (("input_ids", pad), ("labels", IGNORED))
        )
        return {"input_ids": ids, "labels": labels, "attention_mask": ids.ne(pad).long()}

    return padded
