"""One table of weights for both directions: Hugging Face names ↔ megatron-core's sharded keys.

Letters in shapes: V vocabulary (HF) · P padded vocabulary · h hidden · g query groups (kv heads)
· n query heads · d head_dim · f ffn.

Core's keys are stacked over layers in a checkpoint: `decoder.layers.self_attention.linear_qkv.weight`
has shape [layers, (n + 2g)·d, h]. The functions here work on one layer of an entry; norms carry
Transformer Engine's names, which core's local layer spec writes too.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from usdm_megatron.architecture import FAMILIES, MISTRAL, Family, HFArchitecture, family_of
from usdm_megatron.errors import ConversionError


class Arrangement(enum.Enum):
    """How the HF tensors of an entry lie in the core tensor."""

    PLAIN = "as it is"
    QKV = "per query group [q_1..q_{n/g}, k, v]"
    GATE_UP = "[gate; up]"
    VOCABULARY = "rows padded with zeros"


@dataclass(frozen=True)
class Entry:
    """One core tensor and the HF tensors that it is made of; `{layer}` is the layer's number."""

    core_key: str
    hf_patterns: tuple[str, ...]
    arrangement: Arrangement
    core_shape: tuple[str, ...]  # of one layer, in the letters above; sizes by `_sizes`
    hf_shapes: tuple[tuple[str, ...], ...]

    @property
    def per_layer(self) -> bool:
        return self.core_key.startswith("decoder.layers.")

    def hf_names(self, layer: int | None = None) -> tuple[str, ...]:
        return tuple(pattern.format(layer=layer) for pattern in self.hf_patterns)

    def layers(self, model: HFArchitecture) -> tuple[int | None, ...]:
        """The layers that this entry has a tensor for; `(None,)` when it is not per layer."""
        return tuple(range(model.layers)) if self.per_layer else (None,)


_LAYER, _HF_LAYER = "decoder.layers", "model.layers.{layer}"


def _plain(core_key: str, hf_pattern: str, *shape: str) -> Entry:
    return Entry(core_key, (hf_pattern,), Arrangement.PLAIN, shape, (shape,))


def _vocabulary(core_key: str, hf_pattern: str) -> Entry:
    return Entry(
        core_key, (hf_pattern,), Arrangement.VOCABULARY, ("padded", "hidden"), (("vocab", "hidden"),)
    )


_EMBEDDING = _vocabulary("embedding.word_embeddings.weight", "model.embed_tokens.weight")
_OUTPUT = _vocabulary("output_layer.weight", "lm_head.weight")

_ENTRIES = (
    _EMBEDDING,
    _plain(
        f"{_LAYER}.self_attention.linear_qkv.layer_norm_weight",
        f"{_HF_LAYER}.input_layernorm.weight",
        "hidden",
    ),
    Entry(
        f"{_LAYER}.self_attention.linear_qkv.weight",
        tuple(f"{_HF_LAYER}.self_attn.{name}_proj.weight" for name in "qkv"),
        Arrangement.QKV,
        ("qkv", "hidden"),
        (("q", "hidden"), ("kv", "hidden"), ("kv", "hidden")),
    ),
    _plain(
        f"{_LAYER}.self_attention.linear_proj.weight",
        f"{_HF_LAYER}.self_attn.o_proj.weight",
        "hidden",
        "q",
    ),
    _plain(
        f"{_LAYER}.mlp.linear_fc1.layer_norm_weight",
        f"{_HF_LAYER}.post_attention_layernorm.weight",
        "hidden",
    ),
    Entry(
        f"{_LAYER}.mlp.linear_fc1.weight",
        (f"{_HF_LAYER}.mlp.gate_proj.weight", f"{_HF_LAYER}.mlp.up_proj.weight"),
        Arrangement.GATE_UP,
        ("gate_up", "hidden"),
        (("ffn", "hidden"), ("ffn", "hidden")),
    ),
    _plain(f"{_LAYER}.mlp.linear_fc2.weight", f"{_HF_LAYER}.mlp.down_proj.weight", "hidden", "ffn"),
    _plain("decoder.final_layernorm.weight", "model.norm.weight", "hidden"),
    _OUTPUT,
)

# Empty objects that core's linear layers ask for when they load strictly (`tensor_parallel/layers.py:1075`).
EXTRA_STATE_KEYS = tuple(
    f"{_LAYER}.{module}._extra_state"
    for module in (
        "self_attention.linear_qkv",
        "self_attention.linear_proj",
        "mlp.linear_fc1",
        "mlp.linear_fc2",
    )
)


@dataclass(frozen=True)
class ArchitectureTable:
    """What the converter knows about one architecture of transformers."""

    export_as: str  # transformers' class, and `architectures` of the exported config.json
    model_type: str
    entries: tuple[Entry, ...]
    ignored_hf_names: tuple[str, ...]  # buffers that old transformers saved

    def entries_of(self, model: HFArchitecture) -> tuple[Entry, ...]:
        """The entries that this model has: with tied embeddings there is no output layer."""
        return tuple(entry for entry in self.entries if not (model.tied and entry is _OUTPUT))

    def in_order(self, model: HFArchitecture) -> list[tuple[Entry, int | None]]:
        """Every entry and layer, in the order in which transformers lists a model's tensors."""
        entries = self.entries_of(model)
        first_layered = next(i for i, entry in enumerate(entries) if entry.per_layer)
        layered = [entry for entry in entries if entry.per_layer]
        behind = [entry for entry in entries[first_layered:] if not entry.per_layer]
        return [
            *((entry, None) for entry in entries[:first_layered]),
            *((entry, layer) for layer in range(model.layers) for entry in layered),
            *((entry, None) for entry in behind),
        ]

    def hf_shapes(self, model: HFArchitecture) -> dict[str, tuple[int, ...]]:
        """Shape of every HF tensor by name, in the model's order."""
        return {
            name: _numbers(shape, model)
            for entry, layer in self.in_order(model)
            for name, shape in zip(entry.hf_names(layer), entry.hf_shapes, strict=True)
        }

    def ignores(self, name: str, model: HFArchitecture) -> bool:
        """Whether an HF tensor may be there without being converted."""
        return any(
            name == pattern.format(layer=layer)
            for pattern in self.ignored_hf_names
            for layer in range(model.layers)
        )


