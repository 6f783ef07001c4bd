"""What a LoRA run begins with: the frozen base, and the adapter that it goes on from, if any."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from usdm_megatron.architecture import HFArchitecture
from usdm_megatron.checkpoint.adapter_facts import (
    ADAPTER_FILE,
    AdapterFacts,
    read_adapter_facts,
    resolve_base,
)
from usdm_megatron.checkpoint.facts import CheckpointFacts, read_facts
from usdm_megatron.config import CheckpointConfig, RunConfig
from usdm_megatron.errors import ConfigError
from usdm_megatron.lora_spec import TARGETS, LoraSpec
from usdm_megatron.model.lora.names import adapter_entries, entry_shape
from usdm_megatron.vocab import Vocabulary


@dataclass(frozen=True)
class LoraStart:
    """The base, verified, and what this run's checkpoints say of it.

    With `has_adapter` the checkpoint that the run starts from is an adapter; else it is the base itself.
    """

    base: Path
    facts: AdapterFacts
    has_adapter: bool


def find_lora_start(config: RunConfig, directory: Path, *, resumes: bool) -> LoraStart | None:
    """What LoRA needs beside the (verified) checkpoint to start from; None when all weights train.

    Reads every byte of an adapter's base. Raises `ConfigError` when the checkpoint and the configuration
    do not agree on what an adapter is, `CheckpointError` when its base is not there, or is another.
    """
    spec, adapter = config.lora.spec, read_adapter_facts(directory)
    if spec is None:
        if adapter is None:
            return None
        raise ConfigError(
            f"lora: {directory} is an adapter, and this run trains all weights; add --lora to train it on, "
            "or make a whole model of it (python tools/convert_hf_checkpoint.py export --merge-lora, "
            "then import)"
        )
    if adapter is None:
        return LoraStart(directory, AdapterFacts.over(directory, spec), has_adapter=False)
    if problems := _differences(directory, adapter.spec, spec, with_dropout=resumes):
        raise ConfigError(*problems)
    named = config.checkpoint.pretrained_checkpoint
    if named is not None and directory.is_relative_to(named):  # the flag is taken: it cannot name the base
        base = resolve_base(adapter, remedy=_tie_anew(directory))
    else:
        base = resolve_base(adapter, _base_now(config.checkpoint))
    return LoraStart(base, AdapterFacts.over(base, spec), has_adapter=True)


def trainable_parameters(spec: LoraSpec, model: HFArchitecture, vocabulary: Vocabulary) -> int:
    """Parameters of the whole adapter, each once, whatever the layout."""
    new_ids = vocabulary.size - vocabulary.text_size
    total = 0
    for entry in adapter_entries(spec.targets, model, train_new_embeddings=spec.train_new_embeddings):
        rows, columns = entry_shape(entry, model, spec.r, new_ids)
        total += rows * columns * len(entry.layers(model))
    return total


def adapter_tensors(spec: LoraSpec, model: HFArchitecture) -> int:
    """How many tensors the whole adapter consists of."""
    entries = adapter_entries(spec.targets, model, train_new_embeddings=spec.train_new_embeddings)
    return sum(len(entry.layers(model)) for entry in entries)


def frozen_rows_warning(start: LoraStart) -> str | None:
    """Why the run will not learn speech, when the base has random rows for it and they stay as they are."""
    if start.facts.spec.train_new_embeddings or not _is_freshly_extended(read_facts(start.base)):
        return None
    return (
        f"the rows of the speech ids in {start.base} were drawn at random when it was converted, and they "
        "stay so: LoRA freezes them; --train-new-embeddings trains them"
    )


def _is_freshly_extended(facts: CheckpointFacts) -> bool:
    """Whether the conversion drew new rows (only then it records a seed) and no run has trained them."""
    return facts.kind == "converted" and facts.provenance.get("options", {}).get("seed") is not None


def _base_now(checkpoint: CheckpointConfig) -> Path | None:
    """Where `--pretrained-checkpoint` says that the base is; None when it says nothing of it.

    It may name an adapter as well: the one that a run starts, or once started, from.
    """
    if checkpoint.pretrained_checkpoint is None:
        return None
    root = Path(checkpoint.pretrained_checkpoint)
    is_adapter = (root / ADAPTER_FILE).exists() or any(root.glob(f"*/{ADAPTER_FILE}"))
    return None if is_adapter else root


def _tie_anew(adapter: Path) -> str:
    """What to do about a base that has moved where `--pretrained-checkpoint` cannot say so."""
    tool = "python tools/convert_hf_checkpoint.py"
    return (
        f"put it back there, or tie the adapter to where it is now: {tool} export --load {adapter} "
        f"--adapter-only --hf-path DIR, then {tool} import --adapter DIR --load BASE --save NEW"
    )


def _differences(directory: Path, before: LoraSpec, now: LoraSpec, *, with_dropout: bool) -> list[str]:
    fields = {
        "--lora-r": (before.r, now.r),
        "--lora-alpha": (before.alpha, now.alpha),
        "--lora-target-modules": (_in_order(before), _in_order(now)),
    }
    if with_dropout:
        fields["--lora-dropout"] = (before.dropout, now.dropout)
    problems = [
        f"lora: the adapter in {directory} was made with {flag} {there}, now it is {here}; keep {there}"
        for flag, (there, here) in fields.items()
        if there != here
    ]
    if before.train_new_embeddings != now.train_new_embeddings:
        flag = "--train-new-embeddings" if before.train_new_embeddings else "--no-train-new-embeddings"
        problems.append(f"lora: the adapter in {directory} was made with {flag}; give it again")
    return problems


def _in_order(spec: LoraSpec) -> str:
    return " ".join(target for target in TARGETS if target in spec.targets)
