"""What can be asked of the converter (pure: no torch)."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

from usdm_megatron.errors import ConversionError
from usdm_megatron.vocab import USDM_VOCABULARY, Vocabulary

WeightType = Literal["auto", "bf16", "fp16", "fp32"]
_EXTENSION = re.compile(r"units=(\d{1,7})(?:,tokens=(.+))?")
_SIZE = re.compile(r"(\d{1,18}(?:\.\d{1,18})?)\s*([KMG]i?B|B)?", re.IGNORECASE)
_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@dataclass(frozen=True)
class VocabularyExtension:
    """What `--extend-vocab` adds behind the text: control tokens, `units` speech units, pad, `tokens`."""

    units: int = USDM_VOCABULARY.unit_count
    tokens: tuple[str, ...] = ()

    @classmethod
    def parse(cls, text: str) -> VocabularyExtension:
        """`usdm`, `units=N` or `units=N,tokens=a,b`; raises `ConversionError` for anything else."""
        if text == "usdm":
            return cls()
        match = _EXTENSION.fullmatch(text)
        if match is None or int(match[1]) < 1:
            raise ConversionError(
                f"--extend-vocab {text!r} must be usdm, units=N or units=N,tokens=a,b with N at least 1"
            )
        extension = cls(int(match[1]), tuple(match[2].split(",")) if match[2] else ())
        try:
            Vocabulary(unit_count=extension.units, extra_tokens=extension.tokens)
        except ValueError as error:
            raise ConversionError(f"--extend-vocab {text!r}: {error}") from error
        return extension


@dataclass(frozen=True, kw_only=True)
class ImportOptions:
    """Hugging Face model, or PEFT adapter → checkpoint (tracker `release`)."""

    hf_path: str | None = None
    """Directory of the model, or ORG/NAME on the hub."""
    save: Path
    """Checkpoint to write: SAVE/release and SAVE/latest_checkpointed_iteration.txt."""
    adapter: Path | None = None
    """Instead of --hf-path: PEFT directory (adapter_config.json, adapter_model.safetensors) to go on from."""
    load: Path | None = None
    """With --adapter: the checkpoint that it adapts, a converted model, a run, or one of its steps."""
    extend_vocab: str | None = None
    """usdm: add the 10,003 speech tokens; a model that has them is checked and left as it is.
    units=N,tokens=a,b: N speech units, and extra tokens behind <pad>."""
    dtype: WeightType = "auto"
    """Type of the weights in the checkpoint; auto: the source's."""
    seed: int = 42
    """Seed of the new rows."""
    hf_revision: str | None = None
    """Branch, tag or commit on the hub."""
    hf_cache_dir: Path | None = None
    """Where the hub's files are kept; default: huggingface_hub's."""
    workers: int = 2
    """Files written at a time; each holds one tensor in memory. The files depend on it, the weights don't."""
    overwrite: bool = False
    """Replace a converted model that is there."""
    dry_run: bool = False
    """Check everything, list which tensor becomes which, with shapes; write nothing."""

    def __post_init__(self) -> None:
        problems = _worker_problems(self.workers) + self._source_problems()
        if self.seed < 0:
            problems.append(f"--seed {self.seed} must not be negative")
        if problems:
            raise ConversionError(*problems)
        _ = self.extension

    def _source_problems(self) -> list[str]:
        if self.adapter is None:
            problems = [] if self.hf_path else ["--hf-path is missing; name a model, or an --adapter"]
            return problems + (["--load goes with --adapter"] if self.load else [])
        of_a_model = {
            "--hf-path": self.hf_path,
            "--extend-vocab": self.extend_vocab,
            "--hf-revision": self.hf_revision,
            "--hf-cache-dir": self.hf_cache_dir,
        }
        problems = [f"--adapter does not go with {flag}" for flag, value in of_a_model.items() if value]
        if self.load is None:
            problems.append("--adapter needs --load: the checkpoint of the model that it adapts")
        return problems

    @property
    def extension(self) -> VocabularyExtension | None:
        return None if self.extend_vocab is None else VocabularyExtension.parse(self.extend_vocab)


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """Checkpoint → Hugging Face model, or PEFT adapter (safetensors, config, tokenizer)."""

    load: Path
    """A converted model, a run, or one checkpoint directory."""
    hf_path: Path
    """Directory to write."""
    adapter_only: bool = False
    """Of a LoRA checkpoint: write the adapter alone, for peft."""
    merge_lora: bool = False
    """Of a LoRA checkpoint: add the adapter to its base, and write a plain model."""
    pretrained_checkpoint: Path | None = None
    """With --merge-lora: where the adapter's base is now; default: where it was when the adapter began."""
    base_model: str | None = None
    """With --adapter-only: what adapter_config.json says the base is, a hub id or the directory of its
    export; default: the hub id that the base was imported from, if it was not changed since."""
    ckpt_step: int | Literal["best"] | None = None
    """Which step of a run; default: the newest."""
    dtype: WeightType = "auto"
    """Type of the exported weights; auto: the checkpoint's."""
    max_shard_size: str = "5GB"
    """Largest safetensors file, e.g. 5GB or 300MB; a tensor larger than that gets a file of its own."""
    workers: int = 2
    """Files written at a time; each holds at most one tensor in memory, cast or rearranged."""
    overwrite: bool = False
    """Replace a model directory that is there."""
    dry_run: bool = False
    """Check everything, list which tensor becomes which, with shapes; write nothing."""

    def __post_init__(self) -> None:
        problems = _worker_problems(self.workers)
        if self.adapter_only and self.merge_lora:
            problems.append("--adapter-only and --merge-lora exclude each other; export twice")
        if self.pretrained_checkpoint and not self.merge_lora:
            problems.append("--pretrained-checkpoint goes with --merge-lora")
        if self.base_model is not None and not self.adapter_only:
            problems.append("--base-model goes with --adapter-only")
        if problems:
            raise ConversionError(*problems)
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

    hf_path: str
    """Directory of the Hugging Face model, or ORG/NAME on the hub."""
    load: Path
    """A converted model, a run, or one checkpoint directory."""
    mode: Literal["logits", "weights"] = "logits"
    """logits: of both models on one packed row; weights: every tensor, exactly."""
    tensor_model_parallel_size: int = 1
    """Layout of our side (logits)."""
    pipeline_model_parallel_size: int = 1
    """Layout of our side (logits)."""
    tolerance: float = 1e-5
    """Largest difference of a logit that passes, as a part of the largest one (of 1 if all are smaller)."""
    ckpt_step: int | Literal["best"] | None = None
    """Which step of a run; default: the newest."""
    core_attention: Literal["auto", "te", "flash", "torch"] = "auto"
    """Attention backend of our side (logits)."""
    sequence_length: int | None = None
    """Longest packed row to compare (logits); default: as long as the samples need."""
    json: Path | None = None
    """Also write the outcome there, passed or not (logits)."""
    hf_revision: str | None = None
    """Branch, tag or commit on the hub."""
    hf_cache_dir: Path | None = None
    """Where the hub's files are kept; default: huggingface_hub's."""

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
            problems.append(f"--tolerance {self.tolerance} must be a number, 0 or more")
        if self.mode == "weights":
            problems += [
                f"--{field.name.replace('_', '-')} goes with --mode logits"
                for field in fields(self)
                if field.name in _OF_LOGITS and getattr(self, field.name) != field.default
            ]
        if problems:
            raise ConversionError(*problems)


_OF_LOGITS = {
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "tolerance",
    "core_attention",
    "sequence_length",
    "json",
}


def _worker_problems(workers: int) -> list[str]:
    return [] if 1 <= workers <= 64 else [f"--workers {workers} must be from 1 to 64"]
