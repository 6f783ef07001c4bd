"""What a model computes for a row, in FLOPs and bytes: arithmetic, checked against the trainer's own count.

A multiply-add counts two FLOPs, the backward pass twice the forward one, recomputation not at all.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import numpy as np

from usdm_megatron.data.blend import Blend, TrainRows, stores_of
from usdm_megatron.plan.hardware import Device
from usdm_megatron.plan.model_shape import ModelShape


@dataclass(frozen=True)
class RowShape:
    """A mean row: its tokens, and the samples in it, which attend each to itself."""

    seq_length: int  # to which the row is padded
    tokens: float
    samples: tuple[tuple[int, float], ...]  # (tokens of a sample, such samples a row)
    source: str

    @classmethod
    def of_one_sample(cls, seq_length: int) -> RowShape:
        """A full row of a single sample: the most attention that a row can hold."""
        return cls(seq_length, float(seq_length), ((seq_length, 1.0),), "full rows of one sample")

    @classmethod
    def of_rows(cls, rows: TrainRows, seq_length: int) -> RowShape:
        """The mean row of a token store; of a blend, of its stores by weight."""
        stores = stores_of(rows)
        weights = rows.order.weights if isinstance(rows, Blend) else (1,)
        samples: dict[int, float] = defaultdict(float)
        tokens = 0.0
        for store, weight in zip(stores, weights, strict=True):
            share = weight / sum(weights) / store.rows
            lengths, counts = np.unique(store.sample_lengths(), return_counts=True)
            for length, count in zip(lengths.tolist(), counts.tolist(), strict=True):
                samples[length] += share * count
            tokens += share * store.tokens
        return cls(seq_length, tokens, tuple(sorted(samples.items())), f"samples as packed in {rows.prefix}")

    def causal_pairs(self, window: int | None) -> float:
        """Query-key pairs of the row, a head, at most `window` keys a query."""
        return sum(count * causal_pairs(length, window) for length, count in self.samples)


def causal_pairs(length: int, window: int | None) -> int:
    """Query-key pairs of one sample under the causal mask, at most `window` keys a query."""
    full = length if window is None else min(length, window)
    return full * (full + 1) // 2 + (length - full) * full


@dataclass(frozen=True)
class ModelFlops:
    """Of the whole model, forward and backward: `per_token` in linear layers, `per_pair` in attention."""

    per_token: float
    per_pair: float

    @classmethod
    def of(cls, model: ModelShape) -> ModelFlops:
        a = model.architecture
        linear = a.layers * (model.attention_weights + model.mlp_weights) + a.hidden * model.vocabulary.size
        return cls(per_token=6.0 * linear, per_pair=12.0 * a.layers * a.heads * a.head_dim)

    def of_row(self, row: RowShape, window: int | None) -> float:
        """What the row truly asks for: linear layers, and attention over its samples as packed."""
        return self.per_token * row.tokens + self.per_pair * row.causal_pairs(window)

    def of_row_full_s(self, row: RowShape) -> float:
        """The row's tokens, each attending to all of `seq_length` (PaLM's and llm-foundry's formula)."""
        return (self.per_token + self.per_pair * row.seq_length) * row.tokens


@dataclass(frozen=True)
class Moved:
    """Bytes that elementwise kernels read and write."""

    forward: float
    backward: float

    def over(self, ranks: int) -> Moved:
        """The share of one rank."""
        return Moved(self.forward / ranks, self.backward / ranks)


@dataclass(frozen=True)
class _Passes:
    """Tensors read or written, forward and backward: counted in the kernels of `model/`."""

    norm: tuple[int, int]
    swiglu: tuple[int, int]
    residual: tuple[int, int] = (3, 3)
    # two products, a negation, a concatenation, a sum; and the copy that joins a head's values
    rope: tuple[int, int] = (12, 12)


_PASSES: dict[Device, _Passes] = {
    "cuda": _Passes(norm=(2, 3), swiglu=(3, 5)),  # one kernel each way (`model/fused.py`)
    "cpu": _Passes(norm=(8, 14), swiglu=(5, 11)),  # the same, operator by operator
}


def norm_bytes(model: ModelShape, tokens: float, element: int, device: Device) -> Moved:
    """Of a layer's two norms."""
    size, passes = 2 * element * tokens * model.architecture.hidden, _PASSES[device].norm
    return Moved(passes[0] * size, passes[1] * size)


def residual_bytes(model: ModelShape, tokens: float, element: int, device: Device) -> Moved:
    """Of a layer's two additions; backward, where gradients of two branches are added."""
    size, passes = 2 * element * tokens * model.architecture.hidden, _PASSES[device].residual
    return Moved(passes[0] * size, passes[1] * size)


def rope_bytes(model: ModelShape, tokens: float, element: int, device: Device) -> Moved:
    """Of rotating queries and keys, which is not fused."""
    a, passes = model.architecture, _PASSES[device].rope
    size = element * tokens * (a.heads + a.kv_heads) * a.head_dim
    return Moved(passes[0] * size, passes[1] * size)


def swiglu_bytes(model: ModelShape, tokens: float, element: int, device: Device) -> Moved:
    """Of the gate: two halves read, one written, and back."""
    size, passes = element * tokens * model.architecture.ffn, _PASSES[device].swiglu
    return Moved(passes[0] * size, passes[1] * size)


def loss_bytes(model: ModelShape, tokens: float, element: int) -> float:
    """Bytes of forward and backward of the cross-entropy over all columns, in fp32 chunks.

    Forward: read, write a copy, maximum, subtract, exponential, sum (fp32: 1 + 1 + 2 + 2 + 1 passes).
    Backward: read, copy, subtract, exponential, product, write back (1 + 2 + 2 + 2 + 1).
    """
    return tokens * model.vocabulary.padded_size * (3 * element + 4 * (7 + 8))
