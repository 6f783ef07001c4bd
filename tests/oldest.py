"""What the oldest versions (`scripts/oldest.txt`) cannot do, where a test must know."""

from __future__ import annotations

import torch
import torch.nn.functional as F
import transformers

TRANSFORMERS_4 = transformers.__version__.startswith("4.")


def attention_keeps_scores() -> bool:
    """torch 2.6 has no fused kernel for grouped queries on the CPU."""
    query, key = (torch.zeros(1, heads, 64, 8, requires_grad=True) for heads in (2, 1))
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        F.scaled_dot_product_attention(query, key, key, is_causal=True, enable_gqa=True)
    return max(kept) >= 2 * 64 * 64
