"""The planner beside published step times: 8 sheets of Llama runs on A100-80GB, by layout.

    git clone https://github.com/Aleph-Alpha/NeurIPS-WANT-submission-efficient-parallelization-layouts sheets
    python benchmarks/published_steps.py --sheets sheets/data

Predicts every run without activation checkpointing and with the fused kernels (arXiv 2311.05610), and prints
predicted over measured by model and row length, whether the planner's best layout is the measured one, and
the GEMM rate by tensor parallel size at which prediction and measurement agree.
"""

from __future__ import annotations

import re
import statistics
import zipfile
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import tyro

from usdm_megatron.architecture import HFArchitecture
from usdm_megatron.config import DataConfig
from usdm_megatron.plan.activations import kernels_of
from usdm_megatron.plan.hardware import find_hardware
from usdm_megatron.plan.model_shape import ModelShape
from usdm_megatron.plan.search import PlannedLayout, PlanRequest, judge
from usdm_megatron.plan.work import RowShape
from usdm_megatron.vocab import Vocabulary

_MODELS = {"13B": (5120, 40, 40, 13824), "30B": (6656, 60, 52, 17920), "65B": (8192, 80, 64, 22016)}
_VOCABULARY = Vocabulary(text_size=128_000, unit_count=0)
_ROWS = {2048: 2048, 8192: 512}  # rows of a step, by their length
_SHEET = "{http://schemas.openxmlformats.org/spreadsheetml/2006/main}"


@dataclass(frozen=True)
class Options:
    """Where the sheets are."""

    sheets: Path
    sequence_parallel_only: bool = True
    """Leave out runs without sequence parallelism, which the planner proposes for none."""


@dataclass(frozen=True)
class Run:
    """A published run."""

    model: str
    seq_length: int
    world_size: int
    tp: int
    pp: int
    micro_batch_size: int
    sequence_parallel: bool
    step_s: float

    @property
    def group(self) -> tuple[str, int, int]:
        return self.model, self.seq_length, self.world_size


def main(options: Options) -> None:
    """Predict, compare, print."""
    compared = []
    for run in _runs(options.sheets):
        if run.sequence_parallel or not options.sequence_parallel_only:
            found = _predict(run)
            if isinstance(found, PlannedLayout):
                compared.append((run, found))
    groups = defaultdict(list)
    for run, found in compared:
        groups[run.group].append((run.step_s, found.step_time_s or 0.0, run))
    print("model    tokens  GPUs  runs   predicted/measured   pairs ordered   best layout found")
    for (model, length, world), runs in sorted(groups.items()):
        ratios = sorted(predicted / measured for measured, predicted, _ in runs)
        best, chosen = min(runs, key=lambda run: run[0]), min(runs, key=lambda run: run[1])
        pairs = [(a[0] < b[0]) == (a[1] < b[1]) for a, b in combinations(runs, 2)]
        print(
            f"{model:<8}{length:>7}{world:>6}{len(runs):>6}   {statistics.median(ratios):.2f} "
            f"({ratios[0]:.2f} to {ratios[-1]:.2f})   {sum(pairs) / max(1, len(pairs)):>13.0%}   "
            f"{'yes' if best is chosen else f'{chosen[0] / best[0] - 1:.0%} slower'}"
        )
    _print_rates(compared)


def _print_rates(compared: list[tuple[Run, PlannedLayout]]) -> None:
    """The GEMM rate at which each run's prediction would be its measurement, by tensor parallel size."""
    rates = defaultdict(list)
    for run, found in compared:
        step = found.step
        assert step is not None
        gemm = (step.slowest.forward.gemm + step.slowest.backward.gemm) * (step.micro_batches + run.pp - 1)
        rate = found.planned.hardware.gemm_tflops.at(run.tp)
        rates[run.tp].append(rate * gemm / (gemm + run.step_s - step.total))
    for tp, found_rates in sorted(rates.items()):
        print(f"tp={tp}: {len(found_rates)} runs, median {statistics.median(found_rates):.0f} TFLOP/s")


def _predict(run: Run) -> object:
    hidden, layers, heads, ffn = _MODELS[run.model]
    model = HFArchitecture(
        hidden=hidden,
        layers=layers,
        heads=heads,
        kv_heads=heads,
        head_dim=hidden // heads,
        ffn=ffn,
        vocab_size=_VOCABULARY.size,
        max_positions=8192,
        sliding_window=None,
    )
    request = PlanRequest(
        model=ModelShape(run.model, model, _VOCABULARY),
        hardware=replace(find_hardware("a100-80gb"), memory_budget_gib=1e9),
        world_size=run.world_size,
        data=DataConfig(
            seq_length=run.seq_length,
            global_batch_size=_ROWS[run.seq_length],
            micro_batch_size=run.micro_batch_size,
        ),
        row=RowShape.of_one_sample(run.seq_length),
        kernels=kernels_of("te", "cuda"),
        sequence_parallel=run.sequence_parallel,
    )
    return judge(request, request.parallel(run.tp, run.pp, 1, "none"), "none")


def _runs(directory: Path) -> Iterator[Run]:
    for path in sorted(directory.rglob("*.xlsx")):
        for row in _rows(path):
            time = row.get("Average Step Time", "")
            if (
                row.get("activation_checkpointing_type") != "disabled"
                or row.get("kernel") != "flash_attention2 + RMS kernel"
                or not re.fullmatch(r"[\d.]+", time)
            ):
                continue
            yield Run(
                model=path.name.split("_")[1],
                seq_length=8192 if "8k" in path.name else 2048,
                world_size=int(float(row["World Size"])),
                tp=int(float(row["model_parallel_size"])),
                pp=int(float(row["pipe_parallel_size"])),
                micro_batch_size=int(float(row["micro_batch_size"])),
                sequence_parallel=row.get("sequence_parallel") == "1",
                step_s=float(time),
            )


def _rows(path: Path) -> list[dict[str, str]]:
    """The first sheet, by its second row's headings."""
    with zipfile.ZipFile(path) as archive:
        strings = [
            "".join(text.text or "" for text in entry.iter(f"{_SHEET}t"))
            for entry in ElementTree.fromstring(archive.read("xl/sharedStrings.xml")).findall(f"{_SHEET}si")
        ]
        name = next(name for name in archive.namelist() if name.startswith("xl/worksheets/sheet"))
        sheet = ElementTree.fromstring(archive.read(name))
    rows: list[dict[str, Any]] = []
    for row in sheet.iter(f"{_SHEET}row"):
        cells = {}
        for cell in row.findall(f"{_SHEET}c"):
            value = cell.findtext(f"{_SHEET}v")
            if value is not None:
                column = re.sub(r"\d", "", cell.get("r", ""))
                cells[column] = strings[int(value)] if cell.get("t") == "s" else value
        rows.append(cells)
    headings = rows[1]
    return [
        {headings[column]: value for column, value in row.items() if column in headings} for row in rows[2:]
    ]


if __name__ == "__main__":
    main(tyro.cli(Options))
