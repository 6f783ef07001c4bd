"""The GPUs that are known by name: data sheets, and rates that were published, each with its reference.

Published rates were reached on somebody else's machine; for the card at hand `plan --calibrate` does better.
The A100's GEMM rates are what GEMMs reach inside a run: with one rate for each tensor parallel size the
planner's step times equal published ones (`benchmarks/published_steps.py`, docs/scaling.md). For Hopper there
are only a kernel's best, which no run reaches.
"""

from __future__ import annotations

from usdm_megatron.plan.hardware import Hardware, Rate

_MAMF = (
    "best shape found by mamf-finder, an upper bound: github.com/stas00/ml-engineering, compute/accelerator, "
    "'Maximum Achievable Matmul FLOPS comparison table'"
)
_FLASH = "FlashAttention-2, causal, head dim 128, forward + backward: github.com/Dao-AILab/flash-attention, "
_NCCL_A100 = (
    "nccl-tests all_reduce on 8 x A100: github.com/stas00/ml-engineering, network, 'Real network throughput'"
)
_NCCL_H200 = (
    "all_reduce_bench on 8 x H200 (the same NVLink 4): github.com/stas00/ml-engineering, network, "
    "'Real network throughput'"
)
_A100_MEMORY = (
    "88 % of the data sheet's {peak} GB/s, the share that was read on an A100-80GB: "
    "forums.developer.nvidia.com/t/trouble-to-reach-peak-bandwidth-of-a100/339083"
)
_H100_MEMORY = (
    "86.7 % of the data sheet's {peak} GB/s, the share that was copied on an H100: "
    "github.com/aigatech/vpbenchmarking"
)
MIB = 2.0**20


def _published(reference: str, points: dict[float, float]) -> Rate:
    return Rate("published", reference, tuple(sorted(points.items())))


_A100_NODE = _published(
    _NCCL_A100,
    {
        MIB: 18.0,
        2 * MIB: 36.18,
        4 * MIB: 72.33,
        8 * MIB: 109.93,
        16 * MIB: 106.16,
        32 * MIB: 138.49,
        64 * MIB: 171.54,
        128 * MIB: 176.92,
        256 * MIB: 194.07,
        512 * MIB: 222.72,
        1024 * MIB: 229.04,
        4096 * MIB: 233.88,
        16384 * MIB: 234.89,
    },
)
_H200_NODE = _published(
    _NCCL_H200,
    {
        MIB: 39.93,
        2 * MIB: 64.53,
        4 * MIB: 107.16,
        8 * MIB: 155.53,
        16 * MIB: 219.89,
        32 * MIB: 275.84,
        64 * MIB: 346.51,
        128 * MIB: 401.93,
        256 * MIB: 436.15,
        512 * MIB: 450.29,
        1024 * MIB: 463.58,
        4096 * MIB: 473.10,
        16384 * MIB: 482.26,
    },
)
_HDR = _published(
    "96 GB/s of four 200 Gb/s interfaces, nccl-tests all_reduce on 3 nodes of 8 x A100-40GB: "
    "github.com/NVIDIA/nccl-tests/issues/119",
    {1.0: 24.0},
)
_NDR = _published(
    "46 to 48 GB/s a 400 Gb/s interface: github.com/NVIDIA/nccl-tests/issues/290 (NVIDIA's answer)",
    {1.0: 46.0},
)
_A100_GEMM = _published(
    "fitted: where predicted step times equal those of 47 runs, Llama 13B to 65B on A100-80GB, by tp: arXiv "
    "2311.05610, github.com/Aleph-Alpha/NeurIPS-WANT-submission-efficient-parallelization-layouts",
    {1.0: 240.0, 2.0: 218.0, 4.0: 204.0, 8.0: 170.0},
)
_H100_GEMM = _published(_MAMF, {1.0: 794.5})
_A100_ATTENTION = _published(
    _FLASH + "assets/flash2_a100_fwd_bwd_benchmark.png",
    {512: 99.0, 1024: 133.0, 2048: 155.0, 4096: 173.0, 8192: 182.0, 16384: 189.0},
)
_H100_ATTENTION = _published(
    _FLASH + "assets/flash2_h100_fwd_bwd_benchmark.png",
    {512: 163.0, 1024: 221.0, 2048: 265.0, 4096: 294.0, 8192: 308.0, 16384: 328.0},
)


def _a100(name: str, memory_gib: float, budget_gib: float, memory_gb_per_s: float) -> Hardware:
    return Hardware(
        name=name,
        memory_gib=memory_gib,
        memory_budget_gib=budget_gib,
        gpus_per_node=8,
        peak_tflops=312.0,
        gemm_tflops=_A100_GEMM,
        attention_tflops=_A100_ATTENTION,
        memory_gb_per_s=_published(
            _A100_MEMORY.format(peak=f"{memory_gb_per_s:,.0f}"), {1.0: 0.88 * memory_gb_per_s}
        ),
        node_gb_per_s=_A100_NODE,
        network_gb_per_s=_HDR,
    )


def _hopper(name: str, memory_gib: float, budget_gib: float, memory_gb_per_s: float) -> Hardware:
    return Hardware(
        name=name,
        memory_gib=memory_gib,
        memory_budget_gib=budget_gib,
        gpus_per_node=8,
        peak_tflops=989.0,
        gemm_tflops=_H100_GEMM,
        attention_tflops=_H100_ATTENTION,
        memory_gb_per_s=_published(
            _H100_MEMORY.format(peak=f"{memory_gb_per_s:,.0f}"), {1.0: 0.867 * memory_gb_per_s}
        ),
        node_gb_per_s=_H200_NODE,
        network_gb_per_s=_NDR,
    )


GPUS: dict[str, Hardware] = {
    gpu.name: gpu
    for gpu in (
        _a100("a100-40gb", 39.4, 35.0, 1555.0),  # SXM4, DGX A100: 8 x HDR
        _a100("a100-80gb", 79.2, 70.5, 2039.0),
        _hopper("h100", 79.1, 70.4, 3350.0),  # SXM5, DGX H100: 8 x NDR
        _hopper("h200", 139.8, 124.4, 4800.0),
    )
}
