"""The CPU kernel against a masked softmax over all pairs, in float64; RoPE and RMSNorm against transformers.

T = tokens, H = query heads, G = key-value heads, D = head dimension.
"""

from __future__ import annotations

import importlib.util
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from usdm_megatron.errors import ConfigError
from usdm_megatron.model import attention
from usdm_megatron.model.attention import packed_core_attention, resolve_backend, segment_attention
from usdm_megatron.model.fused import swiglu
from usdm_megatron.model.layer_spec import RMSNorm
from usdm_megatron.model.packed_sequence import PackedSequence, RopeTable, apply_rope

W = 7
BLOCK = attention._QUERY_BLOCK
BF16 = torch.bfloat16
KERNEL_TOLERANCE = 1e-10  # float64 on both sides


def packed(lengths: tuple[int, ...]) -> PackedSequence:
    return PackedSequence(qkv_format="thd", segment_lengths=lengths)


def brute_force(
    q_THD: Tensor, k_TGD: Tensor, v_TGD: Tensor, lengths: tuple[int, ...], window: int | None
) -> Tensor:
    """Softmax over every pair of the row, with what may not be seen at -inf."""
    segment_T = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    position_T = torch.arange(sum(lengths))
    distance_TT = position_T[:, None] - position_T[None, :]
    seen_TT = (segment_T[:, None] == segment_T[None, :]) & (distance_TT >= 0)
    if window is not None:
        seen_TT &= distance_TT < window
    group = q_THD.size(1) // k_TGD.size(1)
    outputs = []
    for head in range(q_THD.size(1)):
        k_TD, v_TD = k_TGD[:, head // group], v_TGD[:, head // group]
        scores_TT = q_THD[:, head] @ k_TD.T / math.sqrt(q_THD.size(-1))
        outputs.append(scores_TT.masked_fill(~seen_TT, -math.inf).softmax(-1) @ v_TD)
    return torch.stack(outputs, dim=1)


def random_row(
    lengths: tuple[int, ...], heads: int, groups: int, dtype: torch.dtype = torch.float64
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(sum(lengths))
    shapes = [(sum(lengths), count, 8) for count in (heads, groups, groups)]
    return [torch.randn(shape, generator=generator, dtype=dtype).requires_grad_() for shape in shapes]


# (lengths, window): window edges, one token, many segments, blocks of queries and their edges
ROWS: list[tuple[tuple[int, ...], int | None]] = [
    ((1,), None),
    ((1, 1, 1), W),
    ((W - 1, W, W + 1, 3 * W, 1), W),
    ((W - 1, W, W + 1, 3 * W, 1), None),
    ((5, 5, 5), 1),
    ((5, 5, 5), 2),
    (tuple(range(1, 24)), W),
    ((BLOCK - 1, BLOCK, BLOCK + 1), W),
    ((2 * BLOCK + 3, 9), W),
    ((BLOCK + 40,), BLOCK - 1),
    ((BLOCK + 40,), BLOCK),
    ((BLOCK + 40,), BLOCK + 1),
    ((2 * BLOCK + 40, 3), BLOCK + 39),
    ((300,), 300),
    ((300,), 299),
    ((300,), 301),
]


@pytest.mark.parametrize(("heads", "groups"), [(4, 2), (3, 1), (2, 2)])
@pytest.mark.parametrize(("lengths", "window"), ROWS, ids=str)
def test_segment_attention(lengths: tuple[int, ...], window: int | None, heads: int, groups: int) -> None:
    ours, theirs = random_row(lengths, heads, groups), random_row(lengths, heads, groups)
    output = segment_attention(*ours, packed(lengths), window)
    expected = brute_force(*theirs, lengths, window)
    torch.testing.assert_close(output, expected, rtol=0, atol=KERNEL_TOLERANCE)
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (output * weights).sum().backward()
    (expected * weights).sum().backward()
    for x, y in zip(ours, theirs, strict=True):
        torch.testing.assert_close(x.grad, y.grad, rtol=0, atol=KERNEL_TOLERANCE)


@pytest.mark.parametrize("window", [None, W])
def test_segment_attention_in_fp32(window: int | None) -> None:
    lengths = (W - 1, 300, W + 1)
    row = random_row(lengths, 4, 2, torch.float32)
    expected = brute_force(*(x.double() for x in row), lengths, window).float()
    torch.testing.assert_close(segment_attention(*row, packed(lengths), window), expected, rtol=0, atol=3e-6)


def test_the_oracle_sees_exactly_the_window() -> None:
    """Uniform attention: the output is the mean of the last W values, counted by hand."""
    length = 20
    q = k = torch.zeros(length, 1, 8, dtype=torch.float64)
    v = torch.arange(length, dtype=torch.float64).view(-1, 1, 1).expand(-1, 1, 8)
    expected = torch.tensor(
        [sum(range(max(0, t - W + 1), t + 1)) / min(t + 1, W) for t in range(length)], dtype=torch.float64
    )
    for function in (segment_attention, brute_force):
        row = packed((length,)) if function is segment_attention else (length,)
        torch.testing.assert_close(function(q, k, v, row, W)[:, 0, 0], expected)


def test_rope_is_that_of_transformers() -> None:
    from transformers import MistralConfig
    from transformers.models.mistral.modeling_mistral import MistralRotaryEmbedding, apply_rotary_pos_emb

    head_dim, theta, positions = 16, 1e6, torch.tensor([0, 1, 2, 0, 1, 500, 499])
    table = RopeTable(head_dim, theta, 501, torch.device("cpu"))
    batch: Any = SimpleNamespace(
        position_ids=positions[None], cu_seqlens=None, max_seqlen=0, segment_lengths=()
    )
    row = table.pack(batch, torch.float32)
    config = MistralConfig(
        hidden_size=64, num_attention_heads=4, num_key_value_heads=2, head_dim=head_dim, rope_theta=theta
    )
    q, k = torch.randn(7, 4, head_dim), torch.randn(7, 2, head_dim)
    cos, sin = MistralRotaryEmbedding(config)(q, positions[None])
    expected = apply_rotary_pos_emb(q.transpose(0, 1)[None], k.transpose(0, 1)[None], cos, sin)
    assert row.rope_cos_TD is not None and row.rope_sin_TD is not None
    torch.testing.assert_close(row.rope_cos_TD, cos[0], rtol=0, atol=0)
    torch.testing.assert_close(row.rope_sin_TD, sin[0], rtol=0, atol=0)
    for x, rotated in zip((q, k), expected, strict=True):
        ours = apply_rope(x, row.rope_cos_TD, row.rope_sin_TD)
        torch.testing.assert_close(ours, rotated[0].transpose(0, 1), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_norm_is_that_of_transformers(dtype: torch.dtype) -> None:
    from transformers.models.mistral.modeling_mistral import MistralRMSNorm

    ours = RMSNorm(SimpleNamespace(params_dtype=dtype, sequence_parallel=True), 32, eps=3e-4)
    theirs = MistralRMSNorm(32, eps=3e-4).to(dtype)
    assert ours.weight.sequence_parallel and ours.weight.dtype == dtype
    weight = torch.rand(32).to(dtype)
    for norm in (ours, theirs):
        norm.weight.data.copy_(weight)
    inputs = [
        (0.01 * torch.randn(5, 32, generator=torch.Generator().manual_seed(0))).to(dtype).requires_grad_()
        for _ in range(2)
    ]
    outputs = [norm(x) for norm, x in zip((ours, theirs), inputs, strict=True)]
    atol = 1e-6 if dtype == torch.float32 else 8e-3  # a bf16 ulp at 1
    torch.testing.assert_close(outputs[0], outputs[1], rtol=0, atol=atol)
    # theirs rounds 16-bit gradients on the way; ours are as exact as their dtype
    exact, x = theirs.double(), inputs[1].detach().double().requires_grad_()
    gradient = torch.randn(outputs[0].shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    outputs[0].backward(gradient)
    normed = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + exact.variance_epsilon)
    (normed * exact.weight).backward(gradient.double())
    for ours_, theirs_ in ((ours.weight.grad, exact.weight.grad), (inputs[0].grad, x.grad)):
        torch.testing.assert_close(
            ours_.double(), theirs_, rtol=1e-5 if dtype == torch.float32 else 2**-8, atol=1e-5
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_swiglu_is_that_of_separate_operators(dtype: torch.dtype) -> None:
    """To the bit, forward and backward, from its input alone."""
    inputs = [
        torch.randn(5, 1, 24, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
        for _ in range(2)
    ]
    gate, up = inputs[1].chunk(2, dim=-1)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        output = swiglu(inputs[0])
    assert [x.data_ptr() for x in kept] == [inputs[0].data_ptr()]
    expected = F.silu(gate) * up
    assert torch.equal(output, expected)
    gradient = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    for result in (output, expected):
        result.backward(gradient)
    assert torch.equal(inputs[0].grad, inputs[1].grad)


def test_core_attention_wants_the_rows_own_parameters() -> None:
    """A stage without its cu_seqlens must not fall back to plain causal attention."""
    module = packed_core_attention("torch")(SimpleNamespace(window_size=(W - 1, 0)), 1, None, "self")
    assert module.window == W
    q = torch.zeros(4, 1, 8)
    with pytest.raises(TypeError, match="every stage must pass its row's"):
        module(q, q, q, None)


def test_backend_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_backend("auto", BF16) == resolve_backend("torch", BF16) == "torch"
    for name in ("te", "flash"):
        with pytest.raises(ConfigError, match=f"{name} cannot run: it needs CUDA.*--core-attention auto"):
            resolve_backend(name, BF16)


@pytest.mark.parametrize(
    ("installed", "chosen"),
    [
        (("torch.nn.attention.varlen",), "torch"),
        (("flash_attn",), "flash"),
        (("transformer_engine", "flash_attn", "torch.nn.attention.varlen"), "te"),
    ],
)
def test_auto_takes_the_first_backend_that_is_there(
    installed: tuple[str, ...], chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda package: package if package in installed else None
    )
    assert resolve_backend("auto", BF16) == chosen
    assert resolve_backend("auto", torch.float32) == "torch"  # the others have 16-bit kernels alone
    if "transformer_engine" not in installed:
        with pytest.raises(
            ConfigError, match="te cannot run: transformer_engine is not installed; use --core"
        ):
            resolve_backend("te", BF16)


def test_cuda_without_any_kernel_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch 2.6 has none for packed rows; that must be known before the first step."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(importlib.util, "find_spec", lambda package: None)
    with pytest.raises(
        ConfigError, match="torch cannot run: torch.nn.attention.varlen is not installed; use"
    ):
        resolve_backend("torch", BF16)
    message = (
        "auto cannot run: transformer_engine and flash_attn and torch.nn.attention.varlen are not installed"
    )
    with pytest.raises(ConfigError, match=f"{message}; install one of them \\(torch >= 2.11"):
        resolve_backend("auto", BF16)
    with pytest.raises(ConfigError, match="te cannot run: it has no fp32 kernel"):
        resolve_backend("te", torch.float32)
