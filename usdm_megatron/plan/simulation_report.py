"""A simulation for people, and as JSON."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from usdm_megatron.data.order import EMPTY_ROW
from usdm_megatron.plan.simulate import Simulation
from usdm_megatron.plan.simulation import GIB, Memory, SimulatedRank

MIB = 2**20
_FEW = 8


def as_text(simulation: Simulation, budget_gib: float | None) -> str:
    """A few lines: of one rank what it holds, of all ranks what was checked and what each stage needs."""
    lines = _world(simulation) if simulation.is_whole_world else _rank(simulation, simulation.ranks[0])
    worst = simulation.worst.memory
    if budget_gib is not None and not simulation.problems:
        lines = [*lines, ("budget", f"{_size(worst.peak)} of {budget_gib:g} GiB at most")]
    title, *rest = lines
    return "\n".join([title[1], *(f"  {name:<12}{text}" for name, text in rest)])


def as_json(simulation: Simulation, budget_gib: float | None) -> dict[str, Any]:
    """`layout`, `step`, `budget_gib`, `faults`, `problems`, `traced` and `ranks[]`, each with everything of
    its record; of a whole world without `parameters`, `shards` and `owned`, which have a line a tensor."""
    left_out = ("parameters", "shards", "owned") if simulation.is_whole_world else ()
    return {
        "layout": asdict(simulation.run.layout),
        "step": simulation.step,
        "budget_gib": budget_gib,
        "faults": list(simulation.faults),
        "problems": list(simulation.problems),
        "traced": list(simulation.traced),
        "ranks": [_rank_tree(rank, left_out) for rank in simulation.ranks],
    }


def _rank_tree(rank: SimulatedRank, left_out: Sequence[str]) -> dict[str, Any]:
    tree = {name: value for name, value in asdict(rank).items() if name not in left_out}
    memory = {**tree["memory"], "peak": rank.memory.peak}
    return {**tree, "parameter_count": rank.parameter_count, "memory": memory}


def _world(simulation: Simulation) -> list[tuple[str, str]]:
    layout, ranks = simulation.run.layout, simulation.ranks
    sizes = f"tp={layout.tp} pp={layout.pp} vpp={layout.vpp} dp={layout.dp}"
    lines = [("", f"{len(ranks)} ranks, each built: {sizes}, {_precision(simulation)}")]
    for stage in range(layout.pp):
        worst = max((r for r in ranks if r.place.pp == stage), key=lambda rank: rank.memory.peak or 0)
        lines.append(
            (f"stage {stage}", f"{worst.parameter_count:,} parameters a rank, {_memory(worst.memory)}")
        )
    if simulation.faults:
        return lines
    rows = {row for rank in ranks for batch in rank.rows or () for row in batch} - {EMPTY_ROW}
    read = (
        "no store was given" if ranks[0].rows is None else f"step {simulation.step}: {len(rows):,}, each once"
    )
    replicas = "a step is traced on one rank of each tp x pp place, the others were seen to be alike"
    return [
        *lines,
        ("traced", f"{_numbers(simulation.traced)}: {replicas}"),
        ("weights", "every tensor of the Hugging Face table, once in each of its replicas"),
        ("optimizer", "every element of every weight that trains on one of its data parallel ranks"),
        ("groups", "all members agree; every stage is heard by the one it sends to"),
        ("rows", read),
    ]


def _rank(simulation: Simulation, rank: SimulatedRank) -> list[tuple[str, str]]:
    layout, place, buffers = simulation.run.layout, rank.place, rank.buffers
    owned = [part.stop - part.start for part in rank.owned.values() if part.stop > part.start]
    dtypes = {f"{buffer.weight_dtype} weights, {buffer.gradient_dtype} gradients" for buffer in buffers}
    return [
        (
            "",
            f"rank {rank.rank} of {layout.world_size}: tp {place.tp} of {layout.tp}, pp {place.pp} of "
            f"{layout.pp}, dp {place.dp} of {layout.dp}, {_precision(simulation)}",
        ),
        ("parameters", f"{rank.parameter_count:,} in {len(rank.parameters)} tensors of {layout.vpp} chunks"),
        *(("", f"{count:>4} x {name} {list(shape)}") for (name, shape), count in _alike(rank)),
        (
            "buffers",
            f"{', '.join(sorted(dtypes))}: {sum(b.elements for b in buffers):,} elements, of which "
            f"{sum(b.padding for b in buffers):,} padding, in {sum(b.buckets for b in buffers)} buckets",
        ),
        ("optimizer", f"{sum(owned):,} elements of {len(owned)} tensors"),
        *((f"{axis} group", _numbers(rank.groups[axis])) for axis in ("tp", "pp", "dp")),
        ("stages", f"takes from {_or_nobody(rank.previous_stage)}, gives to {_or_nobody(rank.next_stage)}"),
        ("rows", _rows(simulation.step, rank)),
        ("memory", _memory(rank.memory)),
    ]


def _precision(simulation: Simulation) -> str:
    """Which the configuration has: on a machine without CUDA fp32, unless --bf16 is given."""
    return "bf16" if simulation.run.config.training.bf16 else "fp32"


def _alike(rank: SimulatedRank) -> list[tuple[tuple[str, tuple[int, ...]], int]]:
    """(name with * for chunk and layer, shape) and how many there are."""
    names = Counter(
        (re.sub(r"\.\d+\.", ".*.", name.partition(".")[2]), shape) for name, shape in rank.parameters.items()
    )
    return list(names.items())


def _rows(step: int, rank: SimulatedRank) -> str:
    if rank.rows is None:
        return "no store was given"
    rows = [row for batch in rank.rows for row in batch if row != EMPTY_ROW]
    empty = sum(len(batch) for batch in rank.rows) - len(rows)
    padding = f", and {empty} empty" if empty else ""
    return f"step {step}: {_numbers(rows)}{padding}, in {len(rank.rows)} micro-batches"


def _memory(memory: Memory) -> str:
    return (
        f"{_size(memory.peak)} at most: weights {_size(memory.weights)}, gradients "
        f"{_size(memory.gradients)}, optimizer {_size(memory.optimizer)}, a step {_size(memory.step)}, other "
        f"{_size(memory.other)}"
    )


def _size(count: int | None) -> str:
    if count is None:
        return "?"
    return f"{count / GIB:.2f} GiB" if count > 0.1 * GIB else f"{count / MIB:.2f} MiB"


def _numbers(values: Sequence[int]) -> str:
    if len(values) <= _FEW:
        return " ".join(map(str, values)) or "none"
    return f"{' '.join(map(str, values[:3]))} … {values[-1]} ({len(values)})"


def _or_nobody(rank: int | None) -> str:
    return "nobody" if rank is None else f"rank {rank}"
