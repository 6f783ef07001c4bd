"""`adapter_config.json`: PEFT's `LoraConfig` (peft 0.21, `tuners/lora/config.py`) ↔ `LoraSpec`; no torch.

Written are fields that every version knows, and `trainable_token_indices` (peft 0.15) when rows were
trained. Read is what this package computes: any other field must be off, those of later versions too.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from usdm_megatron.convert.foreign_bytes import escaped, named
from usdm_megatron.errors import ConfigError, ConversionError
from usdm_megatron.lora_spec import TARGETS, LoraSpec
from usdm_megatron.model.lora.names import target_of_module
from usdm_megatron.vocab import Vocabulary

ADAPTER_CONFIG_FILE = "adapter_config.json"
_LARGEST = sys.float_info.max
_EMBEDDING, _OUTPUT = "embed_tokens", "lm_head"
_READ = frozenset({"r", "lora_alpha", "lora_dropout", "target_modules", "trainable_token_indices"})
# What they may say besides nothing. The initial values that are missing (pissa, olora, corda, loftq, …)
# change the base's weights, too.
_MEANINGS: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "task_type": ("CAUSAL_LM",),
    "bias": ("none",),
    "init_lora_weights": (True, "gaussian", "orthogonal", "eva"),
}
_SAY_NOTHING = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "ensure_weight_tying",  # of what can be trained here, only rows of tied embeddings: tied anyway
        "eva_config",
        "inference_mode",
        "megatron_core",
        "peft_version",
        "qalora_group_size",
        "revision",
        "runtime_config",
    }
)


def peft_config(
    spec: LoraSpec, vocabulary: Vocabulary, *, tied: bool, base_model: str | None
) -> dict[str, Any]:
    """The content of `adapter_config.json`."""
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "revision": None,
        "inference_mode": True,
        "r": spec.r,
        "lora_alpha": int(spec.alpha) if spec.alpha == int(spec.alpha) else spec.alpha,
        "lora_dropout": spec.dropout,
        "target_modules": [target for target in TARGETS if target in spec.targets],
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": None,
    }
    if spec.train_new_embeddings:
        config["trainable_token_indices"] = _token_indices(vocabulary, tied)
    return config


def spec_of(config: Mapping[str, Any], path: Path, vocabulary: Vocabulary, *, tied: bool) -> LoraSpec:
    """The adapter that a foreign `adapter_config.json` (at `path`) describes, over a base of this vocabulary.

    Raises `ConversionError` with every field whose value is not computed here.
    """
    problems = [problem for name, value in config.items() if (problem := _meaning_problem(name, value))]
    if config.get("peft_type") is None:
        problems.append("peft_type is missing; it must be LORA")
    for name in ("r", "lora_alpha", "lora_dropout"):
        value = config.get(name)
        if not isinstance(value, int | float) or isinstance(value, bool):
            problems.append(f"{name} is {escaped(value)}; it must be a number")
        elif isinstance(value, int) and abs(value) > _LARGEST:  # JSON's have no bound, a float's value has
            problems.append(f"{name} is {escaped(value)}; it must be a number of at most {_LARGEST:.3g}")
    problems += _target_problems(config.get("target_modules"))
    indices = config.get("trainable_token_indices")
    if indices is not None and not _are_new_ids(indices, vocabulary, tied):
        problems.append(_token_problem(indices, vocabulary, tied))
    if not problems:
        try:
            return LoraSpec(
                r=config["r"],
                alpha=float(config["lora_alpha"]),
                dropout=float(config["lora_dropout"]),
                # which layers a whole path names, its tensors tell
                targets=frozenset(target_of_module(name) or name for name in config["target_modules"]),
                train_new_embeddings=indices is not None,
            )
        except ConfigError as error:
            problems += error.problems
    raise ConversionError(*(f"{path}: {problem}" for problem in problems))


def _target_problems(targets: Any) -> list[str]:
    """What `target_modules` says that is no list of the model's projections; bare names `LoraSpec` judges."""
    if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
        return [
            f"target_modules is {escaped(targets)}; it must be a list of names, not a pattern: list which of "
            f"{', '.join(TARGETS)} it means, or merge this adapter with peft, and import the model"
        ]
    return [
        f"target_modules names {escaped(name)}, which is no module of this model; give one of "
        f"{', '.join(TARGETS)}, or its whole path"
        for name in targets
        if "." in name and target_of_module(name) is None
    ]


def _meaning_problem(name: str, value: Any) -> str | None:
    if name in _READ or name in _SAY_NOTHING or value is None or value is False or value in ([], {}, ""):
        return None
    meanings = _MEANINGS.get(name)
    if meanings is None:
        return (
            f"{named(name)} = {escaped(value)} is not computed here, it must be off; merge this adapter with "
            "peft, and import the model"
        )
    if any(type(value) is type(meaning) and value == meaning for meaning in meanings):
        return None
    return f"{name} = {escaped(value)} is not computed here; it must be {' or '.join(map(str, meanings))}"


def _token_indices(vocabulary: Vocabulary, tied: bool) -> dict[str, list[int]]:
    ids = list(range(vocabulary.text_size, vocabulary.size))
    return {_EMBEDDING: ids} if tied else {_EMBEDDING: ids, _OUTPUT: ids}


def _are_new_ids(indices: Any, vocabulary: Vocabulary, tied: bool) -> bool:
    """Whether these are the rows that are trained here; a list means the embedding's."""
    by_module = indices if isinstance(indices, dict) else {_EMBEDDING: indices}
    by_module = {str(name).removeprefix("model."): ids for name, ids in by_module.items()}
    expected = _token_indices(vocabulary, tied)
    if tied and by_module.get(_OUTPUT) == by_module.get(_EMBEDDING):  # the same rows, said twice
        by_module.pop(_OUTPUT)
    return vocabulary.has_speech and by_module == expected


def _token_problem(indices: Any, vocabulary: Vocabulary, tied: bool) -> str:
    said = f"trainable_token_indices = {escaped(indices)} is not computed here; it must be off"
    if not vocabulary.has_speech:
        return f"{said}: the base has no ids that speech added"
    modules = _EMBEDDING if tied else f"{_EMBEDDING} and {_OUTPUT} each"
    return (
        f"{said}, or for {modules} the ids that speech added, {vocabulary.text_size} to {vocabulary.size - 1}"
    )
