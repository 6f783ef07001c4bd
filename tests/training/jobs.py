"""What ranks do in the tests of this folder (module level, so that forked ranks can import it)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np

from usdm_megatron.config import (
    CheckpointConfig,
    DataConfig,
    LoggingConfig,
    LoraConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    RunConfig,
    TrainingConfig,
)
from usdm_megatron.recipes import RecipeName, Task, recipe_fields

TIMEOUT = timedelta(seconds=100)
Row = Sequence[Sequence[int]]


FULL, SELECTIVE = (("recompute_granularity", "full"),), (("recompute_granularity", "selective"),)
OVERLAP = (("overlap_grad_reduce", True), ("overlap_param_gather", True))
NEAR_STAGES = (("use_tp_pp_dp_mapping", True),)


def chunks(text: str) -> tuple[tuple[str, str]]:
    """What every pipeline chunk holds, as `Layout.extra`."""
    return (("pipeline_model_parallel_layout", text),)


@dataclasses.dataclass(frozen=True)
class Layout:
    """A layout to test: `ranks` = tp x pp x dp."""

    tp: int = 1
    pp: int = 1
    dp: int = 1
    sp: bool = False
    vpp: int = 1
    extra: tuple[tuple[str, Any], ...] = ()

    @property
    def ranks(self) -> int:
        return self.tp * self.pp * self.dp

    @property
    def parallel(self) -> ParallelConfig:
        return ParallelConfig(
            tensor_model_parallel_size=self.tp,
            pipeline_model_parallel_size=self.pp,
            num_virtual_stages_per_pipeline_rank=self.vpp,
            sequence_parallel=self.sp,
            distributed_timeout_minutes=1.5,
            **dict(self.extra),
        )

    def __str__(self) -> str:
        extras = "".join(f"-{value if isinstance(value, str) else name}" for name, value in self.extra)
        vpp = f"-vpp{self.vpp}" if self.vpp > 1 else ""
        return f"{self.tp}x{self.pp}x{self.dp}{'-sp' if self.sp else ''}{vpp}{extras}"


def run_config(
    layout: Layout,
    *,
    task: Task = "pretrain",
    recipe: RecipeName = "corrected",
    model: dict[str, Any] | None = None,
    data: dict[str, Any] | None = None,
    optimizer: dict[str, Any] | None = None,
    training: dict[str, Any] | None = None,
    lora: dict[str, Any] | None = None,
    checkpoint: dict[str, Any] | None = None,
) -> RunConfig:
    """A configuration for tests: the recipe's fields, then the given ones; none of the task's defaults."""
    fields = recipe_fields(recipe, task)
    adapters = {"enabled": True, **fields.get("lora", {}), **(lora or {})}
    return RunConfig(
        task=task,
        recipe=recipe,
        model=ModelConfig(**(model or {})),
        parallel=layout.parallel,
        data=DataConfig(**{"seq_length": 64, "global_batch_size": 4, **(data or {})}),
        optimizer=OptimizerConfig(**{"lr": 1e-3, **fields["optimizer"], **(optimizer or {})}),
        training=TrainingConfig(**{**fields["training"], **(training or {})}),
        lora=LoraConfig() if lora is None else LoraConfig(**adapters),
        checkpoint=CheckpointConfig(**(checkpoint or {})),
        logging=LoggingConfig(log_interval=1000),
    )


def train(environment: Any, store: Any, config: RunConfig) -> dict[str, Any]:
    """Run the rank of a training command; returns the exit code and the ledger of rows read, by step."""
    from usdm_megatron.data.loader import MicroBatchLoader
    from usdm_megatron.log import quiet_upstream
    from usdm_megatron.train.run import run_training

    quiet_upstream()
    ledger: dict[int, list[int]] = {}
    original = MicroBatchLoader.step_batches

    def recorded(loader: Any, step: int) -> Any:
        batches = original(loader, step)
        if loader._store.prefix != config.data.valid_data_path:
            ledger[step] = [row for batch in batches for row in batch.row_ids]
        return batches

    MicroBatchLoader.step_batches = recorded
    return {"code": run_training(config, environment, store), "ledger": ledger}


def load_engine(config: RunConfig, checkpoint: Path, groups: Any) -> tuple[Any, Any]:
    """An engine with the weights of a checkpoint directory; returns it and the checkpoint's facts."""
    from usdm_megatron.checkpoint.facts import read_facts
    from usdm_megatron.checkpoint.store import load_sharded
    from usdm_megatron.log import quiet_upstream
    from usdm_megatron.model.attention import resolve_backend
    from usdm_megatron.model.build import weight_dtype
    from usdm_megatron.runtime.process_groups import seed_rank
    from usdm_megatron.train.engine import build_engine

    quiet_upstream()
    seed_rank(config.training.seed, groups.coordinates)
    facts = read_facts(checkpoint)
    asked = config.model.core_attention
    backend = resolve_backend("torch" if asked == "auto" else asked, weight_dtype(config.training.bf16))
    engine = build_engine(config, facts.architecture, facts.vocabulary, groups, backend)
    state = {f"chunk_{index}": model.sharded_state_dict() for index, model in enumerate(engine.models)}
    loaded = load_sharded(checkpoint, {"model": state}, strict="requested", cast=True)
    for index, model in enumerate(engine.models):
        model.load_state_dict(loaded["model"][f"chunk_{index}"])
    engine.optimizer.reload_masters()
    return engine, facts