def _table(family: Family) -> ArchitectureTable:
    """Every family has the same weights under the same names; one with others would bring its own entries."""
    return ArchitectureTable(
        export_as=family.transformers_class,
        model_type=family.model_type,
        entries=_ENTRIES,
        ignored_hf_names=(f"{_HF_LAYER}.self_attn.rotary_emb.inv_freq",),
    )


_TABLES = {family: _table(family) for family in FAMILIES}
ARCHITECTURES: dict[str, ArchitectureTable] = {
    name: _TABLES[family] for family in FAMILIES for name in family.names
}


def architecture_table(hf_config: Mapping[str, Any]) -> ArchitectureTable:
    """The table for `config.json`'s `architectures`; raises `ConversionError` listing what is supported."""
    if hf_config.get("architectures") is None:
        raise ConversionError(
            f"config.json: architectures is missing; supported are {', '.join(ARCHITECTURES)}"
        )
    return _TABLES[family_of(hf_config)]


def core_shape(entry: Entry, model: HFArchitecture, padded_size: int) -> tuple[int, ...]:
    """Shape of one layer of a core tensor."""
    return _numbers(entry.core_shape, model, padded_size)


def from_hf(
    entry: Entry,
    tensors: Mapping[str, torch.Tensor],
    model: HFArchitecture,
    padded_size: int,
    layer: int | None = None,
) -> torch.Tensor:
    """The core tensor of one entry (of one layer) from the HF tensors, by their names.

    The result may share memory with its source. Rows beyond the vocabulary are zeros.
    """
    parts = [tensors[name] for name in entry.hf_names(layer)]
    match entry.arrangement:
        case Arrangement.PLAIN:
            return parts[0]
        case Arrangement.QKV:
            g = model.kv_heads
            by_group = [part.reshape(g, -1, model.head_dim, *part.shape[1:]) for part in parts]
            return torch.cat(by_group, dim=1).reshape(model.qkv_rows, *parts[0].shape[1:])
        case Arrangement.GATE_UP:
            return torch.cat(parts, dim=0)
        case Arrangement.VOCABULARY:
            padding = padded_size - parts[0].shape[0]
            return torch.cat([parts[0], parts[0].new_zeros(padding, *parts[0].shape[1:])])


def to_hf(
    entry: Entry, tensor: torch.Tensor, model: HFArchitecture, layer: int | None = None
) -> dict[str, torch.Tensor]:
    """The HF tensors by name from the core tensor of one entry (of one layer); inverse of `from_hf`.

    Also for anything of the weight's shape: gradients, optimizer moments. The results are contiguous and may
    share memory with `tensor`.
    """
    parts: tuple[torch.Tensor, ...]
    match entry.arrangement:
        case Arrangement.PLAIN:
            parts = (tensor,)
        case Arrangement.QKV:
            by_group = tensor.reshape(model.kv_heads, -1, model.head_dim, *tensor.shape[1:])
            split = by_group.split([model.heads_per_group, 1, 1], dim=1)
            parts = tuple(part.reshape(-1, *tensor.shape[1:]) for part in split)
        case Arrangement.GATE_UP:
            parts = tensor.chunk(2, dim=0)
        case Arrangement.VOCABULARY:
            parts = (tensor[: model.vocab_size],)
    return dict(zip(entry.hf_names(layer), (part.contiguous() for part in parts), strict=True))


def entry_of_parameter(name: str, table: ArchitectureTable = _TABLES[MISTRAL]) -> tuple[Entry, int | None]:
    """The entry, and layer, of a parameter of a `GPTModel` by its module name.

    `decoder.layers.3.self_attention.linear_qkv.weight` → that entry, 3. Both spellings of the
    norms are known: core's local spec (`input_layernorm`, `pre_mlp_layernorm`) and TE's.
    The number is the layer's own in the pipeline stage, as core names it.
    """
    parts = name.split(".")
    layer = int(parts.pop(2)) if name.startswith(f"{_LAYER}.") else None
    key = ".".join(parts)
    key = key.replace(".input_layernorm.weight", ".self_attention.linear_qkv.layer_norm_weight")
    key = key.replace(".pre_mlp_layernorm.weight", ".mlp.linear_fc1.layer_norm_weight")
    for entry in table.entries:
        if entry.core_key == key:
            return entry, layer
    raise KeyError(f"{name} is no weight in the table")


def _numbers(shape: tuple[str, ...], model: HFArchitecture, padded_size: int = 0) -> tuple[int, ...]:
    sizes = {
        "hidden": model.hidden,
        "vocab": model.vocab_size,
        "padded": padded_size,
        "q": model.heads * model.head_dim,
        "kv": model.kv_heads * model.head_dim,
        "qkv": model.qkv_rows,
        "ffn": model.ffn,
        "gate_up": 2 * model.ffn,
    }
    return tuple(sizes[name] for name in shape)
