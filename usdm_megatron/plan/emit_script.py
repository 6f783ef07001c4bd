"""The launch script of a planned layout: `examples/pretrain_usdm.sh` with this layout's variables."""

from __future__ import annotations

from dataclasses import fields

from usdm_megatron.config import CoreAttention
from usdm_megatron.errors import ConfigError
from usdm_megatron.parallel_config import ParallelConfig
from usdm_megatron.plan.search import PlannedLayout, short_name

# what the example script passes itself: three as TP, PP and VPP, the others always, or by the planner's rule
_OF_THE_EXAMPLE = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "num_virtual_stages_per_pipeline_rank",
    "use_tp_pp_dp_mapping",
    "overlap_grad_reduce",
    "overlap_param_gather",
)


def launch_script(found: PlannedLayout, core_attention: CoreAttention = "auto") -> str:
    """Bash for every node of the run; where the data and the checkpoint are is the caller's to say.

    `ConfigError` for a world that is no whole number of nodes.
    """
    planned, layout, data = found.planned, found.layout, found.planned.data
    per_node = min(planned.hardware.gpus_per_node, layout.world_size)
    if layout.world_size % per_node:
        raise ConfigError(
            f"plan: --emit-script: {layout.world_size} ranks are no whole number of nodes of {per_node}; "
            f"plan for a --world-size that is, or give --gpu a YAML file with another gpus_per_node"
        )
    all_flags = extra_flags(found) + [f"--core-attention {core_attention}"] * (core_attention != "auto")
    flags = "".join(f"    {flag}\n" for flag in all_flags)
    return f"""#!/usr/bin/env bash
# {planned.model.name} on {layout.world_size} x {planned.hardware.name}, as `usdm-megatron plan` chose:
# {short_name(planned.parallel, found.recompute)}; dp={layout.dp}, {planned.micro_batches} micro-batches
# predicted: {_prediction(found)}
#
# Run it on every node, from the repository; again to resume. To set, beside NODE_RANK and MASTER_ADDR:
#   CHECKPOINT  made by tools/convert_hf_checkpoint.py import
#   DATA        prefix of a token store, made by tools/preprocess_data.py    VALID_DATA  the same (optional)
#   OUT         the run, on a shared file system
#   RECIPE      corrected (default) or usdm
# EXTRA_ARGS is added to the flags here, and goes before them.
set -euo pipefail
: "${{CHECKPOINT:?is not set}}" "${{DATA:?is not set}}" "${{OUT:?is not set}}"
export CHECKPOINT DATA OUT RECIPE="${{RECIPE:-corrected}}"
export NNODES={layout.world_size // per_node} GPUS_PER_NODE={per_node} MASTER_PORT="${{MASTER_PORT:-29500}}"
export TP={layout.tp} PP={layout.pp} VPP={layout.vpp}
flags=(
{flags}    --seq-length {data.seq_length}
    --global-batch-size {data.global_batch_size}
    --micro-batch-size {data.micro_batch_size}
    {"--bf16" if planned.bf16 else "--no-bf16"}
)
export EXTRA_ARGS="${{flags[*]}} ${{EXTRA_ARGS:-}}"
exec bash examples/pretrain_usdm.sh
"""


def extra_flags(found: PlannedLayout) -> list[str]:
    """Flags, each with its values, for all of the layout that the example script has no variable for."""
    parallel, default, flags = found.planned.parallel, ParallelConfig(), []
    for entry in fields(ParallelConfig):
        name, value = entry.name.replace("_", "-"), getattr(parallel, entry.name)
        if entry.name == "sequence_parallel":  # the example sets it whenever there is tensor parallelism
            flags += [] if value or found.layout.tp == 1 else ["--no-sequence-parallel"]
        elif entry.name in _OF_THE_EXAMPLE or value == getattr(default, entry.name):
            continue
        elif isinstance(value, bool):
            flags.append(f"--{name}" if value else f"--no-{name}")
        elif isinstance(value, tuple):
            flags.append(f"--{name} {' '.join(value)}")
        else:
            flags.append(f"--{name} {value}")
    return flags


def _prediction(found: PlannedLayout) -> str:
    memory = f"{found.memory_gib:.1f} GiB on the fullest rank, bubble {found.bubble:.1%}"
    if found.step is None:
        return f"{memory}; no times, for want of kernel rates"
    mfu = "" if found.mfu_full_s is None else f", {found.mfu_full_s:.1%} MFU (full-S formula)"
    return (
        f"{memory},\n#   {found.step.total:.3f} s a step, {found.tokens_per_s_per_gpu:,.0f} tokens/s/GPU{mfu}"
    )
