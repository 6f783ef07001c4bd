"""RMSNorm and SwiGLU that keep no more for the backward pass than they need.

On CUDA torch's fused norm and core's compiled SwiGLU do so themselves. On CPU both would be made of
single operators, whose intermediates autograd keeps: 9 of the 27 S x H values that a layer of Mistral's
proportions then keeps in fp32, 11 of 29 in bf16.
S = tokens, H = hidden size, F = feed-forward width of this rank.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.fusions.fused_bias_swiglu import bias_swiglu_impl
from torch import Tensor


def rms_norm(x_SH: Tensor, weight_H: Tensor, eps: float) -> Tensor:
    """Root-mean-square norm over the last axis, statistics in fp32; keeps `x_SH` and a number a token."""
    if x_SH.is_cuda:
        return F.rms_norm(x_SH, (x_SH.size(-1),), weight_H, eps)
    return _RMSNorm.apply(x_SH, weight_H, eps)


def swiglu(gate_and_up_S2F: Tensor) -> Tensor:
    """SiLU(gate) x up from `[..., 2F]`, gate first; keeps its input alone. CUDA: core's, not run yet."""
    if gate_and_up_S2F.is_cuda:
        return bias_swiglu_impl(gate_and_up_S2F, None)
    return _SwiGLU.apply(gate_and_up_S2F)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        exact = x.float() if x.element_size() == 2 else x
        inverse_rms = exact.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
        ctx.save_for_backward(x, inverse_rms, weight)
        return (exact * inverse_rms).to(x.dtype).mul_(weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        x, inverse_rms, weight = ctx.saved_tensors
        exact = inverse_rms.dtype  # fp32 for 16-bit input
        x_SH, grad_SH = (tensor.reshape(-1, x.size(-1)).to(exact) for tensor in (x, grads[0]))
        inverse_rms_S1, weight_H = inverse_rms.view(-1, 1), weight.to(exact)
        product_SH = grad_SH * x_SH
        # what the mean square takes back: along x, as much as the weighted gradient lies along it
        along_x_S1 = product_SH @ weight_H.unsqueeze(1) * (inverse_rms_S1.square() / x.size(-1))
        grad_x_SH = torch.addcmul(grad_SH * weight_H, x_SH, along_x_S1, value=-1).mul_(inverse_rms_S1)
        grad_weight_H = product_SH.mul_(inverse_rms_S1).sum(0)
        return grad_x_SH.view_as(x).to(x.dtype), grad_weight_H.to(weight.dtype), None


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_and_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_and_up)
        gate, up = gate_and_up.chunk(2, dim=-1)
        return F.silu(gate) * up

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (gate_and_up,) = ctx.saved_tensors
        gate, up = gate_and_up.chunk(2, dim=-1)
        grad_input = torch.empty_like(gate_and_up)
        grad_gate, grad_up = grad_input.chunk(2, dim=-1)
        torch.mul(grads[0], F.silu(gate), out=grad_up)
        torch.ops.aten.silu_backward.grad_input(grads[0] * up, gate, grad_input=grad_gate)
        return grad_input
