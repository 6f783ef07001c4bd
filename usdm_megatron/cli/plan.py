"""`usdm-megatron plan`: will it fit, how fast will it be, on which layout, before a GPU is booked."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from usdm_megatron.config import CoreAttention, DataConfig
from usdm_megatron.config_checks import below_one
from usdm_megatron.errors import EXIT_DONE, ConfigError

if TYPE_CHECKING:
    from usdm_megatron.data.blend import TrainRows
    from usdm_megatron.plan.search import PlannedLayout, PlanRequest

# flags whose value may be left out, and what that means
_BARE = {"--explain": "1", "--json": "-", "--emit-script": "-", "--simulate": "all", "--bf16": "True"}
_NEGATED = {"--no-bf16": ("--bf16", "False")}  # of flags that may be unset


@dataclass(frozen=True, kw_only=True)
class PlanFlags:
    """Rank every layout of a model on a cluster: memory, step time, communication, MFU."""

    model: str = "mistral-7b"
    """Preset mistral-7b, a checkpoint or run, or a Hugging Face directory."""
    gpu: str = "a100-40gb"
    """a100-40gb, a100-80gb, h100, h200, or a YAML file (written by --calibrate, or by hand)."""
    world_size: int = 512
    """GPUs in all."""
    seq_length: int = 8192
    """Tokens of a row."""
    global_batch_size: int = 1024
    """Rows in one optimizer step, over all GPUs."""
    micro_batch_size: int = 1
    """Rows in one forward pass."""
    data_path: Annotated[
        tuple[str, ...] | None, tyro.conf.arg(aliases=("--train-data-path",), metavar="[WEIGHT] PREFIX …")
    ] = None
    """Token store, or a blend: attention over its samples as packed, and days for its rows."""
    sequence_parallel: bool = True
    """Shard norms and residuals over tensor parallel ranks."""
    accumulate_allreduce_grads_in_fp32: bool = True
    """Gradients in fp32; off: in bf16."""
    bf16: bool | None = None
    """bf16 weights and activations (default: as the rates of --gpu, of which a GPU's are of bf16)."""
    core_attention: CoreAttention = "auto"
    """Attention kernel of the run that --simulate, --emit-script and --calibrate are about."""
    memory_budget_gib: float | None = None
    """Memory that a rank may use (default: the GPU's, without context, NCCL and fragmentation)."""
    top: int = 12
    """Layouts in the table."""
    layout: str = "1"
    """The one that --explain and --emit-script are about: its rank, or tp=2,pp=2,vpp=8,recompute=mlp."""
    explain: str | None = None
    """Print the arithmetic of one layout instead (its rank, or as --layout; alone: --layout)."""
    json: str | None = None
    """Write all layouts as JSON to this file (alone, or -: to standard output, instead of the table)."""
    emit_script: str | None = None
    """Write the launch script of the chosen layout to this file (alone, or -: to standard output)."""
    simulate: str | None = None
    """Build this rank of --layout for real, without memory (alone, or all: every rank, and check them)."""
    calibrate: Path | None = None
    """Measure the GPU or CPU at hand for --model and write its rates to this YAML file, for --gpu."""
    nproc_per_node: int | None = None
    """With --calibrate: measure on this many ranks here at once, and their collectives (or use torchrun)."""

    def __post_init__(self) -> None:
        problems = below_one(
            "plan",
            world_size=self.world_size,
            seq_length=self.seq_length,
            global_batch_size=self.global_batch_size,
            micro_batch_size=self.micro_batch_size,
            top=self.top,
        )
        problems += below_one(
            "plan", nproc_per_node=1 if self.nproc_per_node is None else self.nproc_per_node
        )
        if self.nproc_per_node is not None and self.calibrate is None:
            problems.append(
                "plan: --nproc-per-node is for --calibrate; --world-size says what is planned for"
            )
        if self.simulate not in (None, "all") and not str(self.simulate).isdecimal():
            problems.append(f"plan: --simulate is {self.simulate}; it must be a rank from 0, or all")
        if self.simulate is not None and (self.emit_script or self.explain):
            problems.append(
                "plan: --simulate prints what it built; leave out --emit-script and --explain, or call again"
            )
        if self.memory_budget_gib is not None and not self.memory_budget_gib > 0:
            problems.append(f"plan: --memory-budget-gib is {self.memory_budget_gib}; it must be positive")
        for flag in ("json", "emit_script", "calibrate"):
            path = getattr(self, flag)
            if path is not None and str(path) != "-" and not Path(path).resolve().parent.is_dir():
                name = flag.replace("_", "-")
                problems.append(f"plan: --{name} {path}: {Path(path).parent} is no directory; make it first")
        if problems:
            raise ConfigError(*problems)


def main(argv: Sequence[str]) -> int | None:
    """Check the input, judge every layout, print."""
    flags = tyro.cli(PlanFlags, args=_with_values(argv), prog="usdm-megatron plan")
    if flags.calibrate is not None:
        return _calibrate(flags, flags.calibrate, argv)

    from usdm_megatron.plan.choice import choose, refuse_nothing_fits
    from usdm_megatron.plan.report import as_json, as_table, explain
    from usdm_megatron.plan.search import make_plan

    plan = make_plan(_request(flags))
    refuse_nothing_fits(plan)
    chosen = choose(plan, flags.layout if flags.explain in (None, "1") else str(flags.explain))
    if flags.simulate is not None:
        return _simulate(plan.request, chosen, flags)
    to_screen = [text for text in (flags.json, flags.emit_script) if text == "-"]
    if flags.json is not None:
        _write("--json", flags.json, json.dumps(as_json(plan), indent=1) + "\n")
    if flags.emit_script is not None:
        from usdm_megatron.plan.emit_script import launch_script

        script = launch_script(chosen, flags.core_attention)
        _write("--emit-script", flags.emit_script, script)
    if not to_screen:
        print(as_table(plan, flags.top) if flags.explain is None else explain(chosen))
    return None


def _simulate(request: PlanRequest, chosen: PlannedLayout, flags: PlanFlags) -> int:
    """The real modules, optimizer and schedule of the chosen layout, held against the GPU's memory."""
    from usdm_megatron.cli.dry_run import SimulationFlags, print_simulation
    from usdm_megatron.config import ModelConfig, RunConfig, TrainingConfig
    from usdm_megatron.plan.simulation import RunShape

    config = RunConfig(
        model=ModelConfig(core_attention=flags.core_attention),
        parallel=chosen.planned.parallel,
        data=request.data,
        training=TrainingConfig(bf16=request.bf16),
    )
    return print_simulation(
        RunShape(config, request.model.architecture, request.model.vocabulary, chosen.layout),
        SimulationFlags(
            rank=None if flags.simulate == "all" else int(str(flags.simulate)),
            all_ranks=flags.simulate == "all",
            memory_budget_gib=request.hardware.memory_budget_gib,
            json=flags.json is not None,
        ),
    )


def _with_values(argv: Sequence[str]) -> list[str]:
    """The command line with the values that may be left out."""
    words: list[str] = []
    for position, word in enumerate(argv):
        words += _NEGATED.get(word, (word,))
        following = argv[position + 1] if position + 1 < len(argv) else "--"
        if word in _BARE and following.startswith("--"):
            words.append(_BARE[word])
    return words


def _request(flags: PlanFlags) -> PlanRequest:
    from usdm_megatron.plan.activations import kernels_of
    from usdm_megatron.plan.hardware import find_hardware
    from usdm_megatron.plan.model_shape import find_model
    from usdm_megatron.plan.search import PlanRequest
    from usdm_megatron.plan.work import RowShape

    hardware = find_hardware(flags.gpu)
    if flags.memory_budget_gib is not None:
        hardware = replace(hardware, memory_budget_gib=flags.memory_budget_gib)
    model = find_model(flags.model)
    if flags.seq_length > model.architecture.max_positions:
        raise ConfigError(
            f"plan: --seq-length {flags.seq_length} exceeds the model's {model.architecture.max_positions} "
            "positions (max_position_embeddings); lower it"
        )
    data = DataConfig(
        train_data_path=flags.data_path,
        seq_length=flags.seq_length,
        micro_batch_size=flags.micro_batch_size,
        global_batch_size=flags.global_batch_size,
    )
    if problems := data.problems():
        raise ConfigError(*problems)
    rows = _open_rows(data) if data.train_stores else None
    length = data.seq_length
    bf16 = hardware.dtype == "bf16" if flags.bf16 is None else flags.bf16
    if bf16 != (hardware.dtype == "bf16"):
        raise ConfigError(
            f"plan: --{'' if bf16 else 'no-'}bf16, and what {hardware.name} reaches is known for "
            f"{hardware.dtype}; drop it, or give --gpu a YAML file with dtype and its rates (--calibrate "
            "measures them)"
        )
    return PlanRequest(
        model=model,
        hardware=hardware,
        world_size=flags.world_size,
        data=data,
        row=RowShape.of_one_sample(length) if rows is None else RowShape.of_rows(rows, length),
        kernels=kernels_of(flags.core_attention, hardware.device),
        bf16=bf16,
        sequence_parallel=flags.sequence_parallel,
        fp32_gradients=flags.accumulate_allreduce_grads_in_fp32,
        rows=None if rows is None else rows.rows,
    )


def _open_rows(data: DataConfig) -> TrainRows:
    """The token stores of --data-path, none with a row that is longer than --seq-length."""
    from usdm_megatron.data.blend import open_rows, stores_of

    rows = open_rows([part.prefix for part in data.train_stores], [part.weight for part in data.train_stores])
    problems = [
        f"plan: {store.prefix} has a row of {store.longest_row} tokens; raise --seq-length {data.seq_length}"
        for store in stores_of(rows)
        if store.longest_row > data.seq_length
    ]
    if problems:
        raise ConfigError(*problems)
    return rows


def _write(flag: str, path: str, content: str) -> None:
    if path == "-":
        sys.stdout.write(content)
        return
    from usdm_megatron.data.file_writing import write_atomically

    try:
        write_atomically(Path(path), content.encode("utf-8"))
    except OSError as error:
        raise ConfigError(f"plan: {flag} {path}: cannot be written ({error.strerror})") from error


def _calibrate(flags: PlanFlags, path: Path, argv: Sequence[str]) -> int:
    """Measure here, on the ranks that torchrun or --nproc-per-node started; rank 0 writes the file."""
    import yaml

    from usdm_megatron.cli.training import cuda_is_usable
    from usdm_megatron.plan.model_shape import find_model
    from usdm_megatron.runtime.ranks import RankEnvironment, ranks_from_environment, started_by_torchrun

    model = find_model(flags.model)
    if (flags.nproc_per_node or 1) > 1 and not started_by_torchrun():
        from usdm_megatron.runtime.launch import launch_local_ranks

        return launch_local_ranks("usdm_megatron.cli", ["plan", *argv], flags.nproc_per_node or 1)
    from usdm_megatron.plan.calibrate import Calibration, calibrate

    asked = Calibration(
        model=model,
        tokens=flags.seq_length * flags.micro_batch_size,
        bf16=cuda_is_usable() if flags.bf16 is None else flags.bf16,
        backend=flags.core_attention,
    )
    measured = calibrate(asked, ranks_from_environment() or RankEnvironment())
    if measured is not None:
        _write("--calibrate", str(path), yaml.safe_dump(measured.to_tree(), sort_keys=False))
        print(f"wrote {path}; plan with it: usdm-megatron plan --gpu {path}")
    return EXIT_DONE
