"""Everything about a run that can be checked and decided before its first step, without ranks."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass

from usdm_megatron.architecture import HFArchitecture
from usdm_megatron.checkpoint.facts import CheckpointFacts, read_facts
from usdm_megatron.config import CoreAttention, RunConfig
from usdm_megatron.data.blend import Blend, TrainRows, open_rows, stores_of
from usdm_megatron.data.loader import check_store_fits
from usdm_megatron.data.order import RowOrder, rows_of_steps
from usdm_megatron.data.token_store import TokenStore
from usdm_megatron.errors import CheckpointError, ConfigError, DataError
from usdm_megatron.layout import ParallelLayout
from usdm_megatron.model.lora.names import highest_rank
from usdm_megatron.pipeline_stages import layout_chunks
from usdm_megatron.recipes import Task
from usdm_megatron.runtime.deterministic import determinism_problems
from usdm_megatron.train.schedule import Schedule, build_schedule
from usdm_megatron.train.start import StartPoint


@dataclass(frozen=True)
class RunPlan:
    """A run whose every input has been opened and checked against every other."""

    config: RunConfig
    layout: ParallelLayout
    start: StartPoint
    facts: CheckpointFacts
    architecture: HFArchitecture
    train_store: TrainRows
    order: RowOrder
    valid_store: TokenStore | None
    valid_order: RowOrder | None
    schedule: Schedule
    backend: CoreAttention

    @property
    def steps(self) -> int:
        """Steps of the whole run."""
        return self.order.steps

    @property
    def micro_batches(self) -> int:
        return self.order.micro_batches


def build_layout(config: RunConfig, world_size: int) -> ParallelLayout:
    """The layout of this configuration; raises `ConfigError` with all that does not divide."""
    parallel = config.parallel
    layout = ParallelLayout(
        world_size,
        tp=parallel.tensor_model_parallel_size,
        pp=parallel.pipeline_model_parallel_size,
        vpp=parallel.num_virtual_stages_per_pipeline_rank,
        order=parallel.rank_order,
    )
    problems = layout.problems_with_batch(config.data.global_batch_size, config.data.micro_batch_size)
    if problems:
        raise ConfigError(*problems)
    return layout


def open_stores(config: RunConfig) -> tuple[TrainRows, TokenStore | None]:
    """Open `--train-data-path` and `--valid-data-path`."""
    if not (parts := config.data.train_stores):
        raise ConfigError(
            "data: --train-data-path is missing; give the prefix of a packed token store "
            "(python tools/preprocess_data.py … makes one)"
        )
    valid = config.data.valid_data_path
    train = open_rows([part.prefix for part in parts], [part.weight for part in parts])
    return train, None if valid is None else TokenStore.open(valid)


def plan_run(config: RunConfig, layout: ParallelLayout, start: StartPoint) -> RunPlan:
    """Open the stores, hold everything against everything; raises one error with all problems found."""
    from usdm_megatron.model.architecture import build_transformer_config, layout_problems
    from usdm_megatron.model.attention import resolve_backend
    from usdm_megatron.model.build import weight_dtype

    facts = read_facts(start.directory)
    architecture = HFArchitecture.from_hf_config(facts.hf_config)
    train_store, valid_store = open_stores(config)
    problems = layout_problems(architecture, facts.vocabulary.padded_size, config.parallel)
    problems += _machine_problems(config)
    problems += _lora_problems(config, facts)
    if config.data.seq_length > architecture.max_positions:
        problems.append(
            f"data: seq_length {config.data.seq_length} exceeds the model's "
            f"{architecture.max_positions} positions "
            f"(max_position_embeddings); lower --seq-length"
        )
    if config.checkpoint.keep_best and valid_store is None:
        problems.append("checkpoint: --keep-best compares evaluation losses; give --valid-data-path")
    if config.logging.wandb_project is not None and not importlib.util.find_spec("wandb"):
        problems.append(
            "logging: --wandb-project is given and wandb is not installed; pip install usdm-megatron[wandb]"
        )
    for store in filter(None, (*stores_of(train_store), valid_store)):
        problems += _store_problems(store, config, facts)
        problems += _target_problems(store, config.task)
    if config.task == "sft" and config.recipe == "usdm":
        problems += _packing_problems(train_store)
    if problems:
        raise ConfigError(*problems)
    # what core itself refuses (recomputation, mostly): now, not when the ranks build the model
    build_transformer_config(architecture, config.parallel, dtype=weight_dtype(config.training.bf16))
    order = build_order(config, layout, train_store.rows)
    schedule = build_schedule(config.optimizer, order.steps)
    if config.optimizer.lr_warmup_iters is not None and schedule.warmup_steps >= schedule.decay_steps:
        raise ConfigError(
            f"optimizer: lr_warmup_iters {schedule.warmup_steps} leaves nothing of {schedule.decay_steps} "
            "steps that the learning rate runs over; lower it, or raise --lr-decay-iters or the duration"
        )
    _check_position(start, order, train_store)
    return RunPlan(
        config=config,
        layout=layout,
        start=start,
        facts=facts,
        architecture=architecture,
        train_store=train_store,
        order=order,
        valid_store=valid_store,
        valid_order=None if valid_store is None else build_valid_order(config, layout, valid_store.rows),
        schedule=schedule,
        backend=resolve_backend(config.model.core_attention, weight_dtype(config.training.bf16)),
    )


def build_order(config: RunConfig, layout: ParallelLayout, store_rows: int) -> RowOrder:
    """The order of a run over a store of `store_rows`; more steps than rows need epochs to be asked for."""
    training, data = config.training, config.data
    epochs = training.num_train_epochs
    total = store_rows * (epochs or 1)
    if training.train_iters is not None:
        total = rows_of_steps(store_rows, data.global_batch_size, training.train_iters)
    if training.train_samples is not None:
        total = training.train_samples
    if epochs is None and total > store_rows:
        wanted = (
            f"--train-iters {training.train_iters} x --global-batch-size {data.global_batch_size}"
            if training.train_iters is not None
            else f"--train-samples {training.train_samples}"
        )
        raise ConfigError(
            f"training: {wanted} needs more rows than the {store_rows} of "
            f"{' '.join(data.train_data_path or ())}; "
            f"use --num-train-epochs E to read them more than once"
        )
    return RowOrder(
        store_rows=store_rows,
        total_rows=total,
        global_batch_size=data.global_batch_size,
        micro_batch_size=data.micro_batch_size,
        dp_size=layout.dp,
        shuffle=data.shuffle,
        seed=training.seed,
    )


def build_valid_order(config: RunConfig, layout: ParallelLayout, store_rows: int) -> RowOrder:
    """Every row once, in order; a batch no larger than the store needs, the rest empty rows."""
    rows = config.data.micro_batch_size * layout.dp * (layout.pp if layout.vpp > 1 else 1)
    return RowOrder(
        store_rows=store_rows,
        total_rows=store_rows,
        global_batch_size=min(config.data.global_batch_size, -(-store_rows // rows) * rows),
        micro_batch_size=config.data.micro_batch_size,
        dp_size=layout.dp,
    )


def _lora_problems(config: RunConfig, facts: CheckpointFacts) -> list[str]:
    """What leaves adapters nothing to train, and those that are larger than what they adapt."""
    spec = config.lora.spec
    if spec is None:
        return []
    problems = []
    if spec.r > (highest := highest_rank(spec.targets, facts.architecture)):
        problems.append(
            f"lora: r is {spec.r}; no change of {' '.join(sorted(spec.targets))} in {facts.directory} has a "
            f"rank above {highest}, its smaller side; set --lora-r to {highest} or less"
        )
    if spec.train_new_embeddings and not facts.vocabulary.has_speech:
        problems.append(
            f"lora: {facts.directory} has no speech ids whose rows could train; extend its vocabulary "
            "when it is converted (import --extend-vocab usdm), or give --no-train-new-embeddings"
        )
    text = config.parallel.pipeline_model_parallel_layout
    pp = config.parallel.pipeline_model_parallel_size
    chunks = () if text is None else layout_chunks(text)
    problems += [
        f"lora: stage {stage} of --pipeline-model-parallel-layout {text} holds no layer, so nothing trains "
        "there; give every stage one"
        for stage in range(pp if chunks else 0)
        if not any("t" in chunk for chunk in chunks[stage::pp])
    ]
    return problems


def _machine_problems(config: RunConfig) -> list[str]:
    """What this configuration needs of the machine and does not find here."""
    import torch

    problems = determinism_problems(os.environ) if config.training.deterministic_mode else []
    missing = (
        "there is no CUDA here"
        if not torch.cuda.is_available()
        else "it is not installed"
        if not importlib.util.find_spec("transformer_engine")
        else None
    )
    if config.optimizer.use_precision_aware_optimizer and missing:
        asked = "--use-precision-aware-optimizer" + (
            " (with --optimizer-cpu-offload)" if config.optimizer.optimizer_cpu_offload else ""
        )
        problems.append(
            f"optimizer: {asked} needs CUDA and transformer-engine >= 2.9, whose Adam it is, and {missing}; "
            "drop it"
        )
    return problems


def _store_problems(store: TokenStore, config: RunConfig, facts: CheckpointFacts) -> list[str]:
    problems: list[str] = []
    try:
        check_store_fits(store, seq_length=config.data.seq_length, vocabulary=facts.vocabulary)
    except DataError as error:
        problems += error.problems
    recorded, own = store.summary.tokenizer_sha256, facts.tokenizer_sha256
    if recorded is not None and own is not None and recorded != own:
        problems.append(
            f"{store.prefix}: was made with another tokenizer (sha256 {recorded[:12]}…) than the "
            "checkpoint's "
            f"({own[:12]}…); preprocess with the checkpoint's tokenizer/"
        )
    return problems


def _target_problems(store: TokenStore, task: Task) -> list[str]:
    """Whether the loss mask of `store`, or its absence, is what `task` trains on."""
    mask, prefix = store.summary.loss_mask, store.prefix
    if task == "pretrain" and mask is not None:
        return [
            f"{prefix}: comes with a loss mask, as dialogs do, and pretrain trains on every token; "
            "fine-tune on it with usdm-megatron sft"
        ]
    if task == "sft" and mask is None:
        return [
            f"{prefix}: has no loss mask, so the instruction and the user's speech would be trained on too; "
            "make the store with python tools/preprocess_data.py dialog (or sft), or train with "
            "usdm-megatron pretrain"
        ]
    if mask is not None and mask.targets == 0:
        return [
            f"{prefix}: not one of its {store.tokens:,} tokens is a target, so an epoch of it is empty; "
            "preprocess again, with labels other than -100"
        ]
    return []


def _packing_problems(rows: TrainRows) -> list[str]:
    """Where a row is not one dialog, as the original's rows are."""
    return [
        f"{store.prefix}: packs {store.summary.samples:,} dialogs into {store.rows:,} rows, and --recipe "
        "usdm counts a batch in dialogs, one a row; preprocess with --packing none, or set what you want of "
        "the recipe by its own flags under --recipe corrected"
        for store in stores_of(rows)
        if store.summary.samples > store.rows
    ]


def _check_position(start: StartPoint, order: RowOrder, store: TrainRows) -> None:
    state = start.state
    if state is None:
        return
    if state.train_store != store.identity:
        kind = "blend" if isinstance(store, Blend) else "token store"
        raise CheckpointError(
            f"resume: {start.directory} was trained on another {kind} than {store.prefix}; "
            "give that one, "
            f"or start a new run from these weights with --pretrained-checkpoint {start.directory}"
        )
    if state.step > order.steps:
        raise ConfigError(
            f"training: {start.directory} has completed {state.step} steps, more than the "
            f"{order.steps} asked for; "
            f"raise --train-iters, --train-samples or --num-train-epochs"
        )
    if order.step_of_consumed(min(state.consumed_rows, order.total_rows)) != state.step:
        raise CheckpointError(
            f"resume: {start.directory} consumed {state.consumed_rows} rows in {state.step} steps, "
            "which is not "
            f"where this order stands; keep --global-batch-size"
        )
