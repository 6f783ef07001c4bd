"""The training commands: command line → `RunConfig` → this rank's run, local ranks, or a dry run."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, make_dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import tyro

from usdm_megatron.cli.dry_run import SimulationFlags, dry_run
from usdm_megatron.cli.entry import is_main_rank
from usdm_megatron.config import LoraConfig, RunConfig
from usdm_megatron.config_file import dump_config, layered_defaults, read_config_file, section_types
from usdm_megatron.errors import EXIT_DONE, ConfigError
from usdm_megatron.recipes import RecipeName, Task


@dataclass(frozen=True)
class Invocation:
    """What a command line asks for besides the run itself."""

    config: Path | None = None
    """YAML file with sections as in run_config.yaml, below the command line"""
    recipe: RecipeName | None = None
    """usdm follows the original in all that changes numbers; corrected (default) is what we recommend"""
    print_config: bool = False
    """print the resolved configuration and stop"""
    dry_run: bool = False
    """check everything, take no step"""
    world_size: int | None = None
    """ranks that --dry-run checks for"""
    nproc_per_node: int | None = None
    """start this many ranks here (without torchrun or Slurm)"""
    simulation: SimulationFlags = field(default_factory=SimulationFlags)


@dataclass(frozen=True)
class TrainingCommand:
    """`usdm-megatron pretrain` or `sft`: one loop, other defaults and another kind of store."""

    task: Task
    description: str

    @property
    def program(self) -> str:
        return f"usdm-megatron {self.task}"

    def main(self, argv: Sequence[str]) -> int:
        """Parse and run; returns the exit code."""
        invocation, config = self.parse(argv)
        _check_invocation(invocation)
        if invocation.print_config:
            print(dump_config(config), end="")
            return 0
        if invocation.dry_run:
            return dry_run(config, invocation.world_size or invocation.nproc_per_node, invocation.simulation)
        if invocation.world_size is not None:
            raise ConfigError(
                "--world-size is for --dry-run; a run takes its ranks from torchrun, Slurm or "
                "--nproc-per-node"
            )
        from usdm_megatron.runtime.ranks import RankEnvironment, ranks_from_environment, started_by_torchrun

        ranks_here = invocation.nproc_per_node or 1
        if ranks_here > 1 and not started_by_torchrun():
            return _start_ranks(config, argv, ranks_here)
        environment = ranks_from_environment()
        from usdm_megatron.train.run import run_training

        return run_training(config, environment or RankEnvironment())

    def parse(self, argv: Sequence[str]) -> tuple[Invocation, RunConfig]:
        """The invocation and the resolved configuration; unknown flags exit with a suggestion (tyro)."""
        early = self._file_and_recipe(argv)
        tree = read_config_file(early.config) if early.config is not None else {}
        if tree.get("task", self.task) != self.task:
            raise ConfigError(
                f"--config {early.config}: task is {tree['task']} and this is {self.program}; run "
                f"usdm-megatron {tree['task']}, or drop the key (what it sets beside it stays set)"
            )
        recipe, sections = layered_defaults(
            early.recipe, tree, task=self.task, training={"bf16": cuda_is_usable()}
        )
        flags = make_dataclass(
            "Flags",
            [("invocation", Invocation), *section_types().items()],
            frozen=True,
            namespace={"__doc__": self.description},
        )
        parsed: Any = tyro.cli(
            tyro.conf.OmitArgPrefixes[flags],  # type: ignore[misc,valid-type]  # made at run time from RunConfig
            prog=self.program,
            description=self.description,
            args=list(argv),
            default=flags(invocation=early, **sections),
            console_outputs=is_main_rank(),  # every rank refuses, one of them says why
        )
        # what stands beside `enabled` in a file was left there knowingly; without it, it asks for adapters
        knows = "enabled" in tree.get("lora", {})
        below = sections if knows else self._defaults(early, tree)
        _check_lora_is_on(parsed.lora, below["lora"])
        chosen = {name: _without_overruled(name, getattr(parsed, name), tree) for name in section_types()}
        return parsed.invocation, RunConfig(task=self.task, recipe=recipe, **chosen)  # type: ignore[arg-type]

    def _defaults(self, early: Invocation, tree: dict[str, Any]) -> dict[str, Any]:
        """The sections as recipe and task have them, without what the file sets."""
        return layered_defaults(early.recipe or tree.get("recipe"), {}, task=self.task)[1]

    def _file_and_recipe(self, argv: Sequence[str]) -> Invocation:
        """`--config` and `--recipe` decide the defaults of all other flags, so they are read first."""
        import argparse

        early = argparse.ArgumentParser(prog=self.program, add_help=False, allow_abbrev=False)
        early.add_argument("--config", type=Path)
        early.add_argument("--recipe")
        known, _ = early.parse_known_args(list(argv))  # every other flag is checked by tyro
        if known.recipe not in (None, "usdm", "corrected"):
            raise ConfigError(f"--recipe is {known.recipe!r}; it must be usdm or corrected")
        return Invocation(config=known.config, recipe=known.recipe)


def _check_invocation(invocation: Invocation) -> None:
    counts = {"--world-size": invocation.world_size, "--nproc-per-node": invocation.nproc_per_node}
    problems = [
        f"{flag} is {count}; it must be at least 1"
        for flag, count in counts.items()
        if count is not None and count < 1
    ]
    problems += invocation.simulation.problems(invocation.dry_run)
    if problems:
        raise ConfigError(*problems)


def _check_lora_is_on(given: LoraConfig, default: LoraConfig) -> None:
    """What describes adapters would do nothing without --lora, without a word."""
    fields = asdict(given)
    changed = [name for name in fields if name != "enabled" and fields[name] != getattr(default, name)]
    if changed and not given.enabled:
        raise ConfigError(
            f"lora: {', '.join(changed)} set, and --lora is not; add --lora (in a file, enabled: true), or "
            "drop what belongs to it"
        )


# of these at most one is given; the command line's own beats the file's
_EXCLUSIVE = {
    "training": ("train_iters", "train_samples", "num_train_epochs"),
    "optimizer": ("lr_warmup_fraction", "lr_warmup_iters"),
}


def _without_overruled(section: str, fields: Any, tree: dict[str, Any]) -> Any:
    """`fields` without the file's choice in a group of which the command line chose another member."""
    group, in_file = _EXCLUSIVE.get(section, ()), tree.get(section, {})
    given = {name: getattr(fields, name) for name in group if getattr(fields, name) is not None}
    of_file = {name for name, value in given.items() if in_file.get(name) == value}
    if not of_file or of_file == given.keys():
        return fields
    return replace(fields, **dict.fromkeys(of_file))


def cuda_is_usable() -> bool:
    """Whether torch will find CUDA, without importing torch (2 s that a config error should not cost)."""
    try:
        cpu_build = metadata.version("torch").endswith("+cpu")
    except metadata.PackageNotFoundError:
        return False
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES", "0") in ("", "-1")
    return not cpu_build and not hidden and Path("/proc/driver/nvidia/version").exists()


def _start_ranks(config: RunConfig, argv: Sequence[str], ranks: int) -> int:
    from usdm_megatron.runtime.launch import launch_local_ranks
    from usdm_megatron.train.preflight import build_layout, plan_run
    from usdm_megatron.train.run import read_exit_code
    from usdm_megatron.train.start import find_start

    # one clear message before any rank starts
    plan_run(config, build_layout(config, ranks), find_start(config))
    sys.stdout.flush()
    started_at = time.time()
    code = launch_local_ranks("usdm_megatron.cli", [config.task, *argv], ranks)
    recorded = read_exit_code(config, since=started_at)
    return code if code == EXIT_DONE else recorded or code
