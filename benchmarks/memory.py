"""The planner's memory beside what real ranks hold: `docs/benchmarks/memory.md`.

python -m benchmarks.memory [--json]

Every case of the tests, on ranks of this machine: predicted bytes on the fullest rank of each stage, live
storages at the fullest instant of a step, and the resident pages that the kernel counts.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby

import tyro

from tests.plan_floor.memory_cases import FOUR_RANKS, MORE, MORE_OF_FOUR, ONE_RANK, TWO_RANKS, Case, plan
from tests.plan_floor.memory_jobs import measure
from tests.ranks import run_ranks

_CASES = [*ONE_RANK, *MORE, *TWO_RANKS, *FOUR_RANKS, *MORE_OF_FOUR]


@dataclass(frozen=True)
class Options:
    """How to print."""

    json: bool = False


def main(options: Options) -> None:
    """Measure every case and print a line for each of its stages."""
    rows = list(_rows())
    if options.json:
        print(json.dumps(rows, indent=1))
        return
    print("| run | stage | predicted MB | storages | pages |\n| --- | --- | --- | --- | --- |")
    for row in rows:
        live, resident = (f"{row['predicted'] / row[key] - 1:+.1%}" for key in ("live", "resident"))
        print(f"| {row['case']} | {row['stage']} | {row['predicted'] / 1e6:.1f} | {live} | {resident} |")


def _rows() -> Iterator[dict[str, int | str]]:
    for ranks, group in groupby(_CASES, key=lambda case: case.layout.ranks):
        cases = list(group)
        by_rank = run_ranks(ranks, measure, cases, timeout_s=600)
        for index, case in enumerate(cases):
            for stage, planned in enumerate(plan(case)):
                found = [measured[index] for measured in by_rank if measured[index].stage == stage]
                yield {
                    "case": _name(case),
                    "stage": stage,
                    "predicted": planned.total,
                    "live": max(measured.live for measured in found),
                    "resident": max(measured.resident for measured in found),
                }


def _name(case: Case) -> str:
    layout = case.layout
    parts = [f"{axis}{size}" for axis, size in (("TP", layout.tp), ("PP", layout.pp)) if size > 1]
    parts += [f"{axis}{size}" for axis, size in (("VPP", layout.vpp), ("DP", layout.dp)) if size > 1]
    parts += ["SP"] if layout.sp else []
    values = [", ".join(value) if isinstance(value, tuple) else value for _, value in layout.extra]
    names = [name for name, _ in layout.extra]
    extras = [
        str(value) if isinstance(value, str) else f"{name} {value}"
        for name, value in zip(names, values, strict=True)
    ]
    extras += [f"{name} {value}" for name, value in case.changes]
    kind = "bf16" if case.bf16 else "fp32"
    shape = f"{case.layers} layers, {case.micro_batches} x {case.micro_batch_size} x {case.seq_length:,}"
    return "; ".join([" ".join(parts) or "one rank", kind, shape, *extras])


if __name__ == "__main__":
    main(tyro.cli(Options))