def batch_of(
    rows: Sequence[Row | None], config: RunConfig, vocabulary: Any, row_ids: Sequence[int] | None = None
) -> Any:
    """One micro-batch of these rows (None: an empty one)."""
    from usdm_megatron.data.batch import build_packed_batch
    from usdm_megatron.data.token_store import PackedRow

    packed = [
        None
        if row is None
        else PackedRow(
            np.concatenate([np.array(s) for s in row]), np.array([len(s) for s in row], dtype=np.int32)
        )
        for row in rows
    ]
    return build_packed_batch(
        packed,
        list(range(len(rows))) if row_ids is None else row_ids,
        seq_length=config.data.seq_length,
        vocabulary=vocabulary,
        train_sample_boundaries=config.training.train_sample_boundaries,
        cross_sample_attention=config.model.cross_sample_attention,
    )


def opened(environment: Any, store: Any, layout: Layout) -> Any:
    from usdm_megatron.layout import ParallelLayout
    from usdm_megatron.runtime.process_groups import open_process_groups

    return open_process_groups(
        ParallelLayout(environment.world_size, layout.tp, layout.pp, layout.vpp, layout.parallel.rank_order),
        environment,
        timeout=TIMEOUT,
        store=store,
    )


def logits(
    environment: Any,
    store: Any,
    layout: Layout,
    checkpoint: Path,
    row_sets: Sequence[Sequence[Row]],
    model: dict[str, Any],
) -> list[Any]:
    """fp32 logits of each set of rows (one micro-batch each), on the ranks of the last stage."""
    import torch

    from usdm_megatron.model.logits import packed_logits
    from usdm_megatron.model.packed_sequence import RopeTable

    length = max(sum(map(len, row)) for rows in row_sets for row in rows)
    config = run_config(layout, model=model, data={"seq_length": length + length % 2})
    with opened(environment, store, layout) as groups:
        engine, facts = load_engine(config, checkpoint, groups)
        for chunk in engine.models:
            chunk.eval()
        batches = [batch_of(rows, config, facts.vocabulary).to(groups.device) for rows in row_sets]
        table = RopeTable(
            facts.architecture.head_dim, facts.architecture.rope_theta, config.data.seq_length, groups.device
        )
        return packed_logits(engine.models, table, batches, facts.vocabulary, torch.float32)


def gradients(
    environment: Any,
    store: Any,
    layout: Layout,
    checkpoint: Path,
    output: Path,
    rows: Sequence[Row | None],
    options: dict[str, Any],
    loss_samples: Sequence[int] | None = None,
    pad_value: float | None = None,
) -> dict[str, float]:
    """One step's gradients in the place of the weights, saved as a checkpoint; returns loss and norm.

    `rows` are the global batch, `options` keyword arguments of `run_config`. `loss_samples`: only these
    samples of each row carry a loss. `pad_value`: put into the padding rows of the vocabulary first.
    """
    import torch

    from usdm_megatron.checkpoint.facts import copy_facts, megatron_common
    from usdm_megatron.checkpoint.store import save_checkpoint
    from usdm_megatron.data.order import RowOrder

    config = run_config(layout, **options)
    with opened(environment, store, layout) as groups:
        engine, facts = load_engine(config, checkpoint, groups)
        if pad_value is not None:
            _fill_padding(engine.models, facts.vocabulary.size, groups, pad_value)
        order = RowOrder(len(rows), len(rows), len(rows), config.data.micro_batch_size, layout.dp)
        micro_batches = []
        for ids in order.rows_of_step(0, groups.coordinates.dp).tolist():
            batch = batch_of([rows[row] for row in ids], config, facts.vocabulary, ids).to(groups.device)
            micro_batches.append(batch if loss_samples is None else _only_samples(batch, loss_samples))
        boundaries = config.training.train_sample_boundaries
        targets = sum(sum(map(len, row)) - (1 if boundaries else len(row)) for row in rows if row is not None)
        step, optimizer = engine.step, engine.optimizer
        result = step.train(micro_batches, optimizer, targets=targets, lr=0.0, stop=lambda: False)
        with torch.no_grad():
            for model in engine.models:
                for parameter in model.parameters():
                    parameter.copy_(_whole_gradient(parameter, engine.optimizer, groups))
        state = {f"chunk_{index}": model.sharded_state_dict() for index, model in enumerate(engine.models)}
        common = megatron_common(facts.hf_config, facts.vocabulary, 1, "fp32")
        save_checkpoint(output, 1, {"model": state}, common, lambda directory: copy_facts(facts, directory))
        return {
            "loss": result.losses.objective,
            "norm": result.gradient_norm,
            "targets": result.losses.targets,
        }


def _whole_gradient(parameter: Any, optimizer: Any, groups: Any) -> Any:
    """The reduced gradient; the distributed optimizer leaves each replica its own part of it."""
    import torch
    import torch.distributed as dist

    if groups.layout.dp == 1:
        return parameter.main_grad
    whole = torch.zeros_like(parameter.main_grad)
    if parameter in optimizer._sharded.model_param_gbuf_map:
        own = optimizer._sharded._get_model_param_range_map(parameter)["param"]
        whole.view(-1)[own.start : own.end] = parameter.main_grad.view(-1)[own.start : own.end]
    dist.all_reduce(whole, group=groups.dp)
    return whole


def _only_samples(batch: Any, samples: Sequence[int]) -> Any:
    """The batch with the loss taken off every segment that is not one of `samples`."""
    mask = batch.loss_mask.clone()
    start = 0
    for index, length in enumerate(batch.segment_lengths):
        if index not in samples:
            mask[:, start : start + length] = False
        start += length
    return dataclasses.replace(batch, loss_mask=mask)


def _fill_padding(models: Sequence[Any], size: int, groups: Any, value: float) -> None:
    """Write `value` into the vocabulary's padding rows of this rank's shards, masters included."""
    for model in models:
        for name, parameter in model.named_parameters():
            if name in ("embedding.word_embeddings.weight", "output_layer.weight"):
                first = groups.coordinates.tp * parameter.size(0)
                parameter.data[max(0, size - first) :] = value
