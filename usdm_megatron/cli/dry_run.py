"""`--dry-run` of the training commands: everything checked, no step taken; ranks built without memory."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

from usdm_megatron.cli.entry import is_main_rank
from usdm_megatron.errors import EXIT_DONE, EXIT_FAULT, ConfigError

if TYPE_CHECKING:
    from usdm_megatron.config import RunConfig
    from usdm_megatron.plan.simulation import RunShape
    from usdm_megatron.train.preflight import RunPlan


@dataclass(frozen=True)
class SimulationFlags:
    """Which ranks of the run --dry-run builds, without memory and without the others."""

    rank: int | None = None
    """with --dry-run: build this rank of --world-size and print what it holds, reads and needs"""
    all_ranks: bool = False
    """with --dry-run: build every rank and check them against each other"""
    step: int | None = None
    """step, counted from 1, whose rows the built ranks read (default: the first)"""
    gpu: str | None = None
    """GPU whose memory must suffice: a100-40gb, a100-80gb, h100, h200, or a YAML file"""
    memory_budget_gib: float | None = None
    """memory that a rank may take, instead of --gpu"""
    json: bool = False
    """print what was built as JSON"""

    def problems(self, dry_run: bool) -> list[str]:
        if self == SimulationFlags():
            return []
        names = "--rank, --all-ranks, --step, --gpu, --memory-budget-gib and --json"
        if not dry_run:
            return [f"{names} are for --dry-run; add it"]
        problems = []
        if self.rank is None and not self.all_ranks:
            problems.append(
                "--step, --gpu, --memory-budget-gib and --json are for ranks; add --rank R or --all-ranks"
            )
        if self.rank is not None and self.all_ranks:
            problems.append("--rank and --all-ranks are given together; keep one")
        if self.gpu is not None and self.memory_budget_gib is not None:
            problems.append("--gpu and --memory-budget-gib are given together; keep one")
        if self.memory_budget_gib is not None and not self.memory_budget_gib > 0:
            problems.append(f"--memory-budget-gib is {self.memory_budget_gib}; it must be positive")
        if self.step is not None and self.step < 1:
            problems.append(f"--step is {self.step}; steps are counted from 1")
        return problems

    @property
    def budget_gib(self) -> float | None:
        """What a rank may take; `ConfigError` for an unknown GPU."""
        if self.gpu is None:
            return self.memory_budget_gib
        from usdm_megatron.plan.hardware import find_hardware

        return find_hardware(self.gpu).memory_budget_gib


def dry_run(config: RunConfig, ranks: int | None, flags: SimulationFlags) -> int:
    """Check the run for `ranks` (None: those of the environment, or one) and build those asked for."""
    from usdm_megatron.runtime.ranks import ranks_from_environment
    from usdm_megatron.train.preflight import build_layout, plan_run
    from usdm_megatron.train.start import find_start

    if ranks is None:
        environment = ranks_from_environment()
        ranks = environment.world_size if environment else 1
    plan = plan_run(config, build_layout(config, ranks), find_start(config))
    if not is_main_rank():
        return EXIT_DONE
    if flags.rank is None and not flags.all_ranks:
        _print_plan(plan)
        return EXIT_DONE
    from usdm_megatron.plan.simulation import RunShape

    return print_simulation(RunShape(config, plan.architecture, plan.facts.vocabulary, plan.layout), flags)


def print_simulation(run: RunShape, flags: SimulationFlags) -> int:
    """Build the ranks that `flags` ask for, and print them; returns the exit code.

    Raises `ConfigError` where memory does not suffice, or there is no such rank or step; contradictions
    between ranks, which are no fault of the user's, go to standard error and make the code 1.
    """
    from usdm_megatron.plan.simulate import simulate
    from usdm_megatron.plan.simulation_report import as_json, as_text

    budget_gib = flags.budget_gib
    simulation = simulate(
        run,
        flags.rank,
        step=flags.step or 1,
        budget_gib=budget_gib,
        progress=_show_progress if sys.stderr.isatty() else None,
    )
    if flags.json:
        print(json.dumps(as_json(simulation, budget_gib)))
    else:
        print(as_text(simulation, budget_gib))
    for fault in simulation.faults:
        print(f"fault: {fault}", file=sys.stderr)
    if simulation.faults:
        return EXIT_FAULT
    if simulation.problems:
        raise ConfigError(*simulation.problems)
    return EXIT_DONE


def _show_progress(built: int, ranks: int) -> None:
    print(f"\r{built} of {ranks} ranks", end="" if built < ranks else "\n", file=sys.stderr, flush=True)


def _print_plan(plan: RunPlan) -> None:
    from usdm_megatron.data.blend import shares_of

    layout, config, valid = plan.layout, plan.config, plan.valid_store
    print(
        f"dry run: everything is in order\n"
        f"  ranks       {layout.world_size}: tp={layout.tp} pp={layout.pp} vpp={layout.vpp} dp={layout.dp}\n"
        f"  start       {plan.start.directory} at step {plan.start.step}\n"
        f"  steps       {plan.steps}, each {config.data.global_batch_size} rows in "
        f"{plan.micro_batches} micro-batches a rank\n"
        f"  train data  {plan.train_store.prefix} ({plan.train_store.rows:,} rows)\n"
        + "".join(f"              {share}\n" for share in shares_of(plan.train_store))
        + f"  valid data  {'none' if valid is None else f'{valid.prefix} ({valid.rows:,} rows)'}\n"
        f"  warm-up     {plan.schedule.warmup_steps} steps, then {plan.schedule.style} to "
        f"{plan.schedule.min_lr}\n"
        f"  attention   {plan.backend}"
        + ("" if plan.start.lora is None else f"\n  LoRA base   {plan.start.lora.base}")
    )
