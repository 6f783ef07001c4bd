"""What a checkpoint says about itself in JSON, so that asking never unpickles anything.

hf_config.json    the Hugging Face config as exported: `vocab_size` is the true vocabulary
vocabulary.json   `Vocabulary.to_dict()`
generation_config.json   the source's, where it had one
tokenizer/        all tokenizer files (absent when the source had none)
provenance.json   where the weights came from; no times, so equal conversions are equal bytes
run_config.yaml   the resolved configuration; only a training run has it
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from usdm_megatron.architecture import HFArchitecture
from usdm_megatron.checkpoint.resolve import step_of
from usdm_megatron.errors import CheckpointError
from usdm_megatron.tokenizer.identity import tokenizer_sha256
from usdm_megatron.vocab import Vocabulary

HF_CONFIG_FILE = "hf_config.json"
VOCABULARY_FILE = "vocabulary.json"
PROVENANCE_FILE = "provenance.json"
GENERATION_CONFIG_FILE = "generation_config.json"
RUN_CONFIG_FILE = "run_config.yaml"
TOKENIZER_DIRECTORY = "tokenizer"


@dataclass(frozen=True)
class CheckpointFacts:
    """One checkpoint directory, read without torch."""

    directory: Path
    kind: Literal["converted", "run"]
    iteration: int | None  # None: converted
    hf_config: dict[str, Any]
    vocabulary: Vocabulary
    provenance: dict[str, Any]
    generation_config: dict[str, Any] | None
    tokenizer_dir: Path | None
    tokenizer_sha256: str | None

    @property
    def architecture(self) -> HFArchitecture:
        return HFArchitecture.from_hf_config(self.hf_config)


def read_facts(directory: Path | str) -> CheckpointFacts:
    """Read the JSON facts of one checkpoint directory (`resolve_checkpoint` names it).

    Raises `CheckpointError` naming the file that is missing or malformed.
    """
    directory = Path(directory)
    hf_config = _read_json(directory / HF_CONFIG_FILE)
    record = _read_json(directory / VOCABULARY_FILE)
    try:
        vocabulary = Vocabulary.from_dict(record)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{directory / VOCABULARY_FILE} is malformed: {error!r}") from error
    if vocabulary.size != hf_config.get("vocab_size"):
        raise CheckpointError(
            f"{directory}: {VOCABULARY_FILE} has {vocabulary.size} ids, but {HF_CONFIG_FILE} says "
            f"vocab_size = {hf_config.get('vocab_size')!r}"
        )
    tokenizer_dir = directory / TOKENIZER_DIRECTORY
    has_tokenizer = tokenizer_dir.is_dir()
    generation = directory / GENERATION_CONFIG_FILE
    is_run = (directory / RUN_CONFIG_FILE).is_file()
    return CheckpointFacts(
        directory=directory,
        kind="run" if is_run else "converted",
        iteration=step_of(directory) if is_run else None,
        hf_config=hf_config,
        vocabulary=vocabulary,
        provenance=_read_json(directory / PROVENANCE_FILE),
        generation_config=_read_json(generation) if generation.is_file() else None,
        tokenizer_dir=tokenizer_dir if has_tokenizer else None,
        tokenizer_sha256=tokenizer_sha256(tokenizer_dir) if has_tokenizer else None,
    )


def write_facts(
    directory: Path,
    *,
    hf_config: Mapping[str, Any],
    vocabulary: Vocabulary,
    provenance: Mapping[str, Any],
    tokenizer_dir: Path | None,
    generation_config: Mapping[str, Any] | None = None,
) -> None:
    """Write the facts into a checkpoint directory that is being made (`extra_files` of `save_checkpoint`)."""
    write_json(directory / HF_CONFIG_FILE, dict(hf_config))
    write_json(directory / VOCABULARY_FILE, vocabulary.to_dict())
    write_json(directory / PROVENANCE_FILE, dict(provenance))
    if generation_config is not None:
        write_json(directory / GENERATION_CONFIG_FILE, dict(generation_config))
    if tokenizer_dir is not None:
        shutil.copytree(tokenizer_dir, directory / TOKENIZER_DIRECTORY, copy_function=shutil.copyfile)


def copy_facts(facts: CheckpointFacts, directory: Path) -> None:
    """Hand the facts of the checkpoint that a run started from on to the run's own."""
    write_facts(
        directory,
        hf_config=facts.hf_config,
        vocabulary=facts.vocabulary,
        provenance=facts.provenance,
        tokenizer_dir=facts.tokenizer_dir,
        generation_config=facts.generation_config,
    )


def megatron_common(
    hf_config: Mapping[str, Any], vocabulary: Vocabulary, iteration: int, params_dtype: str
) -> dict[str, Any]:
    """What Megatron-LM looks for in `common.pt`: `args`, `checkpoint_version`, `iteration`.

    `args` has Megatron-LM's names (`megatron/training/arguments.py`, `--use-checkpoint-args`);
    nothing in this package reads them. `params_dtype` is `bf16`, `fp16` or `fp32`.
    """
    model = HFArchitecture.from_hf_config(hf_config)
    args = argparse.Namespace(
        num_layers=model.layers,
        hidden_size=model.hidden,
        ffn_hidden_size=model.ffn,
        num_attention_heads=model.heads,
        group_query_attention=True,
        num_query_groups=model.kv_heads,
        kv_channels=model.head_dim,
        max_position_embeddings=model.max_positions,
        position_embedding_type="rope",
        rotary_base=model.rope_theta,
        rotary_percent=1.0,
        normalization="RMSNorm",
        norm_epsilon=model.rms_eps,
        swiglu=True,
        add_bias_linear=False,
        add_qkv_bias=False,
        untie_embeddings_and_output_weights=not model.tied,
        vocab_size=vocabulary.size,
        padded_vocab_size=vocabulary.padded_size,
        bf16=params_dtype == "bf16",
        fp16=params_dtype == "fp16",
        tensor_model_parallel_size=1,
        pipeline_model_parallel_size=1,
        iteration=iteration,
        consumed_train_samples=0,
        consumed_valid_samples=0,
    )
    return {"args": args, "checkpoint_version": 3.0, "iteration": iteration}


def write_json(path: Path, content: Any) -> None:
    """One way of writing JSON, so that equal contents are equal bytes."""
    path.write_text(
        json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8"
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing: not a checkpoint of this package") from error
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} must hold a JSON object")
    return content
