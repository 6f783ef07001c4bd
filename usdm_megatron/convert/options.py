"""What can be asked of the converter (pure: no torch)."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from usdm_megatron.errors import ConversionError

WeightType = Literal["auto", "bf16", "fp16", "fp32"]
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMG]i?B|B)?", re.IGNORECASE)
_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@dataclass(frozen=True, kw_only=True)
class ImportOptions:
    """Hugging Face model → checkpoint (tracker `release`)."""

    hf_path: str
    """Directory of the model, or ORG/NAME on the hub."""
    save: Path
    """Checkpoint to write: SAVE/release and SAVE/latest_checkpointed_iteration.txt."""
    extend_vocab: Literal["usdm"] | None = None
    """usdm: add the 10,003 speech tokens; a model that has them is checked and left as it is."""
    dtype: WeightType = "auto"
    """Type of the weights in the checkpoint; auto: the source's."""
    seed: int = 42
    """Seed of the new rows."""
    hf_revision: str | None = None
    """Branch, tag or commit on the hub."""
    hf_cache_dir: Path | None = None
    """Where the hub's files are kept; default: huggingface_hub's."""
    overwrite: bool = False
    """Replace a converted model that is there."""

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise ConversionError(f"--seed {self.seed} must not be negative")


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """Checkpoint → Hugging Face model (safetensors, config, tokenizer)."""

    load: Path
    """A converted model, a run, or one checkpoint directory."""
    hf_path: Path
    """Directory to write."""
    ckpt_step: int | Literal["best"] | None = None
    """Which step of a run; default: the newest."""
    dtype: WeightType = "auto"
    """Type of the exported weights; auto: the checkpoint's."""
    max_shard_size: str = "5GB"
    """Largest safetensors file, e.g. 5GB or 300MB."""
    overwrite: bool = False
    """Replace a directory that is there."""

    def __post_init__(self) -> None:
        _ = self.max_shard_bytes

    @property
    def max_shard_bytes(self) -> int:
        match = _SIZE.fullmatch(self.max_shard_size.strip())
        size = int(float(match[1]) * _UNITS[(match[2] or "B").upper()]) if match else 0
        if size < 1:
            raise ConversionError(
                f"--max-shard-size {self.max_shard_size!r} must be a size such as 5GB or 300MB"
            )
        return size


@dataclass(frozen=True, kw_only=True)
class VerifyOptions:
    """Compare a Hugging Face model with a checkpoint."""

    hf_path: Path
    """Directory of the Hugging Face model."""
    load: Path
    """A converted model, a run, or one checkpoint directory."""
    mode: Literal["logits", "weights"] = "logits"
    """logits: of both models on one packed row; weights: every tensor, exactly."""
    tensor_model_parallel_size: int = 1
    """Layout of our side (logits)."""
    pipeline_model_parallel_size: int = 1
    """Layout of our side (logits)."""
    tolerance: float = 1e-5
    """Largest difference of a logit that passes."""
    ckpt_step: int | Literal["best"] | None = None
    """Which step of a run; default: the newest."""
    core_attention: Literal["auto", "te", "flash", "torch"] = "auto"
    """Attention backend of our side (logits)."""
    sequence_length: int | None = None
    """Longest packed row to compare (logits); default: as long as the samples need."""
    json: Path | None = None
    """Also write the outcome there (logits)."""

    def __post_init__(self) -> None:
        problems = [
            f"--{name} {value} must be at least 1"
            for name, value in (
                ("tensor-model-parallel-size", self.tensor_model_parallel_size),
                ("pipeline-model-parallel-size", self.pipeline_model_parallel_size),
                ("sequence-length", self.sequence_length or 1),
            )
            if value < 1
        ]
        if self.sequence_length == 0:
            problems.append("--sequence-length 0 must be at least 1")
        if not self.tolerance >= 0:
            problems.append(f"--tolerance {self.tolerance} must not be negative")
        if problems:
            raise ConversionError(*problems)
