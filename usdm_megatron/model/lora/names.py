"""One table of adapters for all who name them: PEFT's names ↔ megatron-core's keys (pure: no torch).

A adapts the input, `[r, in]`; B its output, `[out, r]`; the projection gains `alpha / r · B·A`.
As every layer's weight, an adapter's key in a checkpoint is stacked over layers:
`decoder.layers.self_attention.linear_qkv.adapters.q_proj.lora_a` has shape [layers, r, in]. B lies
there in the order of the Hugging Face projection, whatever the layer fuses (`adapter.fuse_b`).
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

from usdm_megatron.architecture import HFArchitecture

_LAYERS, _PEFT_MODEL = "decoder.layers", "base_model.model"
LORA_A, LORA_B = "lora_A.weight", "lora_B.weight"
# PEFT's `trainable_token_indices`; the rows themselves, in spite of the name
TOKEN_ROWS = "token_adapter.trainable_tokens_delta"
Size = Literal["r", "hidden", "q", "kv", "ffn", "new"]


@dataclass(frozen=True)
class Projection:
    """One Hugging Face projection that can be adapted, and the core linear layer that computes it.

    `number` is part of the seed of A: never renumber. `row_parallel`: the layer's input is sharded
    over tensor parallel ranks, and with it A; else its output, and with it B.
    """

    number: int
    target: str  # PEFT's word for it in `target_modules`
    linear: str  # attribute of core's attention or MLP
    core_module: str
    hf_module: str
    fan_in: Size
    fan_out: Size
    row_parallel: bool = False


def _attention(number: int, target: str, linear: str, fan_in: Size, fan_out: Size) -> Projection:
    core, hf = f"self_attention.{linear}", f"self_attn.{target}"
    return Projection(number, target, linear, core, hf, fan_in, fan_out, linear == "linear_proj")


def _mlp(number: int, target: str, linear: str, fan_in: Size, fan_out: Size) -> Projection:
    core, hf = f"mlp.{linear}", f"mlp.{target}"
    return Projection(number, target, linear, core, hf, fan_in, fan_out, linear == "linear_fc2")


# Those of one linear layer stand in the order in which it fuses them.
PROJECTIONS = (
    _attention(0, "q_proj", "linear_qkv", "hidden", "q"),
    _attention(1, "k_proj", "linear_qkv", "hidden", "kv"),
    _attention(2, "v_proj", "linear_qkv", "hidden", "kv"),
    _attention(3, "o_proj", "linear_proj", "q", "hidden"),
    _mlp(4, "gate_proj", "linear_fc1", "hidden", "ffn"),
    _mlp(5, "up_proj", "linear_fc1", "hidden", "ffn"),
    _mlp(6, "down_proj", "linear_fc2", "ffn", "hidden"),
)


def projections_of(linear: str) -> tuple[Projection, ...]:
    """What a core linear layer computes, in its order."""
    return tuple(projection for projection in PROJECTIONS if projection.linear == linear)


def target_of_module(name: str) -> str | None:
    """The target that `name` in PEFT's `target_modules` means: one, or the end of a module's path to it.

    `self_attn.q_proj` and `model.layers.1.self_attn.q_proj` mean q_proj; None for what names no module.
    """
    parts = name.split(".")
    for projection in PROJECTIONS:
        path = ["model", "layers", "{layer}", *projection.hf_module.split(".")]
        if len(parts) <= len(path) and all(
            part.isdecimal() if expected == "{layer}" else part == expected
            for part, expected in zip(parts, path[-len(parts) :], strict=True)
        ):
            return projection.target
    return None


@dataclass(frozen=True)
class AdapterEntry:
    """One trained tensor: its key in a checkpoint and its name in PEFT; `{layer}` is the layer's number.

    `hf_module` is whose weight it changes, `part` its name there; `shape` is of one layer; `sharded_axis`
    is the axis of it that tensor parallel ranks divide.
    """

    core_key: str
    hf_module: str
    part: str
    shape: tuple[Size, Size]
    sharded_axis: int | None

    @property
    def per_layer(self) -> bool:
        return self.core_key.startswith(f"{_LAYERS}.")

    @property
    def peft_pattern(self) -> str:
        return f"{_PEFT_MODEL}.{self.hf_module}.{self.part}"

    def peft_name(self, layer: int | None = None) -> str:
        return self.peft_pattern.format(layer=layer)

    def hf_weight(self, layer: int | None = None) -> str:
        """Name of the Hugging Face weight that it changes."""
        return f"{self.hf_module}.weight".format(layer=layer)

    def layers(self, model: HFArchitecture) -> tuple[int | None, ...]:
        """The layers that this entry has a tensor for; `(None,)` when it is not per layer."""
        return tuple(range(model.layers)) if self.per_layer else (None,)


def _factor(projection: Projection, factor: Literal["A", "B"]) -> AdapterEntry:
    is_a = factor == "A"
    sharded = is_a == projection.row_parallel
    return AdapterEntry(
        core_key=f"{_LAYERS}.{projection.core_module}.adapters.{projection.target}.lora_{factor.lower()}",
        hf_module=f"model.layers.{{layer}}.{projection.hf_module}",
        part=LORA_A if is_a else LORA_B,
        shape=("r", projection.fan_in) if is_a else (projection.fan_out, "r"),
        sharded_axis=(1 if is_a else 0) if sharded else None,
    )


def _rows(core_module: str, hf_module: str) -> AdapterEntry:
    return AdapterEntry(f"{core_module}.weight", hf_module, TOKEN_ROWS, ("new", "hidden"), 0)


NEW_EMBEDDING_ROWS = _rows("new_embedding_rows", "model.embed_tokens")
NEW_OUTPUT_ROWS = _rows("new_output_rows", "lm_head")  # an untied model's alone
_FACTORS = {
    projection.target: (_factor(projection, "A"), _factor(projection, "B")) for projection in PROJECTIONS
}
_ENTRIES = (*(entry for both in _FACTORS.values() for entry in both), NEW_EMBEDDING_ROWS, NEW_OUTPUT_ROWS)
_BY_CORE_KEY = {entry.core_key: entry for entry in _ENTRIES}
_BY_PEFT_PATTERN = {entry.peft_pattern: entry for entry in _ENTRIES}


def adapter_entries(
    targets: Collection[str], model: HFArchitecture, *, train_new_embeddings: bool
) -> tuple[AdapterEntry, ...]:
    """The tensors that an adapter of `model` with these targets consists of, in the table's order."""
    entries = [entry for target, both in _FACTORS.items() if target in targets for entry in both]
    if train_new_embeddings:
        entries += [NEW_EMBEDDING_ROWS] if model.tied else [NEW_EMBEDDING_ROWS, NEW_OUTPUT_ROWS]
    return tuple(entries)


