"""The architecture that a Hugging Face config describes, in plain numbers (pure: no torch).

Reads what transformers 4.x writes (`rope_theta`, `torch_dtype`, `rope_scaling`) and what
5.x writes (`rope_parameters`, `dtype`). A field that is absent means what it means to
transformers' `MistralConfig`; the sizes themselves must be there.
"""

from __future__ import annotations

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
# `transformers.MistralConfig`, the same in 4.40 and in 5.23
_DEFAULT_ROPE_THETA = 10_000.0
_DEFAULT_RMS_EPS = 1e-6
_DEFAULT_SLIDING_WINDOW = 4_096
_DEFAULT_MAX_POSITIONS = 131_072
_DEFAULT_INITIALIZER_RANGE = 0.02


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

        Raises `ConversionError` with every missing size, unsupported activation or RoPE type.
        """
        problems = [f"config.json: {name} is missing" for name in _REQUIRED_SIZES if config.get(name) is None]
        problems += _unsupported(config)
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
        kv_heads = config.get("num_key_value_heads", 8)  # MistralConfig: 8 when absent, heads when null
        return cls(
            hidden=config["hidden_size"],
            layers=config["num_hidden_layers"],
            heads=heads,
            kv_heads=heads if kv_heads is None else kv_heads,
            head_dim=head_dim,
            ffn=config["intermediate_size"],
            vocab_size=config["vocab_size"],
            max_positions=config.get("max_position_embeddings", _DEFAULT_MAX_POSITIONS),
            sliding_window=config.get("sliding_window", _DEFAULT_SLIDING_WINDOW),
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


def _unsupported(config: Mapping[str, Any]) -> list[str]:
    """A sentence for everything that the model would silently compute differently."""
    problems = []
    activation = config.get("hidden_act", "silu")
    if activation != "silu":
        problems.append(f"config.json: hidden_act = {activation!r} is not supported; only 'silu' is")
    for name in ("attention_bias", "mlp_bias"):
        if config.get(name):
            problems.append(f"config.json: {name} = true is not supported; only models without biases are")
    if config.get("quantization_config"):
        problems.append("config.json: quantized weights are not supported; convert the unquantized model")
    for name in ("rope_parameters", "rope_scaling"):
        rope = config.get(name)
        if rope is None:
            continue
        if not isinstance(rope, Mapping):
            problems.append(f"config.json: {name} = {rope!r} must be an object or null")
            continue
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind != "default":
            problems.append(f"config.json: {name} of type {kind!r} is not supported; only 'default' is")
        if rope.get("partial_rotary_factor", 1) != 1:
            problems.append(f"config.json: {name}.partial_rotary_factor must be 1")
    return problems


def _rope_theta(config: Mapping[str, Any]) -> Any:
    """5.x keeps theta inside `rope_parameters`, 4.x beside it; both may be absent."""
    inside = (config.get("rope_parameters") or {}).get("rope_theta")
    theta = config.get("rope_theta") if inside is None else inside
    if theta is None:
        return _DEFAULT_ROPE_THETA
    if not _is_number(theta):
        raise ConversionError(f"config.json: rope_theta = {theta!r} must be a positive number")
    return theta


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_positive_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
