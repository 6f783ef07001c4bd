"""The architecture that a Hugging Face config describes, in plain numbers (pure: no torch).

Reads what transformers 4.x writes (`rope_theta`, `rope_scaling`) and what 5.x writes
(`rope_parameters`). A field that is absent means what it means to the family's class in
transformers; the sizes themselves must be there.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from usdm_megatron.errors import ConversionError

_REQUIRED_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
)
# the same for every family here, in transformers 4.40 and in 5.23
_DEFAULT_ROPE_THETA = 10_000.0
_DEFAULT_RMS_EPS = 1e-6
_DEFAULT_INITIALIZER_RANGE = 0.02

_MOST_LAYERS = (
    10_000  # names are listed for every layer: a number out of a broken file must not fill the memory
)


@dataclass(frozen=True, kw_only=True)
class Family:
    """A class of transformers that computes what our model computes, and what its config leaves unsaid."""

    transformers_class: str
    model_type: str
    other_names: tuple[str, ...] = ()  # `architectures` that are this class under another name
    kv_heads: int | None = None  # when absent; None: as many as query heads
    max_positions: int  # when absent
    sliding_window: int | None = None  # when absent; None: the class knows no window

    @property
    def names(self) -> tuple[str, ...]:
        return (self.transformers_class, *self.other_names)


MISTRAL = Family(
    transformers_class="MistralForCausalLM",
    model_type="mistral",
    other_names=("CustomMistralForCausalLM",),  # what naver-ai/USTM and USDM-DailyTalk call themselves
    kv_heads=8,
    max_positions=131_072,
    sliding_window=4_096,
)
LLAMA = Family(transformers_class="LlamaForCausalLM", model_type="llama", max_positions=2_048)
FAMILIES = (MISTRAL, LLAMA)


def family_of(config: Mapping[str, Any]) -> Family:
    """The family by `architectures`, else by `model_type`; a config with neither is read as Mistral's.

    Raises `ConversionError` when they name no family, or two.
    """
    names, model_type = config.get("architectures"), config.get("model_type")
    by_type = next((family for family in FAMILIES if family.model_type == model_type), None)
    if names is None:
        if by_type is None and model_type is not None:
            known = ", ".join(family.model_type for family in FAMILIES)
            raise ConversionError(
                f"config.json: model_type = {model_type!r} is not supported; supported are {known}"
            )
        return by_type or MISTRAL
    known_names = {name: family for family in FAMILIES for name in family.names}
    listed = [name for name in names if isinstance(name, str)] if isinstance(names, list) else []
    found = next((known_names[name] for name in listed if name in known_names), None)
    if found is None:
        raise ConversionError(
            f"config.json: architectures = {names!r} is not supported; supported are {', '.join(known_names)}"
        )
    if by_type not in (None, found):
        raise ConversionError(
            f"config.json: architectures = {names!r} and model_type = {model_type!r} contradict each other"
        )
    return found


@dataclass(frozen=True)
class HFArchitecture:
    """Sizes and constants of a decoder with grouped-query attention, RMSNorm, RoPE and SwiGLU."""

    hidden: int
    layers: int
    heads: int  # query heads
    kv_heads: int  # query groups
    head_dim: int  # may differ from hidden / heads
    ffn: int  # width of the gate, and of the up projection
    vocab_size: int  # rows of the Hugging Face embedding, without padding
    max_positions: int
    sliding_window: int | None  # keys that a query sees, itself included; None: all
    rms_eps: float = _DEFAULT_RMS_EPS
    rope_theta: float = _DEFAULT_ROPE_THETA
    tied: bool = False  # lm_head is the embedding
    initializer_range: float = _DEFAULT_INITIALIZER_RANGE  # standard deviation of new rows

    def __post_init__(self) -> None:
        problems = [
            f"config.json: {name} = {value!r} must be a positive integer"
            for name, value in self._positive_integers().items()
            if not _is_positive_integer(value)
        ]
        problems += [
            f"config.json: {name} = {value!r} must be a positive number"
            for name, value in (("rms_norm_eps", self.rms_eps), ("rope_theta", self.rope_theta))
            if not _is_number(value) or value <= 0
        ]
        if not _is_number(self.initializer_range) or self.initializer_range < 0:
            problems.append(f"config.json: initializer_range = {self.initializer_range!r} must be >= 0")
        if not problems and self.heads % self.kv_heads:
            problems.append(
                f"config.json: num_attention_heads = {self.heads} must be a multiple of "
                f"num_key_value_heads = {self.kv_heads}"
            )
        if not problems and self.head_dim % 2:
            problems.append(f"config.json: head_dim = {self.head_dim} must be even (RoPE turns pairs)")
        if not problems and self.layers > _MOST_LAYERS:
            problems.append(
                f"config.json: num_hidden_layers = {self.layers} must be at most {_MOST_LAYERS:,}"
            )
        if problems:
            raise ConversionError(*problems)

    @property
    def heads_per_group(self) -> int:
        """Query heads that share one key and one value head."""
        return self.heads // self.kv_heads

    @property
    def qkv_rows(self) -> int:
        """Rows of megatron's fused `linear_qkv.weight`: q, k and v of every group."""
        return (self.heads + 2 * self.kv_heads) * self.head_dim

    @classmethod
    def from_hf_config(cls, config: Mapping[str, Any]) -> HFArchitecture:
        """Read `config.json` as a dict.

        Raises `ConversionError` with every missing size, and every field that asks for something
        that our model does not compute.
        """
        family = family_of(config)
        problems = [f"config.json: {name} is missing" for name in _REQUIRED_SIZES if config.get(name) is None]
        problems += _unsupported(config, family)
        if problems:
            raise ConversionError(*problems)
        heads = config["num_attention_heads"]
        head_dim = config.get("head_dim")
        if head_dim is None:
            if not _is_positive_integer(heads) or not _is_positive_integer(config["hidden_size"]):
                raise ConversionError(
                    "config.json: hidden_size, num_attention_heads must be positive integers"
                )
            if config["hidden_size"] % heads:
                raise ConversionError(
                    f"config.json: hidden_size = {config['hidden_size']} is no multiple of "
                    f"num_attention_heads = {heads}, and there is no head_dim"
                )
            head_dim = config["hidden_size"] // heads
        kv_heads = config.get("num_key_value_heads", family.kv_heads)  # null: as many as query heads
        return cls(
            hidden=config["hidden_size"],
            layers=config["num_hidden_layers"],
            heads=heads,
            kv_heads=heads if kv_heads is None else kv_heads,
            head_dim=head_dim,
            ffn=config["intermediate_size"],
            vocab_size=config["vocab_size"],
            max_positions=config.get("max_position_embeddings", family.max_positions),
            sliding_window=config.get("sliding_window", family.sliding_window),
            rms_eps=config.get("rms_norm_eps", _DEFAULT_RMS_EPS),
            rope_theta=float(_rope_theta(config)),
            tied=bool(config.get("tie_word_embeddings", False)),
            initializer_range=config.get("initializer_range", _DEFAULT_INITIALIZER_RANGE),
        )

    def _positive_integers(self) -> dict[str, Any]:
        values: dict[str, Any] = {
            "hidden_size": self.hidden,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "intermediate_size": self.ffn,
            "vocab_size": self.vocab_size,
            "max_position_embeddings": self.max_positions,
        }
        if self.sliding_window is not None:
            values["sliding_window"] = self.sliding_window
        return values


