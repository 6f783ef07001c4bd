"""Core attention over packed rows (THD): one module for the layer spec, one function per backend.

T = tokens, H = query heads, G = key-value heads (query groups), D = head dimension.
Every backend attends causally inside a segment, over at most `window` keys with the query's own
among them (flash-attn's `(W-1, 0)`). RoPE is applied here, because core's own THD path reads
`cu_seqlens` on the host in every layer (megatron-core 0.16.1 `rope_utils.py:204`).
"""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from usdm_megatron.config import CoreAttention
from usdm_megatron.errors import ConfigError
from usdm_megatron.model.packed_sequence import PackedSequence, apply_rope

AttentionFunction = Callable[[Tensor, Tensor, Tensor, PackedSequence, "int | None"], Tensor]
# what each backend's kernel for CUDA is imported from, the preferred one first
_KERNELS: dict[CoreAttention, str] = {
    "te": "transformer_engine",
    "flash": "flash_attn",
    "torch": "torch.nn.attention.varlen",
}
# queries of a windowed segment computed at a time: fewer waste less beside the band, more run faster
_QUERY_BLOCK = 256


def resolve_backend(requested: CoreAttention, dtype: torch.dtype) -> CoreAttention:
    """The backend that will run: `auto` takes the first of te, flash, torch that is there.

    te and flash have 16-bit kernels on CUDA alone; elsewhere torch computes segment by segment. Raises
    `ConfigError` when the requested one cannot run here.
    """
    cuda = torch.cuda.is_available()
    if cuda and dtype != torch.float32:
        asked = list(_KERNELS) if requested == "auto" else [requested]
        there = [name for name in asked if importlib.util.find_spec(_KERNELS[name])]
        if there:
            return there[0]
        packages = " and ".join(_KERNELS[name] for name in asked)
        reason = f"{packages} {'is' if len(asked) == 1 else 'are'} not installed"
    elif requested in ("auto", "torch"):
        return "torch"
    else:
        reason = "it has no fp32 kernel" if cuda else "it needs CUDA and there is none"
    remedy = (
        "use --core-attention auto"
        if requested != "auto"
        else "install one of them (torch >= 2.11 has its own)"
    )
    raise ConfigError(f"model: core_attention {requested} cannot run: {reason}; {remedy}")


class PackedCoreAttention(MegatronModule):
    """Core attention of a layer, for packed rows; the constructor is core's."""

    backend: CoreAttention = "torch"

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: Any = None,
    ) -> None:
        super().__init__(config=config)
        self.window = None if config.window_size is None else config.window_size[0] + 1
        self.attend = self._build(layer_number, attention_type, pg_collection)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSequence | None = None,
    ) -> Tensor:
        """Attend `[T, H, D]` queries to `[T, G, D]` keys and values; returns `[T, H * D]`."""
        if not isinstance(packed_seq_params, PackedSequence):
            raise TypeError("packed core attention needs a PackedSequence: every stage must pass its row's")
        cos, sin = packed_seq_params.rope_cos_TD, packed_seq_params.rope_sin_TD
        assert cos is not None and sin is not None
        query, key = apply_rope(query, cos, sin), apply_rope(key, cos, sin)
        # a view would keep the whole fused projection for the backward pass, six times as much in Mistral
        value = value.contiguous()
        return self.attend(query, key, value, packed_seq_params, self.window).reshape(query.size(0), -1)

    def _build(self, layer_number: int, attention_type: str, pg_collection: Any) -> AttentionFunction:
        if self.backend == "te":
            return _TransformerEngine(self.config, layer_number, attention_type, pg_collection)
        if self.backend == "flash":
            return _flash_attention
        return _torch_varlen if torch.cuda.is_available() else segment_attention


def packed_core_attention(backend: CoreAttention) -> type[PackedCoreAttention]:
    """The core attention class of a resolved backend, for a `ModuleSpec`."""
    return type("PackedCoreAttention", (PackedCoreAttention,), {"backend": backend})


def segment_attention(
    q_THD: Tensor, k_TGD: Tensor, v_TGD: Tensor, row: PackedSequence, window: int | None
) -> Tensor:
    """One scaled-dot-product call per segment; the CPU kernel, and the oracle of the others.

    A segment longer than the window is computed in blocks of queries, each against the keys that
    its band can reach.
    """
    # one contiguous [H, T, D] each, so that the kernel never copies per segment
    q_HTD, k_GTD, v_GTD = (x.transpose(0, 1).contiguous() for x in (q_THD, k_TGD, v_TGD))
    outputs, start = [], 0
    for length in row.segment_lengths:
        end = start + length
        if window is None or length <= window:
            outputs.append(_sdpa(q_HTD, k_GTD, v_GTD, (start, end), (start, end), None))
        else:
            outputs += _banded(q_HTD, k_GTD, v_GTD, start, end, window)
        start = end
    return torch.cat(outputs, dim=1).transpose(0, 1)