def entry_shape(entry: AdapterEntry, model: HFArchitecture, r: int, new_ids: int = 0) -> tuple[int, int]:
    """Shape of one layer of a whole tensor; `new_ids` counts the trained rows."""
    sizes: dict[Size, int] = {
        "r": r,
        "hidden": model.hidden,
        "q": model.heads * model.head_dim,
        "kv": model.kv_heads * model.head_dim,
        "ffn": model.ffn,
        "new": new_ids,
    }
    rows, columns = entry.shape
    return sizes[rows], sizes[columns]


def highest_rank(targets: Collection[str], model: HFArchitecture) -> int:
    """What no `B·A` of these targets can exceed: the smaller side of the largest projection among them."""
    factors = [_FACTORS[target] for target in targets]
    return max(min(entry_shape(a, model, 0)[1], entry_shape(b, model, 0)[0]) for a, b in factors)


def is_adapter_key(name: str) -> bool:
    """Whether a model's parameter (or a checkpoint's key) belongs to the adapter, not to the frozen base."""
    key, _ = _without_layer(name, f"{_LAYERS}.")
    return key in _BY_CORE_KEY


def entry_of_parameter(name: str) -> tuple[AdapterEntry, int | None]:
    """The entry, and layer, of an adapter's parameter by its module name.

    `decoder.layers.3.mlp.linear_fc2.adapters.down_proj.lora_b` → that entry, 3: the layer's number
    in its pipeline stage, as core names it. Raises `KeyError` for a parameter of the base.
    """
    key, layer = _without_layer(name, f"{_LAYERS}.")
    return _BY_CORE_KEY[key], layer


def entry_of_peft(name: str) -> tuple[AdapterEntry, int | None]:
    """The entry, and layer, of a tensor of `adapter_model.safetensors`; raises `KeyError` for any other."""
    pattern, layer = _without_layer(name, f"{_PEFT_MODEL}.model.layers.", "{layer}.")
    return _BY_PEFT_PATTERN[pattern], layer


def _without_layer(name: str, prefix: str, instead: str = "") -> tuple[str, int | None]:
    found = re.match(rf"{re.escape(prefix)}(0|[1-9]\d*)\.", name)
    if found is None:
        return name, None
    return f"{prefix}{instead}{name[found.end() :]}", int(found[1])
