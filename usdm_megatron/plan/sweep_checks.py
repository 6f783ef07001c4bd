"""Whether the simulated ranks of a world make up one run: each check returns what is wrong, and where."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np

from usdm_megatron.convert.name_table import ARCHITECTURES, core_shape
from usdm_megatron.data.order import EMPTY_ROW
from usdm_megatron.layout import Axis, RankCoordinates
from usdm_megatron.model.lora.names import is_adapter_key
from usdm_megatron.plan.simulation import GIB, OwnedPart, RunShape, Shard, SimulatedRank

_TABLE = ARCHITECTURES["MistralForCausalLM"]  # every family has the same tensors
_MOST_NAMED = 8


def world_faults(run: RunShape, ranks: Sequence[SimulatedRank], rows_of_step: int | None) -> tuple[str, ...]:
    """Everything that contradicts itself between all the ranks of a world, by rank number in `ranks`.

    `rows_of_step` is how many rows the step must read; None without a store.
    """
    checks: tuple[Callable[[], Iterable[str]], ...] = (
        lambda: replica_faults(ranks),
        lambda: coverage_faults(run, ranks),
        lambda: optimizer_faults(ranks),
        lambda: group_faults(run, ranks),
        lambda: stage_faults(run, ranks),
        lambda: () if rows_of_step is None else row_faults(ranks, rows_of_step),
    )
    return tuple(itertools.chain.from_iterable(_shortened(list(check())) for check in checks))


def coverage_faults(run: RunShape, ranks: Sequence[SimulatedRank]) -> Iterator[str]:
    """Every tensor of the HF table whole, and once, in each of its replicas; and nothing beside them."""
    holders: dict[str, dict[tuple[int, ...], list[tuple[Shard, int]]]] = defaultdict(
        lambda: defaultdict(list)
    )
    for rank in ranks:
        for shard in rank.shards:
            holders[shard.key][shard.replica].append((shard, rank.rank))
    expected = table_shapes(run)
    for key in sorted(expected.keys() | holders.keys()):
        if key not in holders:
            yield f"{key}: is in the table, and no rank holds a part of it"
            continue
        if key not in expected and not is_adapter_key(key):
            yield f"{key}: rank {_first(holders[key])} holds a part of it, and the table knows no such tensor"
            continue
        missing = set(range(run.layout.dp)) - {replica[-1] for replica in holders[key]}
        if missing:
            yield f"{key}: data parallel replica {_some(missing)} of {run.layout.dp} has none of it"
        yield from _replica_coverage(key, holders[key], expected.get(key))


def table_shapes(run: RunShape) -> dict[str, tuple[int, ...]]:
    """Global shape of every core tensor that the HF table knows, layers stacked."""
    model = run.architecture
    return {
        entry.core_key: ((model.layers,) if entry.per_layer else ())
        + core_shape(entry, model, run.vocabulary.padded_size)
        for entry in _TABLE.entries_of(model)
    }


def _replica_coverage(
    key: str, replicas: dict[tuple[int, ...], list[tuple[Shard, int]]], shape: tuple[int, ...] | None
) -> Iterator[str]:
    whole = set()  # replicas are cut alike, mostly
    for replica, held in sorted(replicas.items()):
        for shard, rank in held:
            if shard.global_shape != (shape or shard.global_shape):
                yield f"{key}: rank {rank} holds a part of {shard.global_shape}, the table says {shape}"
                return
        boxes = frozenset(shard.box for shard, _ in held)
        if len(boxes) == len(held) and boxes in whole:
            continue
        faults = list(_box_faults(f"{key}, replica {replica}", held))
        yield from faults
        if not faults:
            whole.add(boxes)


def _box_faults(what: str, held: list[tuple[Shard, int]]) -> Iterator[str]:
    """Cells of the tensor, between all edges of all boxes, that no box holds, or several do."""
    shape = held[0][0].global_shape
    for shard, rank in held:
        stops = [start + size for start, size in zip(shard.offset, shard.shape, strict=True)]
        if any(stop > size for stop, size in zip(stops, shape, strict=True)):
            yield f"{what}: rank {rank} holds up to {stops}, beyond {list(shape)}"
            return
    edges = [
        sorted(
            {0, size} | {edge for s, _ in held for edge in (s.offset[axis], s.offset[axis] + s.shape[axis])}
        )
        for axis, size in enumerate(shape)
    ]
    count = np.zeros([len(along) - 1 for along in edges], dtype=np.int32)
    for shard, _ in held:
        count[_cells(shard, edges)] += 1
    for cell in np.argwhere(count != 1):
        start = [along[index] for along, index in zip(edges, cell, strict=True)]
        stop = [along[index + 1] for along, index in zip(edges, cell, strict=True)]
        there = [r for s, r in held if count[tuple(cell)] and _holds(s, start)]
        by = f"by ranks {_some(there)}" if there else "by no rank"
        yield f"{what}: {start} to {stop} of {list(shape)} is held {by}"


def _cells(shard: Shard, edges: list[list[int]]) -> tuple[slice, ...]:
    return tuple(
        slice(along.index(start), along.index(start + size))
        for along, start, size in zip(edges, shard.offset, shard.shape, strict=True)
    )


def _holds(shard: Shard, point: list[int]) -> bool:
    return all(
        start <= at < start + size for start, size, at in zip(shard.offset, shard.shape, point, strict=True)
    )


def optimizer_faults(ranks: Sequence[SimulatedRank]) -> Iterator[str]:
    """Every element of every weight updated by exactly one of its data parallel replicas."""
    by_place: dict[tuple[int, int], list[SimulatedRank]] = defaultdict(list)
    for rank in ranks:
        by_place[rank.place.tp, rank.place.pp].append(rank)
    for replicas in by_place.values():
        for name, part in replicas[0].owned.items():
            fault = _ownership_fault([(rank.owned[name], rank.rank) for rank in replicas], part.elements)
            if fault is not None:
                yield f"{name} of ranks {_some(rank.rank for rank in replicas)}: {fault}"


def _ownership_fault(parts: list[tuple[OwnedPart, int]], elements: int) -> str | None:
    """The first elements that nobody updates, or two ranks do."""
    reached, last = 0, -1
    for part, rank in sorted(parts, key=lambda owned: owned[0].start):
        if part.start == part.stop:
            continue
        if part.start < reached:
            return f"ranks {last} and {rank} both update elements {part.start:,} to {reached:,}"
        if part.start > reached:
            break
        reached, last = part.stop, rank
    return None if reached == elements else f"no rank updates element {reached:,} of {elements:,}"


def replica_faults(ranks: Sequence[SimulatedRank]) -> Iterator[str]:
    """Data parallel replicas of a stage must have the same parts: what one was measured at is true of all."""
    first: dict[tuple[int, int], SimulatedRank] = {}
    for rank in ranks:
        other = first.setdefault((rank.place.tp, rank.place.pp), rank)
        if rank.parameters != other.parameters:
            names = sorted({name for name, _ in rank.parameters.items() ^ other.parameters.items()})
            yield f"ranks {other.rank} and {rank.rank} hold the same stage, with other shapes: {_some(names)}"
        if rank.buffers != other.buffers:
            yield f"ranks {other.rank} and {rank.rank} hold the same stage, with other buffers"


def group_faults(run: RunShape, ranks: Sequence[SimulatedRank]) -> Iterator[str]:
    """Members of a group must agree on it, and on where each of them sits in the layout."""
    for rank in ranks:
        axes: tuple[Axis, ...] = ("tp", "dp", "pp")
        for axis in axes:
            expected = run.layout.group(rank.rank, axis)
            if rank.groups.get(axis) != expected:
                yield (
                    f"rank {rank.rank}: its {axis} group is {_some(rank.groups.get(axis, ()))}, "
                    f"the layout's {_some(expected)}"
                )
        for name, members in rank.groups.items():
            if rank.rank != members[0]:  # the first speaks for the group
                first = ranks[members[0]].groups.get(name)
                if first != members:
                    yield (
                        f"group {name}: rank {rank.rank} has {_some(members)} in it, rank {members[0]} "
                        f"{_some(first or ())}"
                    )
                continue
            for member in members:
                if name not in ranks[member].groups:
                    yield f"group {name}: rank {rank.rank} counts on rank {member}, which is not in it"


def stage_faults(run: RunShape, ranks: Sequence[SimulatedRank]) -> Iterator[str]:
    """Who sends to a rank must be who it hears, one stage before it."""
    layout = run.layout
    for rank in ranks:
        wraps = layout.vpp > 1
        for name, partner, back, step in (
            ("next", rank.next_stage, "previous_stage", 1),
            ("previous", rank.previous_stage, "next_stage", -1),
        ):
            stage = rank.place.pp + step
            if partner is None:
                if layout.pp > 1 and (wraps or 0 <= stage < layout.pp):
                    yield f"rank {rank.rank}: has no {name} stage"
                continue
            expected = RankCoordinates(tp=rank.place.tp, dp=rank.place.dp, pp=stage % layout.pp)
            if ranks[partner].place != expected:
                yield f"rank {rank.rank}: its {name} stage is rank {partner} at {ranks[partner].place}"
            elif getattr(ranks[partner], back) != rank.rank:
                yield (
                    f"rank {rank.rank}: its {name} stage is rank {partner}, whose "
                    f"{back.replace('_', ' ')} is {getattr(ranks[partner], back)}"
                )


def row_faults(ranks: Sequence[SimulatedRank], rows_of_step: int) -> Iterator[str]:
    """Every row of the step read by one data parallel rank, once, and by all the ranks of that replica."""
    readers: dict[int, list[int]] = defaultdict(list)
    of_replica: dict[int, SimulatedRank] = {}
    for rank in ranks:
        assert rank.rows is not None
        first = of_replica.setdefault(rank.place.dp, rank)
        if first is rank:
            for row in itertools.chain.from_iterable(rank.rows):
                readers[row].append(rank.place.dp)
        elif first.rows != rank.rows:
            yield f"ranks {first.rank} and {rank.rank} are of one replica and read other rows"
    readers.pop(EMPTY_ROW, None)
    for row, replicas in sorted(readers.items()):
        if len(replicas) > 1:
            yield f"row {row} is read {len(replicas)} times, by data parallel ranks {_some(replicas)}"
    if len(readers) != rows_of_step:
        yield f"{len(readers)} different rows are read, the step has {rows_of_step}"


def memory_problems(ranks: Sequence[SimulatedRank], budget_gib: float) -> tuple[str, ...]:
    """The ranks that need more than the budget, the worst first."""
    over = [rank for rank in ranks if (rank.memory.peak or 0) > budget_gib * GIB]
    if not over:
        return ()
    worst = max(over, key=lambda rank: rank.memory.peak or 0)
    memory = worst.memory
    return (
        f"parallel: {len(over)} of {len(ranks)} ranks need more than {budget_gib:g} GiB, the most rank "
        f"{worst.rank} (stage {worst.place.pp}): {(memory.peak or 0) / GIB:.1f} GiB, of which weights "
        f"{memory.weights / GIB:.1f}, gradients {memory.gradients / GIB:.1f}, optimizer "
        f"{memory.optimizer / GIB:.1f}, a step {(memory.step or 0) / GIB:.1f}; raise "
        "--tensor-model-parallel-size or --pipeline-model-parallel-size, or recompute "
        "(--recompute-granularity full)",
    )


def _shortened(faults: list[str]) -> list[str]:
    rest = len(faults) - _MOST_NAMED
    return faults[:_MOST_NAMED] + ([f"… and {rest} more of this kind"] if rest > 0 else [])


def _first(replicas: dict[tuple[int, ...], list[tuple[Shard, int]]]) -> int:
    return min(rank for held in replicas.values() for _, rank in held)


def _some(values: Iterable[object]) -> str:
    named = [str(value) for value in values]
    rest = len(named) - _MOST_NAMED
    return " ".join(named[:_MOST_NAMED]) + (f" and {rest} more" if rest > 0 else "") or "none"