def _banded(q: Tensor, k: Tensor, v: Tensor, start: int, end: int, window: int) -> list[Tensor]:
    outputs = []
    for first in range(start, end, _QUERY_BLOCK):
        last = min(first + _QUERY_BLOCK, end)
        first_key = max(start, first - window + 1)
        mask = _band_mask(last - first, last - first_key, window, str(q.device))
        outputs.append(_sdpa(q, k, v, (first, last), (first_key, last), mask))
    return outputs


def _sdpa(
    q: Tensor, k: Tensor, v: Tensor, queries: tuple[int, int], keys: tuple[int, int], mask: Tensor | None
) -> Tensor:
    (q0, q1), (k0, k1) = queries, keys
    return F.scaled_dot_product_attention(
        q[:, q0:q1].unsqueeze(0),
        k[:, k0:k1].unsqueeze(0),
        v[:, k0:k1].unsqueeze(0),
        attn_mask=mask,
        is_causal=mask is None,
        enable_gqa=q.size(0) != k.size(0),
    ).squeeze(0)


@lru_cache(maxsize=64)
def _band_mask(queries: int, keys: int, window: int, device: str) -> Tensor:
    """bool `[queries, keys]`, last query and last key at the same position: causal, `window` keys wide."""
    distance = torch.arange(keys - queries, keys, device=device)[:, None] - torch.arange(keys, device=device)
    return (distance >= 0) & (distance < window)


def _torch_varlen(q: Tensor, k: Tensor, v: Tensor, row: PackedSequence, window: int | None) -> Tensor:
    """`torch.nn.attention.varlen` (CUDA, 16 bit; fp32 by segments). By its documentation; not run yet."""
    if q.dtype == torch.float32:
        return segment_attention(q, k, v, row, window)
    from torch.nn.attention.varlen import varlen_attn

    grouped = q.size(1) != k.size(1)
    options, repeats_keys = _varlen_options(window, grouped)
    if repeats_keys:
        k, v = (x.repeat_interleave(q.size(1) // x.size(1), dim=1) for x in (k, v))
    output = varlen_attn(
        q, k, v, row.cu_seqlens_q, row.cu_seqlens_kv, row.max_seqlen_q, row.max_seqlen_kv, **options
    )
    assert isinstance(output, Tensor)  # a pair only when the log-sum-exp is asked for
    return output


@lru_cache(maxsize=4)
def _varlen_options(window: int | None, grouped: bool) -> tuple[dict[str, Any], bool]:
    """Keyword arguments in the words of this torch, and whether keys must be repeated for grouped queries."""
    from torch.nn.attention.varlen import varlen_attn

    known = inspect.signature(varlen_attn).parameters
    if "window_size" in known:  # torch >= 2.11
        options: dict[str, Any] = {"window_size": (-1 if window is None else window - 1, 0)}
    elif window is None:
        options = {"is_causal": True}
    else:
        raise ConfigError(
            "model: this torch's varlen attention has no sliding window; install torch >= 2.11, or "
            "flash-attn for --core-attention flash"
        )
    if "enable_gqa" in known:
        return {**options, "enable_gqa": grouped}, False
    return options, grouped


def _flash_attention(q: Tensor, k: Tensor, v: Tensor, row: PackedSequence, window: int | None) -> Tensor:
    """`flash_attn_varlen_func` (flash-attn >= 2.4.1, CUDA, 16 bit). Not run yet."""
    from flash_attn import flash_attn_varlen_func

    return flash_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens_q=row.cu_seqlens_q,
        cu_seqlens_k=row.cu_seqlens_kv,
        max_seqlen_q=row.max_seqlen_q,
        max_seqlen_k=row.max_seqlen_kv,
        causal=True,
        deterministic=torch.are_deterministic_algorithms_enabled(),
        window_size=(-1, -1) if window is None else (window - 1, 0),
    )


class _TransformerEngine:
    """`TEDotProductAttention` in THD format (transformer-engine >= 2.9, CUDA). Not run yet."""

    def __init__(
        self, config: TransformerConfig, layer_number: int, attention_type: str, groups: Any
    ) -> None:
        from megatron.core.extensions.transformer_engine import TEDotProductAttention

        # the window travels in config.window_size
        self._attention = TEDotProductAttention(
            config=config,
            layer_number=layer_number,
            attn_mask_type=AttnMaskType.padding_causal,
            attention_type=attention_type,
            pg_collection=groups,
        )

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, row: PackedSequence, window: int | None) -> Tensor:
        from megatron.core.packed_seq_params import PackedSeqParams

        plain = PackedSeqParams(
            qkv_format="thd",
            cu_seqlens_q=row.cu_seqlens_q,
            cu_seqlens_kv=row.cu_seqlens_kv,
            max_seqlen_q=row.max_seqlen_q,
            max_seqlen_kv=row.max_seqlen_kv,
        )
        return self._attention(
            q, k, v, None, attn_mask_type=AttnMaskType.padding_causal, packed_seq_params=plain
        )
