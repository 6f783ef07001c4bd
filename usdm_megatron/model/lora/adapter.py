"""Adapters as a transformation of the layer's spec: each linear layer that is a target brings its own.

S = tokens, B = batch, r = rank of an adapter, n = adapters of one linear layer.

All that tensor parallel ranks exchange for an adapter is its rank-r activation a = A·x, once:

| base            | A              | exchange, forward ↔ backward                       | B               |
| --------------- | -------------- | -------------------------------------------------- | --------------- |
| column parallel | whole          | copy ↔ all-reduce; SP: all-gather ↔ reduce-scatter | shard, rows     |
| row parallel    | shard, columns | all-reduce ↔ copy; SP: reduce-scatter ↔ all-gather | whole           |

The gradient of the factor that every rank holds whole is then complete, and equal, on each of them.
Under sequence parallel (SP) that factor has seen its rank's tokens alone: it is marked as the norms'
weights are, and core sums its gradient over tensor parallel ranks once a step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    get_cuda_rng_tracker,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.spec_utils import ModuleSpec, get_module
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from megatron.core.utils import get_tensor_model_parallel_group_if_none
from torch import Tensor

from usdm_megatron.errors import ConfigError
from usdm_megatron.lora_spec import LoraSpec
from usdm_megatron.model.lora.names import Projection, projections_of

Spec = TypeVar("Spec", TransformerBlockSubmodules, ModuleSpec)
_ADAPTED_LINEARS = {"self_attention": ("linear_qkv", "linear_proj"), "mlp": ("linear_fc1", "linear_fc2")}


def with_lora(spec: Spec, lora: LoraSpec) -> Spec:
    """A layer's spec, or a block's, whose target linear layers bring adapters; `spec` stays as it is.

    Whatever class the spec names for a linear layer (core's, Transformer Engine's) is kept as the base
    of the adapted one: constructor, weights and keys are the same. Raises `ConfigError` when the layer
    lacks a linear layer that a target needs.
    """
    if isinstance(spec, TransformerBlockSubmodules):
        return replace(spec, layer_specs=[with_lora(layer, lora) for layer in spec.layer_specs])
    parents = {
        name: _with_adapted_linears(getattr(spec.submodules, name), linears, lora)
        for name, linears in _ADAPTED_LINEARS.items()
    }
    return replace(spec, submodules=replace(spec.submodules, **parents))


def _with_adapted_linears(parent: Any, linears: tuple[str, ...], lora: LoraSpec) -> Any:
    adapted: dict[str, ModuleSpec] = {}
    for linear in linears:
        targets = [p.target for p in projections_of(linear) if p.target in lora.targets]
        if not targets:
            continue
        base = getattr(getattr(parent, "submodules", None), linear, None)
        if base is None:
            raise ConfigError(
                f"lora: this model's layers have no {linear} to adapt; drop {', '.join(targets)} "
                "from the target modules"
            )
        adapted[linear] = ModuleSpec(
            module=_adapted_class(get_module(base)),
            params={**getattr(base, "params", {}), "lora": lora, "linear": linear},
            submodules=getattr(base, "submodules", None),
        )
    return replace(parent, submodules=replace(parent.submodules, **adapted)) if adapted else parent


@lru_cache(maxsize=16)
def _adapted_class(base: type) -> type:
    return type(f"Adapted{base.__name__}", (AdaptedLinear, base), {})


@dataclass(frozen=True)
class FusedRows:
    """Output rows of a linear layer: `groups` times, for each of its projections, so many rows.

    `linear_qkv` has the rows of every query group together, `linear_fc1` the gate's, then up's.
    """

    groups: int
    rows: tuple[int, ...]

    @classmethod
    def of_rank(cls, linear: str, config: TransformerConfig, tp: int) -> FusedRows:
        """Those that one of `tp` ranks holds."""
        if linear == "linear_qkv":
            heads_per_group = config.num_attention_heads // config.num_query_groups
            head_dim = config.kv_channels
            return cls(config.num_query_groups // tp, (heads_per_group * head_dim, head_dim, head_dim))
        if linear == "linear_fc1":
            return cls(1, (config.ffn_hidden_size // tp,) * 2)
        return cls(1, (config.hidden_size,))


def fuse_b(parts: Sequence[Tensor | None], layout: FusedRows) -> Tensor:
    """`[out, n·r]` from the B of each projection (None: it has no adapter), zero off the blocks.

    Times the n stacked A it is what the adapters add to the fused weight.
    """
    present = [part for part in parts if part is not None]
    if len(parts) == 1:
        return present[0]
    r = present[0].size(1)
    width, column = r * len(present), 0
    blocks = []
    for part, rows in zip(parts, layout.rows, strict=True):
        if part is None:
            blocks.append(present[0].new_zeros(layout.groups, rows, width))
            continue
        blocks.append(F.pad(part.view(layout.groups, rows, r), (column, width - column - r)))
        column += r
    return torch.cat(blocks, dim=1).view(-1, width)


def initial_a(projection: Projection, layer: int, r: int, fan_in: int, seed: int) -> Tensor:
    """A as PEFT draws it, kaiming uniform with a = √5: ±1/√fan_in, fp32 `[r, fan_in]` on CPU.

    A function of seed, layer (of the whole model) and projection, so the same at any layout.
    """
    source = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, projection.number, layer])))
    uniform = torch.from_numpy(source.random((r, fan_in), dtype=np.float32))
    return (2 * uniform - 1) / math.sqrt(fan_in)


class Adapter(torch.nn.Module):
    """A and B of one projection, as far as this rank holds them: `lora_a` `[r, in]`, `lora_b` `[out, r]`."""

    def __init__(self, r: int, fan_in: int, fan_out: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.lora_a = torch.nn.Parameter(torch.zeros(r, fan_in, dtype=dtype, device=device))
        self.lora_b = torch.nn.Parameter(torch.zeros(fan_out, r, dtype=dtype, device=device))

    def forward(self) -> tuple[Tensor, Tensor]:
        """Both factors. A call, because core's overlapped gather waits for a module's parameters there."""
        return self.lora_a, self.lora_b


class AdaptedLinear(torch.nn.Module):
    """Adapters over a linear layer; mixed in before the layer's own class (`with_lora`)."""

    def __init__(
        self,
        input_size: int,
        output_size: int,
        *args: Any,
        lora: LoraSpec,
        linear: str,
        config: TransformerConfig,
        tp_group: Any = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(input_size, output_size, *args, config=config, tp_group=tp_group, **kwargs)
        projections = projections_of(linear)
        self.lora = lora
        self.lora_group = get_tensor_model_parallel_group_if_none(tp_group)
        tp = self.lora_group.size()
        self.lora_fan_in = input_size  # of the whole layer
        self.lora_row_parallel = projections[0].row_parallel
        self.lora_sequence_parallel = config.sequence_parallel and tp > 1
        self.lora_layout = FusedRows.of_rank(linear, config, tp)
        fan_in = input_size // tp if self.lora_row_parallel else input_size
        device = next(self.parameters()).device
        self.adapters = torch.nn.ModuleDict()
        self.lora_slots: list[tuple[Projection, Adapter | None]] = []  # one for each projection, in order
        for projection, rows in zip(projections, self.lora_layout.rows, strict=True):
            adapter = None
            if projection.target in lora.targets:
                fan_out = self.lora_layout.groups * rows
                adapter = Adapter(lora.r, fan_in, fan_out, config.params_dtype, device)
                self._mark(adapter)
                self.adapters[projection.target] = adapter
            self.lora_slots.append((projection, adapter))
        if hasattr(self, "return_layernorm_output"):
            # Transformer Engine's LayerNormLinear norms inside; adapters take the normed input. Not run yet.
            self.return_layernorm_output = True

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """The base's output plus scale · B·A·dropout(x); the bias, if any, as the base returns it."""
        output, bias = super().forward(x, *args, **kwargs)
        if isinstance(output, tuple):
            output, x = output
        factors = [None if adapter is None else adapter() for _, adapter in self.lora_slots]
        a = self._exchange(self._project(x, [pair[0] for pair in factors if pair is not None]))
        b = fuse_b([None if pair is None else pair[1] for pair in factors], self.lora_layout)
        adapted = torch.addmm(output.flatten(0, -2), a.flatten(0, -2), b.t(), alpha=self.lora.scale)
        return adapted.view_as(output), bias

    @torch.no_grad()
    def start(self, layer: int, seed: int) -> None:
        """A drawn, B zero: the adapters of layer `layer` of the model, before any training."""
        for projection, adapter in self.lora_slots:
            if adapter is None:
                continue
            whole = initial_a(projection, layer, self.lora.r, self.lora_fan_in, seed)
            if self.lora_row_parallel:
                whole = whole.chunk(self.lora_group.size(), dim=1)[self.lora_group.rank()]
            adapter.lora_a.copy_(whole)
            adapter.lora_b.zero_()

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """The base's entries as they are without adapters, and each factor by its sharding."""
        state = super().sharded_state_dict(prefix, sharded_offsets, metadata)  # type: ignore[misc]
        sharded, axis = ("lora_a", 1) if self.lora_row_parallel else ("lora_b", 0)
        own = make_sharded_tensors_for_checkpoint(
            self.adapters.state_dict(prefix="adapters.", keep_vars=True),
            prefix,
            {f"adapters.{target}.{sharded}": axis for target in self.adapters},
            sharded_offsets,
            tp_group=self.lora_group,
            dp_cp_group=(metadata or {})["dp_cp_group"],
        )
        return {**state, **own}

    def _project(self, x: Tensor, factors: list[Tensor]) -> Tensor:
        """Each A applied to a dropout of its own of the input, `[S, B, n·r]`."""
        if not self.training or self.lora.dropout == 0:
            return F.linear(x, torch.cat(factors))
        # As core's attention dropout (`dot_product_attention.py`): features divided over ranks need masks of
        # their own, the same input the same mask. Under sequence parallel the block has forked already.
        divided = self.lora_row_parallel and not self.lora_sequence_parallel
        with get_cuda_rng_tracker().fork() if divided else nullcontext():
            return torch.cat([F.linear(F.dropout(x, self.lora.dropout), a) for a in factors], dim=-1)

    def _exchange(self, a: Tensor) -> Tensor:
        group = self.lora_group
        if self.lora_row_parallel:
            if self.lora_sequence_parallel:
                return reduce_scatter_to_sequence_parallel_region(a, group=group)
            return reduce_from_tensor_model_parallel_region(a, group=group)
        if self.lora_sequence_parallel:
            return gather_from_sequence_parallel_region(a, group=group)
        return copy_to_tensor_model_parallel_region(a, group=group)

    def _mark(self, adapter: Adapter) -> None:
        """Tell core which factor is a shard, and whether the other's gradient is still to be summed."""
        shard, whole = adapter.lora_b, adapter.lora_a
        if self.lora_row_parallel:
            shard, whole = whole, shard
        axis = 1 if self.lora_row_parallel else 0
        set_tensor_model_parallel_attributes(shard, is_parallel=True, dim=axis, stride=1)
        whole.sequence_parallel = self.lora_sequence_parallel  # type: ignore[attr-defined]
