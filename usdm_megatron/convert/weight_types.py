"""Names of weight types: ours, torch's, safetensors' and transformers'."""

from __future__ import annotations

from typing import Literal, cast

import torch

from usdm_megatron.errors import ConversionError

TypeName = Literal["bf16", "fp16", "fp32"]

TORCH_TYPES: dict[str, torch.dtype] = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_SAFETENSORS = {"BF16": "bf16", "F16": "fp16", "F32": "fp32"}
_TRANSFORMERS = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


def type_of_safetensors(names: set[str]) -> TypeName:
    """The one type of a model's tensors; raises `ConversionError` when they differ or are not supported."""
    if len(names) != 1:
        raise ConversionError(f"the tensors have different types ({', '.join(sorted(names))}); say --dtype")
    (name,) = names
    if name not in _SAFETENSORS:
        raise ConversionError(
            f"the tensors are of type {name}; supported are {', '.join(_SAFETENSORS)}: say --dtype"
        )
    return cast(TypeName, _SAFETENSORS[name])


def type_of_torch(dtype: torch.dtype) -> TypeName:
    """Our name of a torch type; raises `ConversionError` for one that no checkpoint of ours has."""
    for name, candidate in TORCH_TYPES.items():
        if candidate == dtype:
            return cast(TypeName, name)
    raise ConversionError(f"weights of type {dtype} are not supported")


def safetensors_name(name: TypeName) -> str:
    """`BF16` for `bf16`, as a safetensors header says it."""
    return next(theirs for theirs, ours in _SAFETENSORS.items() if ours == name)


def transformers_name(name: TypeName) -> str:
    """`bfloat16` for `bf16`, as `config.json` says it."""
    return _TRANSFORMERS[name]