def model_identity(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a Hugging Face config that make it this model and no other.

    `initializer_range` only says how new rows were drawn, so two configs that differ in it
    alone describe the same model.
    """
    identity = asdict(HFArchitecture.from_hf_config(config))
    del identity["initializer_range"]
    return identity


def identity_differences(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    """`field: ours != theirs` for every field of two `model_identity` records that differs."""
    return [
        f"{name}: {ours.get(name)!r} != {theirs.get(name)!r}"
        for name in sorted({*ours, *theirs})
        if ours.get(name) != theirs.get(name)
    ]


def _unsupported(config: Mapping[str, Any], family: Family) -> list[str]:
    """A sentence for everything that the model would silently compute differently."""
    problems = []
    activation = config.get("hidden_act", "silu")
    if activation != "silu":
        problems.append(f"config.json: hidden_act = {activation!r} is not supported; only 'silu' is")
    tied = config.get("tie_word_embeddings")
    if tied is not None and not isinstance(tied, bool):  # "false" would be true
        problems.append(f"config.json: tie_word_embeddings = {tied!r} must be true or false")
    for name in ("attention_bias", "mlp_bias"):
        if config.get(name):
            problems.append(f"config.json: {name} = true is not supported; only models without biases are")
    if config.get("quantization_config"):
        problems.append("config.json: quantized weights are not supported; convert the unquantized model")
    return problems + _unsupported_windows(config, family) + _unsupported_rope(config)


def _unsupported_windows(config: Mapping[str, Any], family: Family) -> list[str]:
    """One window, or none, for every layer."""
    window = config.get("sliding_window", family.sliding_window)
    if window is not None and family.sliding_window is None:
        return [
            f"config.json: sliding_window = {window!r} is nothing that {family.transformers_class} of "
            "transformers computes, and other programs do; set it to null"
        ]
    kind = "full_attention" if window is None else "sliding_attention"
    listed = config.get("layer_types") or []
    if not isinstance(listed, list) or any(other != kind for other in listed):
        found = sorted({str(other) for other in listed}) if isinstance(listed, list) else listed
        return [
            f"config.json: layer_types with {found!r} is not supported; with sliding_window = {window!r} "
            f"every layer must be {kind!r}"
        ]
    return []


def _unsupported_rope(config: Mapping[str, Any]) -> list[str]:
    """Plain RoPE over the whole head, one for every layer."""
    problems = []
    if config.get("partial_rotary_factor") not in (1, None):
        problems.append(f"config.json: partial_rotary_factor = {config['partial_rotary_factor']!r} must be 1")
    for name in ("rope_parameters", "rope_scaling"):
        rope = config.get(name)
        if rope is None:
            continue
        if not isinstance(rope, Mapping):
            problems.append(f"config.json: {name} = {rope!r} must be an object or null")
            continue
        if any(isinstance(value, Mapping) for value in rope.values()):
            problems.append(
                f"config.json: {name} differs by layer type ({', '.join(rope)}); one must do for all"
            )
            continue
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind != "default":
            problems.append(f"config.json: {name} of type {kind!r} is not supported; only 'default' is")
        if rope.get("partial_rotary_factor") not in (1, None):
            part = rope["partial_rotary_factor"]
            problems.append(f"config.json: {name}.partial_rotary_factor = {part!r} must be 1")
    return problems


def _rope_theta(config: Mapping[str, Any]) -> Any:
    """5.x keeps theta inside `rope_parameters`, 4.x beside it; both may be absent.

    `rope_scaling`, where it says anything, goes before `rope_parameters` (transformers 5.23,
    `modeling_rope_utils.py:777`).
    """
    inside = (config.get("rope_scaling") or config.get("rope_parameters") or {}).get("rope_theta")
    theta = config.get("rope_theta") if inside is None else inside
    if theta is None:
        return _DEFAULT_ROPE_THETA
    if not _is_number(theta):
        raise ConversionError(f"config.json: rope_theta = {theta!r} must be a positive number")
    return theta


def _is_number(value: Any) -> bool:
    """Of either type that JSON gives, and a finite float."""
    return (
        isinstance(value, (int, float))
        and not isinstance(value, bool)
        and abs(value) <= sys.float_info.max  # False for NaN; an int may be larger than any float
    )


def _is_positive_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
