"""What one part of the model keeps for its backward pass: the operators of a layer, as tables.

T = tokens of a micro-batch, R = those of them on this rank outside of attention and MLP (T / tp under
sequence parallel), H = hidden, A = this rank's query heads x head dimension, G = the same of key heads,
F = this rank's feed-forward columns, V = this rank's columns of the padded vocabulary
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

from usdm_megatron.architecture import HFArchitecture
from usdm_megatron.config import CoreAttention
from usdm_megatron.parallel_config import ParallelConfig
from usdm_megatron.plan.tape import Footprint, Op, Recomputed, Step, footprint

_LOSS_CHUNK_ELEMENTS = 16 * 2**20  # fp32 logits that the loss holds at a time (`model/loss.py`)


@dataclass(frozen=True)
class Kernels:
    """What the kernels of a run keep; those of `CPU` are measured, those of `CUDA` read from their sources.

    Norms and SwiGLU keep their inputs alone everywhere (`model/fused.py`). Attention: `segments` (one call of
    torch's a segment, `model/attention.py`) keeps q, k and v in its own order and its output twice, and of
    segments longer than the window masks, which are not counted; `fused` (flash-attn 2, TransformerEngine,
    torch's `varlen_attn`) keeps q, k, v, its output and a log-sum-exp.
    """

    attention: Literal["segments", "fused"]
    frees_sent_outputs: bool  # of interleaved chunks, whose messages NCCL orders and gloo does not


CPU = Kernels("segments", frees_sent_outputs=False)
CUDA = Kernels("fused", frees_sent_outputs=True)


def kernels_of(backend: CoreAttention, device: Literal["cpu", "cuda"]) -> Kernels:
    """What a 16-bit run keeps on this device; on CUDA every attention backend keeps the same."""
    return CPU if device == "cpu" else CUDA


@dataclass(frozen=True)
class Sizes:
    """Bytes of the tensors of a layer, by what decides them."""

    stream: int  # [R, H]
    gathered: int  # [T, H]
    query: int  # [T, A]
    key: int  # [T, G]
    ffn: int  # [T, F]
    statistics: int  # a norm's, fp32 [R]
    log_sum_exp: int  # fp32 [T, heads]
    element: int

    @classmethod
    def of(cls, model: HFArchitecture, parallel: ParallelConfig, tokens: int, element: int) -> Sizes:
        tp = parallel.tensor_model_parallel_size
        rows = tokens // tp if parallel.sequence_parallel else tokens
        return cls(
            stream=rows * model.hidden * element,
            gathered=tokens * model.hidden * element,
            query=tokens * model.heads * model.head_dim // tp * element,
            key=tokens * model.kv_heads * model.head_dim // tp * element,
            ffn=tokens * model.ffn // tp * element,
            statistics=rows * 4,
            log_sum_exp=tokens * model.heads // tp * 4,
            element=element,
        )


@dataclass(frozen=True)
class _Layer:
    """The tables of one layer under one layout."""

    model: HFArchitecture
    parallel: ParallelConfig
    kernels: Kernels
    sizes: Sizes

    @property
    def bytes_of(self) -> dict[str, int]:
        """Tensors by name; what is only ever a view, or a gradient shared with the stream's, has none."""
        size = self.sizes
        qkv = size.query + 2 * size.key
        tensors = {
            "qkv": qkv,
            "attended": size.query,
            "log_sum_exp": size.log_sum_exp,
            "kernel_out": size.query,
        }
        for name in ("q", "q_turned", "q_own"):
            tensors[name] = size.query
        for name in ("k", "v", "k_turned", "k_own", "v_own"):
            tensors[name] = size.key
        for norm in ("norm_1", "norm_2"):
            tensors |= {norm: size.stream, f"{norm}.statistics": size.statistics}
        tensors |= {"fc1": 2 * size.ffn, "act": size.ffn}
        return tensors | {"x": size.stream, "middle": size.stream, "out": size.stream, "o": 0, "y": 0}

    def steps(self, recomputed: frozenset[str]) -> list[Step]:
        """The layer's operators, with the modules in `recomputed` run again in the backward pass."""
        model, tp = self.model, self.parallel.tensor_model_parallel_size
        element = self.sizes.element
        qkv_weight = model.qkv_rows * model.hidden // tp * element
        out_weight = model.heads * model.head_dim * model.hidden // tp * element
        ffn_weight = model.ffn * model.hidden // tp * element
        drops = "layernorm" in recomputed
        attention = self._core_attention()
        mlp = (
            self._column("norm_2", "fc1", 2 * ffn_weight, keeps_input=not drops),
            Op(("fc1",), ("act",), ("fc1",), scratch=self.sizes.ffn),
            self._row("act", "y", ffn_weight),
        )
        return [
            self._norm("x", "norm_1"),
            self._column("norm_1", "qkv", qkv_weight, keeps_input=not drops),
            Op(("qkv",), ("q", "k", "v")),
            *(
                [Recomputed(attention, ("q", "k", "v"), ("q", "qkv"), self.sizes.query)]
                if "core_attn" in recomputed
                else attention
            ),
            self._row("attended", "o", out_weight),
            Op(("x", "o"), ("middle",)),
            self._norm("middle", "norm_2"),
            *(
                [Recomputed(mlp, ("norm_2",), () if drops else ("norm_2",), self.sizes.stream)]
                if "mlp" in recomputed
                else mlp
            ),
            Op(("middle", "y"), ("out",)),
        ]

    def _norm(self, read: str, write: str) -> Op:
        """On CPU the backward pass makes fp32 copies of 16-bit tensors; on CUDA it is never the fullest."""
        wide = self.sizes.stream * 4 // self.sizes.element
        return Op((read,), (write,), (read, f"{write}.statistics"), scratch=3 * wide)

    def _column(self, read: str, write: str, weight: int, *, keeps_input: bool) -> Op:
        """Column-parallel linear: under sequence parallel the whole gradient of its input, then scattered."""
        scratch = self._whole + (0 if keeps_input else self.sizes.stream)
        return Op((read,), (write,), (read,) if keeps_input else (), weight, scratch)

    def _row(self, read: str, write: str, weight: int) -> Op:
        """Row-parallel linear: under sequence parallel the gradient of its output is gathered."""
        return Op((read,), (write,), (read,), weight, self._whole)

    def _core_attention(self) -> tuple[Op, ...]:
        query, key = self.sizes.query, self.sizes.key
        rope = (
            Op(("q",), ("q_turned",), scratch=2 * query),
            Op(("k",), ("k_turned",), scratch=2 * key),
        )
        if self.kernels.attention == "segments":
            own = ("q_own", "k_own", "v_own")
            return (
                *rope,
                Op(("q_turned", "k_turned", "v"), own),
                # every segment's gradients are laid into zeros of the whole row's size, then added
                Op(own, ("kernel_out",), (*own, "kernel_out", "log_sum_exp"), scratch=query + 2 * key),
                Op(("kernel_out",), ("attended",)),
            )
        saves = ("q_turned", "k_turned", "v", "attended", "log_sum_exp")
        # the gradients of q in fp32, and of k and v for every query head (flash-attn `mha_varlen_bwd`)
        scratch = query * 4 // self.sizes.element + 2 * query
        return (*rope, Op(("q_turned", "k_turned", "v"), ("attended",), saves, scratch=scratch))

    def head(self, shape: ChunkShape) -> Footprint:
        """Final norm, output layer and loss; the gradient of the logits is written over them."""
        tokens, columns = shape.tokens, shape.columns
        weight = columns * self.model.hidden * self.sizes.element
        chunk = min(tokens, max(1, _LOSS_CHUNK_ELEMENTS // columns)) * shape.true_columns
        is_16_bit = self.sizes.element == 2
        kept = ("logits", "normaliser", "targets", "hits")
        steps = [
            self._norm("x", "norm_1"),
            Op(("norm_1",), ("d_logits",), ("norm_1", "logits"), weight, self._whole),
            Op(("d_logits",), ("loss",), kept, scratch=6 * chunk if is_16_bit else 0),
        ]
        tensors = {
            "logits": tokens * columns * self.sizes.element,
            "d_logits": 0,
            **{"normaliser": 4 * tokens, "targets": 8 * tokens, "hits": tokens, "loss": 4 * tokens},
        }
        both = footprint(steps, self.bytes_of | tensors)
        # fp32 logits of a chunk of tokens, and their distance from the largest
        return replace(both, forward=chunk * (8 if is_16_bit else 4))

    def embedding(self, columns: int, tokens: int) -> Footprint:
        """The embedding: it keeps ids, and its gradient is as large as its weight."""
        sharded = self.parallel.tensor_model_parallel_size > 1
        tensors = {"x": self.sizes.stream, "ids": 9 * tokens if sharded else 0}
        weight = columns * self.model.hidden * self.sizes.element
        return footprint([Op((), ("x",), ("ids",), weight, self._whole)], tensors)

    @property
    def _whole(self) -> int:
        """A gradient of the whole sequence, before it is scattered or once it is gathered."""
        return self.sizes.gathered if self.parallel.sequence_parallel else 0


@dataclass(frozen=True)
class ChunkShape:
    """What a pipeline chunk computes for one micro-batch, on one rank."""

    layers: int
    is_first: bool  # it embeds
    is_last: bool  # it has the output layer and the loss
    tokens: int
    columns: int  # of the padded vocabulary, on this rank
    true_columns: int  # those of them that are no padding, on the rank that has most


@lru_cache(maxsize=4096)
def layer_footprint(
    model: HFArchitecture, parallel: ParallelConfig, kernels: Kernels, tokens: int, element: int
) -> Footprint:
    """What one layer keeps; of full recomputation, a layer that is not recomputed."""
    layer = _layer(model, parallel, kernels, tokens, element)
    selective = parallel.recompute_granularity == "selective"
    recomputed = frozenset(parallel.recompute_modules if selective else ())
    return footprint(layer.steps(recomputed), layer.bytes_of)


def head_footprint(
    model: HFArchitecture, parallel: ParallelConfig, kernels: Kernels, chunk: ChunkShape, element: int
) -> Footprint:
    """What final norm, output layer and loss keep of one micro-batch; nothing in a chunk without them."""
    if not chunk.is_last:
        return Footprint(0, 0)
    return _layer(model, parallel, kernels, chunk.tokens, element).head(chunk)


@lru_cache(maxsize=4096)
def chunk_footprint(
    model: HFArchitecture, parallel: ParallelConfig, kernels: Kernels, chunk: ChunkShape, element: int
) -> Footprint:
    """What one micro-batch keeps in a pipeline chunk, and what its passes need beyond that."""
    layer = _layer(model, parallel, kernels, chunk.tokens, element)
    parts = [layer.embedding(chunk.columns, chunk.tokens)] if chunk.is_first else []
    parts += _layer_parts(
        layer, layer_footprint(model, parallel, kernels, chunk.tokens, element), chunk.layers
    )
    if chunk.is_last:
        parts.append(layer.head(chunk))
    saved = 2 * chunk.tokens * model.head_dim * element  # cos and sin, gathered for this micro-batch
    interleaved = parallel.num_virtual_stages_per_pipeline_rank > 1
    if interleaved and not chunk.is_last and not kernels.frees_sent_outputs:
        saved += layer.sizes.stream
    backward = forward = 0
    for part in parts:
        saved += part.saved
        backward = max(backward, saved + part.backward)
        forward = max(forward, saved + part.forward)
    return Footprint(saved, max(0, backward - saved), max(0, forward - saved))


def _layer_parts(layer: _Layer, one: Footprint, layers: int) -> list[Footprint]:
    parallel = layer.parallel
    if parallel.recompute_granularity != "full":
        return [one] * layers
    group = parallel.recompute_num_layers if parallel.recompute_method == "uniform" else 1
    recomputed = layers if parallel.recompute_method == "uniform" else parallel.recompute_num_layers
    stream = layer.sizes.stream
    again = group * one.saved + one.backward  # without the input, with what it computes again
    groups = min(recomputed, layers) // group
    return [Footprint(stream, again)] * groups + [one] * (layers - groups * group)


def _layer(
    model: HFArchitecture, parallel: ParallelConfig, kernels: Kernels, tokens: int, element: int
) -> _Layer:
    return _Layer(model, parallel, kernels, Sizes.of(model, parallel, tokens, element))
