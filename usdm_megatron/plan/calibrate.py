"""Measure the rates of the GPU, or CPU ranks, at hand: the kernels of a model's layer, and its collectives.

Every kernel runs forward and backward, at the layer's own shapes, and its rate is the planner's own count of
FLOPs or bytes over the time it took. With several ranks all measure at once, as they will run.

    T = tokens of a micro-batch, H = hidden, N = rows of a weight's shard, K = its columns
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from usdm_megatron.config import CoreAttention
from usdm_megatron.layout import ParallelLayout
from usdm_megatron.model.attention import packed_core_attention, resolve_backend
from usdm_megatron.model.fused import rms_norm, swiglu
from usdm_megatron.model.packed_sequence import PackedSequence, apply_rope
from usdm_megatron.parallel_config import ParallelConfig
from usdm_megatron.plan.hardware import USABLE_SHARE, Device, Hardware, Rate
from usdm_megatron.plan.model_shape import ModelShape
from usdm_megatron.plan.work import causal_pairs, norm_bytes, residual_bytes, rope_bytes, swiglu_bytes
from usdm_megatron.runtime.process_groups import ProcessGroups, open_process_groups
from usdm_megatron.runtime.ranks import RankEnvironment

_TENSOR_SIZES = (1, 2, 4, 8)
_SAMPLE_LENGTHS = (128, 256, 512, 1024, 2048, 4096, 8192)
_PAYLOADS_MIB = (1, 4, 16, 64, 256)
_LEAST_RUNS = 5
_PRODUCTS = 7  # of attention, forward and backward
Clock = Callable[[], float]


@dataclass(frozen=True)
class Calibration:
    """What to measure: the layer of `model` at micro-batches of `tokens`."""

    model: ModelShape
    tokens: int
    bf16: bool
    backend: CoreAttention = "auto"
    largest_payload_mib: int = 256
    kernel_s: float = 0.5  # at least, for each kernel


def calibrate(
    asked: Calibration, environment: RankEnvironment, store: dist.Store | None = None
) -> Hardware | None:
    """The hardware as measured on these ranks; on ranks other than 0 None. `store`: where tests meet."""
    in_node = min(int(os.environ.get("LOCAL_WORLD_SIZE", environment.world_size)), environment.world_size)
    layout = ParallelLayout(environment.world_size, tp=in_node)
    with open_process_groups(layout, environment, timeout=timedelta(minutes=10), store=store) as groups:
        bench = _Bench(asked, groups)
        node = bench.link(groups.tp, asked.largest_payload_mib)
        network = bench.link(groups.dp, asked.largest_payload_mib)
        hardware = bench.hardware(in_node, node, network)
    return hardware if environment.rank == 0 else None


class _Bench:
    """The measurements of one rank among all."""

    def __init__(self, asked: Calibration, groups: ProcessGroups) -> None:
        self._asked, self._groups = asked, groups
        self._device = groups.device
        self._dtype = torch.bfloat16 if asked.bf16 else torch.float32

    def hardware(self, in_node: int, node: Rate, network: Rate) -> Hardware:
        """All rates of this machine."""
        from usdm_megatron.train.metrics import FlopCounter

        name = self._device_name()
        device: Device = "cuda" if self._device.type == "cuda" else "cpu"
        gib = self._memory_gib(in_node)
        counter = FlopCounter.of(self._asked.model.architecture, self._asked.model.vocabulary.size, name)
        return Hardware(
            name=name,
            memory_gib=gib,
            memory_budget_gib=USABLE_SHARE * gib,
            gpus_per_node=in_node,
            peak_tflops=counter.peak_tflops if self._asked.bf16 else None,
            device=device,
            dtype="bf16" if self._asked.bf16 else "fp32",
            gemm_tflops=self._rate("GEMMs of the layer, forward and backward, by tp", self._gemm()),
            attention_tflops=self._rate(f"core attention ({self._backend}), by tokens", self._attention()),
            memory_gb_per_s=self._rate("norms, residuals, RoPE, SwiGLU of the layer", self._elementwise()),
            node_gb_per_s=node,
            network_gb_per_s=network,
        )

    def link(self, group: dist.ProcessGroup, largest_mib: int) -> Rate:
        """Bus bandwidth of reduce-scatters and all-gathers in `group`, by bytes of the whole tensor."""
        size = group.size()
        if size == 1:
            return Rate()
        points = {}
        for mib in (mib for mib in _PAYLOADS_MIB if mib <= largest_mib):
            elements = mib * 2**20 // torch.finfo(self._dtype).bits * 8 // size
            whole = torch.ones(elements * size, dtype=self._dtype, device=self._device)
            part = torch.ones(elements, dtype=self._dtype, device=self._device)

            def both(whole: torch.Tensor = whole, part: torch.Tensor = part) -> None:
                dist.reduce_scatter_tensor(part, whole, group=group)
                dist.all_gather_into_tensor(whole, part, group=group)

            sent = 2 * (size - 1) / size * whole.numel() * whole.element_size()
            points[float(mib * 2**20)] = sent / self._seconds(both) / 1e9
        return self._rate(f"reduce-scatter and all-gather of {size} ranks", points)

    def _gemm(self) -> dict[float, float]:
        a, tokens = self._asked.model.architecture, self._asked.tokens
        points = {}
        for tp in _TENSOR_SIZES:
            if a.kv_heads % tp or a.ffn % tp:
                continue
            shapes = (
                (a.qkv_rows // tp, a.hidden),
                (a.hidden, a.heads * a.head_dim // tp),
                (2 * a.ffn // tp, a.hidden),
                (a.hidden, a.ffn // tp),
            )
            seconds = sum(self._linear_seconds(rows, columns) for rows, columns in shapes)
            flops = sum(6.0 * tokens * rows * columns for rows, columns in shapes)
            points[float(tp)] = flops / seconds / 1e12
        return points

    def _linear_seconds(self, rows: int, columns: int) -> float:
        """Forward, and the gradients of input and weight."""
        x_TK = self._random(self._asked.tokens, columns)
        weight_NK, grad_TN = self._random(rows, columns), self._random(self._asked.tokens, rows)

        def run() -> None:
            torch.matmul(x_TK, weight_NK.t())
            torch.matmul(grad_TN, weight_NK)
            torch.matmul(grad_TN.t(), x_TK)

        return self._kernel_seconds(run)

    def _attention(self) -> dict[float, float]:
        a, tokens = self._asked.model.architecture, self._asked.tokens
        attend = self._core_attention()
        points = {}
        for length in [length for length in _SAMPLE_LENGTHS if length <= tokens] or [tokens]:
            lengths = [length] * (tokens // length)
            total = sum(lengths)
            heads = [(total, count, a.head_dim) for count in (a.heads, a.kv_heads, a.kv_heads)]
            q, k, v = (self._random(*shape).requires_grad_() for shape in heads)
            row = PackedSequence.of_lengths(lengths, self._device)

            def run(q=q, k=k, v=v, row=row) -> None:  # type: ignore[no-untyped-def]
                attend(q, k, v, row, a.sliding_window).sum().backward()

            pairs = len(lengths) * causal_pairs(length, a.sliding_window)
            flops = _PRODUCTS * 2.0 * pairs * a.heads * a.head_dim
            points[float(length)] = flops / self._kernel_seconds(run) / 1e12
        return points

    def _core_attention(self) -> Callable[..., torch.Tensor]:
        from megatron.core.transformer.enums import AttnMaskType

        from usdm_megatron.model.architecture import build_transformer_config

        a = self._asked.model.architecture
        config = build_transformer_config(a, ParallelConfig(), dtype=self._dtype)
        module = packed_core_attention(self._backend)(
            config, 1, AttnMaskType.causal, "self", pg_collection=self._groups.collection
        )
        return module.attend

    def _elementwise(self) -> dict[float, float]:
        a, tokens, element = self._asked.model.architecture, self._asked.tokens, self._element
        stream, weight = (
            self._random(tokens, a.hidden).requires_grad_(),
            self._random(a.hidden).requires_grad_(),
        )
        gate = self._random(tokens, 2 * a.ffn).requires_grad_()
        turned = self._random(tokens, a.heads + a.kv_heads, a.head_dim).requires_grad_()
        angles = self._random(tokens, a.head_dim)
        residual = self._random(tokens, a.hidden)

        def run() -> None:
            for _ in range(2):
                rms_norm(stream, weight, a.rms_eps).backward(residual)
                torch.add(stream.detach(), residual)
                torch.add(stream.detach(), residual)
            gated = swiglu(gate)
            gated.backward(gated.detach())
            rotated = apply_rope(turned, angles, angles)
            rotated.backward(rotated.detach())
            for tensor in (stream, weight, gate, turned):
                tensor.grad = None

        device: Device = "cuda" if self._device.type == "cuda" else "cpu"
        counted = [
            kind(self._asked.model, tokens, element, device)
            for kind in (norm_bytes, residual_bytes, rope_bytes, swiglu_bytes)
        ]
        moved = sum(each.forward + each.backward for each in counted)
        return {1.0: moved / self._kernel_seconds(run) / 1e9}

    def _kernel_seconds(self, run: Callable[[], object]) -> float:
        """Of kernels alone; of one CPU thread its own time, which ranks that share a core don't add to."""
        one_thread = self._device.type == "cpu" and torch.get_num_threads() == 1
        return self._seconds(run, time.thread_time if one_thread else time.perf_counter)

    def _seconds(self, run: Callable[[], object], clock: Clock = time.perf_counter) -> float:
        """The fastest run, the mean over all ranks, which run together: what undisturbed kernels take."""
        run()
        times: list[float] = []
        while not self._agree(len(times) >= _LEAST_RUNS and sum(times) >= self._asked.kernel_s):
            self._wait()
            started_at = clock()
            run()
            self._wait()
            times.append(clock() - started_at)
        total = torch.tensor([min(times)], dtype=torch.float64, device=self._device)
        dist.all_reduce(total)
        return total.item() / dist.get_world_size()

    def _agree(self, done: bool) -> bool:
        """Whether rank 0 is done: collectives need as many runs on each rank."""
        flag = torch.tensor([float(done)], device=self._device)
        dist.broadcast(flag, src=0)
        return bool(flag.item())

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize()

    def _random(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=self._dtype, device=self._device)

    def _rate(self, what: str, points: dict[float, float]) -> Rate:
        ranks = dist.get_world_size()
        reference = f"{what}: {self._asked.model.name}, {self._asked.tokens} tokens, {ranks} ranks at once, "
        reference += f"{str(self._dtype).removeprefix('torch.')}, torch {torch.__version__}"
        return Rate("measured", reference, tuple(sorted(points.items())))

    @property
    def _backend(self) -> CoreAttention:
        return resolve_backend(self._asked.backend, self._dtype)

    @property
    def _element(self) -> int:
        return self._dtype.itemsize

    def _device_name(self) -> str:
        if self._device.type == "cuda":
            return torch.cuda.get_device_name(self._device)
        return f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads a rank"

    def _memory_gib(self, in_node: int) -> float:
        if self._device.type == "cuda":
            return torch.cuda.get_device_properties(self._device).total_memory / 2**30
        pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return pages / in_node / 2**30
