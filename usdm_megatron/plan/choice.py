"""One layout of a plan, by its rank or by its sizes; and what to do where there is none."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator
from dataclasses import replace

from usdm_megatron.errors import ConfigError
from usdm_megatron.parallel_config import ParallelConfig
from usdm_megatron.plan.gpus import GPUS
from usdm_megatron.plan.search import (
    RECOMPUTE,
    Plan,
    PlannedLayout,
    PlanRequest,
    judge,
    make_plan,
    short_name,
)
from usdm_megatron.plan.work import RowShape

_SIZES = ("tp", "pp", "vpp")


def choose(plan: Plan, text: str) -> PlannedLayout:
    """The layout that `text` means: its rank from 1, or `tp=2,pp=2,vpp=8,recompute=mlp`.

    What is left out is 1, and `none`. Raises `ConfigError` when it does not work, naming the nearest that
    does.
    """
    if text.isascii() and text.isdigit():
        rank = int(text)
        if not 1 <= rank <= len(plan.layouts):
            raise ConfigError(
                f"plan: there is no layout {text}; {len(plan.layouts)} work, give 1 to {len(plan.layouts)}"
            )
        return plan.layouts[rank - 1]
    sizes, recompute = _parse(text)
    parallel = plan.request.parallel(sizes["tp"], sizes["pp"], sizes["vpp"], recompute)
    judged = judge(plan.request, parallel, recompute)
    if isinstance(judged, PlannedLayout):
        return judged
    found = nearest(plan, parallel, recompute)
    assert found is not None  # a plan without layouts was refused before
    raise ConfigError(
        f"plan: {short_name(parallel, recompute)} does not work: {judged.reason}; the nearest that does is "
        f"{short_name(found.planned.parallel, found.recompute)} with {found.memory_gib:.1f} GiB"
    )


def _parse(text: str) -> tuple[dict[str, int], str]:
    sizes, recompute, problems = dict.fromkeys(_SIZES, 1), "none", []
    for part in text.split(","):
        name, _, value = (word.strip() for word in part.partition("="))
        if name in _SIZES and value.isascii() and value.isdigit() and int(value) > 0:
            sizes[name] = int(value)
        elif name == "recompute" and value in RECOMPUTE:
            recompute = value
        elif name == "recompute":
            problems.append(f"plan: layout {text}: recompute is {value!r}; it must be {', '.join(RECOMPUTE)}")
        elif name in _SIZES:
            problems.append(f"plan: layout {text}: {name} is {value!r}; it must be a count, at least 1")
        else:
            known = (*_SIZES, "recompute")
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {close[0]}?" if close else f"known are {', '.join(known)}, or a rank from 1"
            problems.append(f"plan: layout {text}: {name or part!r} is not known; {hint}")
    if problems:
        raise ConfigError(*problems)
    return sizes, recompute


def nearest(plan: Plan, to: ParallelConfig, recompute: str) -> PlannedLayout | None:
    """The working layout that differs least: in doublings of tp, pp and vpp, then in recomputation."""
    order = list(RECOMPUTE)

    def distance(found: PlannedLayout) -> tuple[float, int]:
        sizes = (
            (found.layout.tp, to.tensor_model_parallel_size),
            (found.layout.pp, to.pipeline_model_parallel_size),
            (found.layout.vpp, to.num_virtual_stages_per_pipeline_rank),
        )
        steps = sum(abs(math.log2(ours / theirs)) for ours, theirs in sizes)
        return steps, abs(order.index(found.recompute) - order.index(recompute))

    return min(plan.layouts, key=distance, default=None)


def refuse_nothing_fits(plan: Plan) -> None:
    """Raise `ConfigError` when no layout works: what comes nearest, and the nearest change that does."""
    if plan.layouts:
        return
    request = plan.request
    too_large = [entry for entry in plan.rejected if entry.memory_gib is not None]
    if not too_large:
        reasons = list(dict.fromkeys(entry.reason for entry in plan.rejected))
        raise ConfigError(
            f"plan: no layout of {request.world_size} ranks works; the first reasons:", *reasons[:4]
        )
    least = min(too_large, key=lambda entry: entry.memory_gib or 0.0)
    message = (
        f"plan: {request.model.name} fits in no layout of {request.world_size} x {request.hardware.name}: "
        f"the least is {least.memory_gib:.1f} GiB ({short_name(least.parallel, least.recompute)}), and "
        f"{request.hardware.memory_budget_gib:.1f} GiB may be used; "
    )
    for what, changed in _easier(request):
        best = make_plan(changed).layouts
        if best:
            found = best[0]
            raise ConfigError(
                f"{message}the nearest that fits: {what}, "
                f"{short_name(found.planned.parallel, found.recompute)} with {found.memory_gib:.1f} GiB"
            )
    raise ConfigError(f"{message}more ranks, shorter rows and bf16 gradients do not help; take larger GPUs")


def _easier(request: PlanRequest) -> Iterator[tuple[str, PlanRequest]]:
    """Changes that ask less of a GPU, the smallest first."""
    if request.fp32_gradients:
        yield (
            "--no-accumulate-allreduce-grads-in-fp32 (gradients in bf16)",
            replace(request, fp32_gradients=False),
        )
    larger = [gpu for gpu in GPUS.values() if gpu.memory_budget_gib > request.hardware.memory_budget_gib]
    for gpu in sorted(larger, key=lambda gpu: gpu.memory_budget_gib):
        yield f"--gpu {gpu.name}", replace(request, hardware=gpu)
    for times in (2, 4, 8):
        world = request.world_size * times
        yield f"--world-size {world}", replace(request, world_size=world)
    for parts in (2, 4, 8):
        length = request.data.seq_length // parts
        if length:
            data = replace(request.data, seq_length=length)
            row = RowShape.of_one_sample(length)
            yield f"--seq-length {length}", replace(request, data=data, row=row)
