"""What CUDA's fused kernels keep for the backward pass, on tensors without memory.

On the meta device torch takes RMSNorm and attention apart, as it does on the CPU, and keeps what CUDA never
makes: fp32 copies, matrices of scores. Inside `as_on_cuda` they keep what the kernels keep.

T = tokens, H = query heads, G = key-value heads, D = head dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from usdm_megatron.model.attention import PackedCoreAttention


@contextmanager
def as_on_cuda(chunks: Iterable[torch.nn.Module]) -> Iterator[None]:
    """Inside, these model chunks keep what they would on a GPU; their results mean nothing."""
    for chunk in chunks:
        for module in chunk.modules():
            if isinstance(module, PackedCoreAttention):
                module.attend = fused_attention
    with _FusedNorms():
        yield


def fused_attention(q_THD: Tensor, k_TGD: Tensor, v_TGD: Tensor, row: Any, window: int | None) -> Tensor:
    """Flash attention over a packed row: keeps its operands, its output and a log-sum-exp a head."""
    return _FlashAttention.apply(q_THD, k_TGD, v_TGD)


class _FlashAttention(torch.autograd.Function):
    """As `torch_attn::_varlen_attn` (torch 2.13) and flash-attn's own."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        output = torch.empty_like(q)
        log_sum_HT = q.new_empty((q.size(1), q.size(0)), dtype=torch.float32)
        ctx.save_for_backward(q, k, v, output, log_sum_HT)
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        q, k, v, _, _ = ctx.saved_tensors
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


class _FusedRMSNorm(torch.autograd.Function):
    """As `aten::_fused_rms_norm` on CUDA (torch 2.13, native/cuda/layer_norm_kernel.cu): keeps its input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None) -> Tensor:
        inverse_rms = x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)
        ctx.save_for_backward(x, weight, inverse_rms)
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        _, weight, _ = ctx.saved_tensors
        return torch.empty_like(grad), None if weight is None else torch.empty_like(weight)


class _FusedNorms(TorchFunctionMode):
    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is torch.rms_norm:  # input, normalized_shape, weight, eps: as torch.nn.functional calls it
            return _FusedRMSNorm.apply(args[0], args[2])
        return func(*args, **(kwargs or {}))
