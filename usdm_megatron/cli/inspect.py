"""`usdm-megatron inspect store | step | checkpoint | env`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

from usdm_megatron.errors import ConfigError

if TYPE_CHECKING:
    from usdm_megatron.checkpoint.adapter_facts import AdapterFacts
    from usdm_megatron.data.blend import TrainRows


@dataclass(frozen=True)
class StepFlags:
    """Print the rows that a step reads on every data parallel rank."""

    step: tyro.conf.Positional[int]
    """The step, counted from 1 as in metrics.jsonl."""
    config: Path
    """RUN/run_config.yaml, or any --config file."""
    world_size: int | None = None
    """Ranks of the run (default: one data parallel rank)."""


@dataclass(frozen=True)
class CheckpointFlags:
    """Print what a checkpoint holds, after comparing every byte with its checksums."""

    directory: tyro.conf.Positional[Path]
    """A run, a converted model, or one checkpoint directory."""


def main(argv: Sequence[str]) -> int | None:
    """Dispatch to the thing that is looked into."""
    things: dict[str, Callable[[Sequence[str]], int | None]] = {
        "store": _store,
        "step": _step,
        "checkpoint": _checkpoint,
        "env": _environment,
    }
    if not argv or argv[0] not in things:
        asked = f"{argv[0]!r} is not one of them" if argv else "one is missing"
        raise ConfigError(f"usdm-megatron inspect store | step | checkpoint | env: {asked}")
    return things[argv[0]](argv[1:])


def _store(argv: Sequence[str]) -> int | None:
    from usdm_megatron.cli.inspect_store import main as inspect_store

    return inspect_store(argv)


def _step(argv: Sequence[str]) -> None:
    from usdm_megatron.config_file import load_config
    from usdm_megatron.data.blend import shares_of
    from usdm_megatron.data.order import rows_by_dp_rank
    from usdm_megatron.train.preflight import build_layout, build_order, open_stores

    flags = tyro.cli(StepFlags, args=list(argv), prog="usdm-megatron inspect step")
    config = load_config(flags.config)
    parallel = config.parallel
    ranks = flags.world_size or parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size
    store, _ = open_stores(config)
    order = build_order(config, build_layout(config, ranks), store.rows)
    if not 1 <= flags.step <= order.steps:
        raise ConfigError(f"inspect step: {flags.step} is not one of this run's steps, 1 to {order.steps}")
    for number, share in enumerate(shares_of(store), start=1):
        print(f"store {number}: {share}")
    for rank, rows in rows_by_dp_rank(order, flags.step - 1).items():
        print(f"dp rank {rank}: {' '.join(_row_name(store, row) for row in rows) or '(no rows)'}")


def _row_name(source: TrainRows, row_id: int) -> str:
    """The row's number; in a blend `number=store:row`, stores counted from 1."""
    from usdm_megatron.data.blend import Blend

    if not isinstance(source, Blend):
        return str(row_id)
    place = source.place(row_id)
    return f"{row_id}={place.store + 1}:{place.row}"


def _checkpoint(argv: Sequence[str]) -> None:
    from usdm_megatron.checkpoint.adapter_facts import read_adapter_facts
    from usdm_megatron.checkpoint.facts import read_facts
    from usdm_megatron.checkpoint.resolve import list_steps, resolve_checkpoint

    flags = tyro.cli(CheckpointFlags, args=list(argv), prog="usdm-megatron inspect checkpoint")
    resolved = resolve_checkpoint(flags.directory, fallback=False)
    facts = read_facts(resolved.path)
    model = facts.architecture
    size = sum(path.stat().st_size for path in resolved.path.rglob("*") if path.is_file())
    print(
        f"{resolved.path}: {facts.kind}, every byte matches integrity.json\n"
        f"  model        {model.layers} layers, hidden {model.hidden}, {model.heads} heads in "
        f"{model.kv_heads} groups, "
        f"window {model.sliding_window}\n"
        f"  vocabulary   {facts.vocabulary.size:,} ids ({facts.vocabulary.unit_count:,} speech units), "
        f"{facts.vocabulary.padded_size:,} rows with padding\n"
        f"  tokenizer    {facts.tokenizer_sha256 or 'none'}\n"
        f"  size         {size / 2**20:,.1f} MiB"
    )
    if (adapter := read_adapter_facts(resolved.path)) is not None:
        print(_describe_adapter(adapter))
    if steps := list_steps(flags.directory):
        print(f"  steps        {' '.join(map(str, steps))}")


def _describe_adapter(adapter: AdapterFacts) -> str:
    from usdm_megatron.lora_spec import TARGETS

    spec = adapter.spec
    targets = " ".join(target for target in TARGETS if target in spec.targets)
    rows = "trained too" if spec.train_new_embeddings else "of the base"
    return (
        f"  adapter      LoRA: r {spec.r}, alpha {spec.alpha:g}, dropout {spec.dropout:g}, on {targets}\n"
        f"  speech rows  {rows}\n"
        f"  base         {adapter.base_directory}\n"
        f"               its integrity.json has sha256 {adapter.base_sha256}"
    )


def _environment(argv: Sequence[str]) -> int:
    from usdm_megatron.cli.inspect_env import main as inspect_environment

    return inspect_environment(argv)
