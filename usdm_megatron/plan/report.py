"""The plan for people and for programs: a table, JSON, and the arithmetic of one layout."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from usdm_megatron.plan.communication import Link
from usdm_megatron.plan.search import GIB, Plan, PlannedLayout, RejectedLayout, short_name
from usdm_megatron.plan.step_time import missing_rates
from usdm_megatron.plan.traffic import Traffic, traffic
from usdm_megatron.plan.work import ModelFlops

_COLUMNS = (
    "      tp  pp vpp   dp    m  recompute      GiB  bubble   step s  tok/s/GPU   MFU  MFU full-S  "
    "tensor · pipeline · data exposed"
)
# null where a layout does not work
_OF_LAYOUTS_THAT_WORK = (
    "micro_batches", "bubble", "step_time_s", "tokens_per_s_per_gpu", "mfu", "mfu_full_s",
)  # fmt: skip


def as_json(plan: Plan) -> dict[str, Any]:
    """Plain values: `model`, `hardware` with the source of every rate, `layouts` best first, `rejected`."""
    request = plan.request
    return {
        "model": {
            "name": request.model.name,
            "parameters": request.model.parameters,
            "vocabulary": request.model.vocabulary.size,
        },
        "hardware": {
            "name": request.hardware.name,
            "peak_tflops": request.hardware.peak_tflops,
            "memory_gib": request.hardware.memory_gib,
            "memory_budget_gib": request.hardware.memory_budget_gib,
            "rates": {
                name: {
                    "source": rate.source,
                    "reference": rate.reference,
                    "at": {f"{size:g}": value for size, value in rate.points},
                }
                for name, rate in request.hardware.rates.items()
            },
        },
        "world_size": request.world_size,
        "seq_length": request.data.seq_length,
        "global_batch_size": request.data.global_batch_size,
        "micro_batch_size": request.data.micro_batch_size,
        "row": {"tokens": request.row.tokens, "source": request.row.source},
        "gflop_per_token": _gflop_per_token(plan),
        "layouts": [_layout_json(layout) for layout in plan.layouts],
        "rejected": [_rejected_json(entry) for entry in plan.rejected],
    }


def _layout_json(found: PlannedLayout) -> dict[str, Any]:
    layout, step = found.layout, found.step
    return {
        "tp": layout.tp,
        "pp": layout.pp,
        "vpp": layout.vpp,
        "cp": 1,
        "dp": layout.dp,
        "micro_batches": found.planned.micro_batches,
        "recompute": found.recompute,
        "rank_order": layout.order,
        "sequence_parallel": found.planned.parallel.sequence_parallel,
        "memory_gib": found.memory_gib,
        "memory": {name: size / GIB for name, size in asdict(found.memory[found.fullest_stage]).items()},
        "bubble": found.bubble,
        "step_time_s": found.step_time_s,
        "tokens_per_s_per_gpu": found.tokens_per_s_per_gpu,
        "mfu": found.mfu,
        "mfu_full_s": found.mfu_full_s,
        "days": found.days,
        "missing_rates": list(missing_rates(found.planned.hardware, layout)),
        "communication": [_traffic_json(entry) for entry in traffic(found.planned, step)],
    }


def _traffic_json(entry: Traffic) -> dict[str, Any]:
    return {
        "kind": entry.kind,
        "what": entry.what,
        "gb": entry.bytes / 1e9,
        "link": entry.link.place,
        "busy_s": entry.busy_s,
        "exposed_s": entry.exposed_s,
        "hides": entry.hides,
    }


def _rejected_json(entry: RejectedLayout) -> dict[str, Any]:
    parallel = entry.parallel
    return {
        "tp": parallel.tensor_model_parallel_size,
        "pp": parallel.pipeline_model_parallel_size,
        "vpp": parallel.num_virtual_stages_per_pipeline_rank,
        "cp": 1,
        "dp": None if entry.layout is None else entry.layout.dp,
        "recompute": entry.recompute,
        "memory_gib": entry.memory_gib,
        **dict.fromkeys(_OF_LAYOUTS_THAT_WORK),
        "reason": entry.reason,
    }


def _gflop_per_token(plan: Plan) -> dict[str, float]:
    """Of a training step without recomputation, by the two ways of counting attention."""
    request = plan.request
    flops, row = ModelFlops.of(request.model), request.row
    pairs = row.causal_pairs(request.model.architecture.sliding_window)
    return {
        "linear": flops.per_token / 1e9,
        "attention": flops.per_pair * pairs / row.tokens / 1e9,
        "attention_full_s": flops.per_pair * row.seq_length / 1e9,
    }


def as_table(plan: Plan, most: int) -> str:
    """The best `most` layouts, what they stand on, and how many others do not work, and why."""
    request, hardware = plan.request, plan.request.hardware
    gflop = _gflop_per_token(plan)
    lines = [
        f"{request.model.name}: {request.model.parameters:,} parameters, "
        f"{request.model.vocabulary.size:,} ids; {request.world_size} x {hardware.name}, "
        f"{request.data.global_batch_size} rows of {request.data.seq_length} tokens a step "
        f"({request.row.source})",
        f"GFLOP a token: linear {gflop['linear']:.1f}, attention {gflop['attention']:.1f} "
        f"(over the full {request.data.seq_length}: {gflop['attention_full_s']:.1f})",
        "",
        *_rate_lines(plan),
        "",
        _COLUMNS + ("     days" if request.rows is not None else ""),
    ]
    lines += [_table_line(rank, layout) for rank, layout in enumerate(plan.layouts[:most], 1)]
    hidden = len(plan.layouts) - most
    if hidden > 0:
        lines.append(f"      … {hidden} more (--json lists all)")
    if any("layernorm" in layout.recompute for layout in plan.layouts[:most]):
        lines.append("      layernorm: only core's Transformer Engine layers recompute norms")
    lines += ["", *_rejected_lines(plan)]
    return "\n".join(lines)


def _rate_lines(plan: Plan) -> list[str]:
    """The source of each rate, and what an unknown one means."""
    lines = []
    for name, rate in plan.request.hardware.rates.items():
        if not rate.known:
            lines.append(f"  {name:<18}none")
            continue
        low, high = rate.points[0][1], rate.points[-1][1]
        figure = f"{low:,.4g}" if low == high else f"{low:,.4g} to {high:,.4g}"
        lines.append(f"  {name:<18}{rate.source}: {figure} ({rate.reference})")
    if any(layout.step is None for layout in plan.layouts):
        lines.append(
            "  Without these no time can be predicted: times and MFU are null, and layouts are ranked by "
            "recomputed FLOPs and bubble, then memory. usdm-megatron plan --calibrate measures them."
        )
    elif any(rate.source == "published" for rate in plan.request.hardware.rates.values()):
        lines.append(
            "  Published rates are other machines': trust the order of layouts more than their seconds, and "
            "measure with usdm-megatron plan --calibrate where you can."
        )
    return lines


def _table_line(rank: int, found: PlannedLayout) -> str:
    layout = found.layout
    line = (
        f"{rank:>4}  {layout.tp:>2}  {layout.pp:>2}  {layout.vpp:>2} {layout.dp:>4} "
        f"{found.planned.micro_batches:>4}  {found.recompute:<13}{found.memory_gib:>5.1f}  "
        f"{found.bubble:>6.1%}"
    )
    if found.step is None:
        return line + "     null       null   null        null  null"
    data = found.step.reduce + found.step.gather
    line += (
        f"  {found.step.total:>7.3f}  {found.tokens_per_s_per_gpu:>9,.0f}  {_percent(found.mfu):>5}  "
        f"{_percent(found.mfu_full_s):>10}  {found.step.tensor_exposed:.3f} · {found.step.pipeline:.3f} · "
        f"{data:.3f} s"
    )
    return line if found.days is None else f"{line}{found.days:>21.2f}"


def _percent(share: float | None) -> str:
    return "null" if share is None else f"{share:.1%}"


def _rejected_lines(plan: Plan) -> list[str]:
    """How many layouts are out, by the kind of reason."""
    kinds: dict[str, int] = {}
    for entry in plan.rejected:
        kind = "memory" if entry.memory_gib is not None else entry.reason.partition("; ")[0]
        kinds[kind] = kinds.get(kind, 0) + 1
    if not kinds:
        return []
    most = sorted(kinds.items(), key=lambda item: -item[1])[:5]
    return [f"{len(plan.rejected)} layouts do not work:"] + [f"  {count:>4}  {kind}" for kind, count in most]


def explain(found: PlannedLayout) -> str:
    """The arithmetic of one layout: memory of every stage, time of a step, what is sent."""
    planned, layout = found.planned, found.layout
    lines = [
        f"{short_name(planned.parallel, found.recompute)}: dp={layout.dp}, "
        f"{planned.micro_batches} micro-batches of {planned.tokens} tokens, rank order {layout.order}",
        "",
        *_memory_lines(found),
        "",
        *_time_lines(found),
        "",
        *_traffic_lines(found),
    ]
    return "\n".join(lines)


def _memory_lines(found: PlannedLayout) -> list[str]:
    stages = found.memory
    names = [name for name in type(stages[0]).__dataclass_fields__]
    lines = [f"memory, GiB a rank   stage  {'  '.join(f'{name:>11}' for name in names)}  {'total':>11}"]
    for number, stage in enumerate(stages):
        parts = "  ".join(f"{getattr(stage, name) / GIB:>11.2f}" for name in names)
        fullest = "  <- the fullest" if number == found.fullest_stage and len(stages) > 1 else ""
        lines.append(f"{number:>26}  {parts}  {stage.total / GIB:>11.2f}{fullest}")
    return [*lines, f"  may be used: {found.planned.hardware.memory_budget_gib:.1f}"]


def _time_lines(found: PlannedLayout) -> list[str]:
    planned, layout, step = found.planned, found.layout, found.step
    slots = f"{layout.pp - 1}/({layout.vpp} x {planned.micro_batches})"
    idle = f"bubble (pp-1)/(vpp m) = {slots} = {found.bubble:.2%}"
    if step is None:
        missing = ", ".join(missing_rates(planned.hardware, layout))
        return [idle, f"time: not predicted, for want of {missing} (usdm-megatron plan --calibrate)"]
    stage = step.slowest
    lines = ["time of a micro-batch on the slowest stage, ms"]
    for name, part in (
        ("forward", stage.forward),
        ("backward", stage.backward),
        ("recompute", stage.recompute),
    ):
        lines.append(
            f"  {name:<10}GEMM {1e3 * part.gemm:8.2f}  attention {1e3 * part.attention:7.2f}  elementwise "
            f"{1e3 * part.elementwise:7.2f}  tensor parallel, exposed {1e3 * part.tensor_parallel:7.2f}  "
            f"= {1e3 * part.total:8.2f}"
        )
    lines += [
        "",
        "time of a step, s",
        f"  {planned.micro_batches} micro-batches x {1e3 * stage.total:.2f} ms{step.steady:>34.4f}",
        f"  {idle:<50}{step.bubble:>8.4f}",
        f"  {'pipeline sends, exposed':<50}{step.pipeline:>8.4f}",
        f"  {'gradients, exposed':<50}{step.reduce:>8.4f}",
        f"  {'weights, exposed':<50}{step.gather:>8.4f}",
        f"  {'adding gradients to their buffer':<50}{step.accumulate:>8.4f}",
        f"  {'optimizer':<50}{step.optimizer:>8.4f}",
        f"  {'step':<50}{step.total:>8.4f}",
    ]
    return lines + _rate_of_work(found)


def _rate_of_work(found: PlannedLayout) -> list[str]:
    planned = found.planned
    assert found.step is not None
    lines = [
        f"{planned.data.global_batch_size} rows x {planned.row.tokens:,.0f} tokens / "
        f"{found.step.total:.4f} s / {found.layout.world_size} = "
        f"{found.tokens_per_s_per_gpu:,.0f} tokens/s/GPU"
    ]
    if found.mfu is not None:
        flops = ModelFlops.of(planned.model)
        window = planned.model.architecture.sliding_window
        for name, row, share in (
            ("true", flops.of_row(planned.row, window), found.mfu),
            ("full-S", flops.of_row_full_s(planned.row), found.mfu_full_s),
        ):
            per_token = row / planned.row.tokens / 1e9
            lines.append(
                f"MFU, {name}: {per_token:.1f} GFLOP a token x {found.tokens_per_s_per_gpu:,.0f} / "
                f"{planned.hardware.peak_tflops:,.0f} TFLOP/s = {share:.1%}"
            )
    if found.days is not None:
        lines.append(f"{found.rows:,} rows: {found.days:.2f} days")
    return lines


def _between_nodes(link: Link) -> str:
    """A ring leaves a node once, by the interfaces of all its members there."""
    if link.members_in_node == 1:
        return "between nodes"
    return f"in a ring of {link.members_in_node} ranks a node, 1/{link.members_in_node} between nodes"


def _traffic_lines(found: PlannedLayout) -> list[str]:
    lines = ["communication of the busiest rank in a step"]
    for entry in traffic(found.planned, found.step):
        if entry.link.place == "none":
            lines.append(f"  {entry.kind:<26}none: one rank")
            continue
        where = "in the node" if entry.link.place == "node" else _between_nodes(entry.link)
        time = (
            "" if entry.busy_s is None else f", {entry.busy_s:.4f} s, {entry.exposed_s:.4f} s of it exposed"
        )
        lines.append(
            f"  {entry.kind:<26}{entry.bytes / 1e9:8.2f} GB {where} ({entry.what}){time}; "
            f"hides: {entry.hides}"
        )
    return lines
